"""What a careless user does: a mistake costs one line on standard error and a nonzero exit code,
and nothing is lost.

Each case is a command as it is typed. Beside the message, what lay on disk before must lie there
afterwards, byte for byte, and nothing half-made beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import hashlib
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable

import jax
import numpy as np
import pytest

from rlbf_jax.cli import main as cli
from rlbf_jax.errors import UserError
from rlbf_jax.models.attention import QUERY_BLOCK
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.runs import execute as runner
from rlbf_jax.runs.load import open_run
from rlbf_jax.sampling.batching import SamplerConfig, context_width
from rlbf_jax.sampling.program import Single
from rlbf_jax.tokenizers import load_tokenizer
from rlbf_jax.training import checkpoint, journal

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "training" / "tiny_experiment.py"
OWN = ROOT / "experiments" / "own_data.py"
PROGRESS = re.compile(r"\[\d+/\d+\] |\w+: (evaluated \d+|an update takes) ")
"""Lines of a run that goes well up to the mistake."""
MEBIBYTE = 1 << 20

ROWS = "".join(
    f"What about loaf number {i} of the day?,It takes an hour or two to do all of this well at "
    "home. "
    f"Bread rises best in a warm corner of the kitchen. Then wait {i} minutes and bake it.\n"
    for i in range(60)
)
HEADER = "prompt,response\n"


def told(text: str, *words: str) -> str:
    """The one line of a mistake, which holds all of the words."""
    lines = [line for line in text.splitlines() if line.strip() and not PROGRESS.match(line)]
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"
    return lines[0]


@pytest.fixture
def refused(capfd):
    """`refused(argv, *words)` runs a command in this process; file descriptors are read, so
    libraries are heard too."""

    def run(argv, *words: str) -> str:
        capfd.readouterr()
        assert cli.main([str(arg) for arg in argv]) == 2
        return told(capfd.readouterr().err, *words)

    return run


def in_child(argv, words, before: str = "") -> None:
    """The same in a process of its own; `before` is shell code."""
    command = f'{before} exec "$0" -m rlbf_jax.cli.main "$@"'
    child = subprocess.run(
        ["bash", "-c", command, sys.executable, *map(str, argv)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 2, child.stderr
    told(child.stderr, *words)


def contents(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert cli.main(["run", str(TINY), "--workdir", str(folder)]) == 0
    return folder


@pytest.fixture
def no_report(monkeypatch):
    """Spares the seconds of drawing plots where the report is not the point."""
    monkeypatch.setattr(runner, "write_report", lambda workdir: None)


@pytest.fixture
def run_folder(finished, tmp_path):
    """A finished run to spoil."""
    return shutil.copytree(finished, tmp_path / "run")


def undo(folder: pathlib.Path, stage: str) -> None:
    """As if a stage had never begun."""
    (folder / "done" / stage).unlink()
    shutil.rmtree(folder / "stages" / stage)


def change_setting(folder: pathlib.Path, name: str, value) -> None:
    """Writes a dotted setting into a manifest, as if the run had been started with it."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    *parents, last = name.split(".")
    part = manifest["config"]
    for parent in parents:
        part = part[parent]
    part[last] = value
    path.write_text(json.dumps(manifest))


# The user's data ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class File:
    """A data file, and what is said of it."""

    content: str | bytes | None
    words: tuple[str, ...]
    options: tuple[str, ...] = ()
    suffix: str = ".csv"


FILES = {
    "missing": File(None, ("rows.csv: no such file",)),
    "wrong name": File(
        "x", ("rows.txt", "expected a name that ends in .csv, .jsonl or .parquet"), suffix=".txt"
    ),
    "wrong column": File("a,b\n1,2\n", ("no prompt column", "the columns are a, b")),
    "column that is not there": File(
        HEADER + ROWS, ("no prompt column promt",), ("--data.prompt_column", "promt")
    ),
    "column twice": File(
        "prompt,response,prompt\n" + ROWS, ("line 1", "a column name occurs twice")
    ),
    "bad JSON line": File(
        '{"prompt": "a", "response": "b"}\n{"prompt": "a",\n',
        ("line 2: not JSON", "mend the row"),
        suffix=".jsonl",
    ),
    "JSON without objects": File(
        "[1, 2]\n", ("one JSON array; expected one object a line",), suffix=".jsonl"
    ),
    "number for a text": File(
        '{"prompt": "a", "response": 7}\n', ("'response' must be text",), suffix=".jsonl"
    ),
    "binary": File(bytes(range(256)) * 40, ("line 1", "a NUL byte", "binary")),
    "UTF-16": File((HEADER + ROWS).encode("utf-16"), ("UTF-16", "expected UTF-8")),
    "Latin-1": File(
        (HEADER + "Un café?,Oui\n").encode("latin-1"),
        ("line 2", "0xe9 is not UTF-8", "save it as UTF-8"),
    ),
    "empty": File("", ("rows.csv: the file is empty",)),
    "header only": File(HEADER, ("no usable row (nothing below the header)",)),
    "field too few": File(HEADER + "a\n" + ROWS, ("line 2: 1 fields where the header has 2",)),
    "open quotation mark": File(
        HEADER + '"a,b\n' + ROWS, ("line 2", "is a quotation mark left open?")
    ),
    "zero-length prompt": File(
        HEADER + "  ,An answer.\n" + ROWS, ("line 2: field 'prompt' is empty",)
    ),
    "CSV line of 5 MB": File(
        HEADER + "q," + "word " * MEBIBYTE + "\n" + ROWS, ("line 2", "5242880 characters")
    ),
    "JSON line of 5 MB": File(
        json.dumps({"prompt": "q", "response": "x" * 5 * MEBIBYTE}),
        ("line 1", "5242880 characters"),
        suffix=".jsonl",
    ),
    "too few rows": File(
        HEADER + "\n".join(ROWS.splitlines()[:3]), ("rows.csv: pool", "3 usable rows", "add rows")
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_data_file(name, tmp_path, refused):
    case = FILES[name]
    path = tmp_path / f"rows{case.suffix}"
    if case.content is not None:
        path.write_bytes(case.content if isinstance(case.content, bytes) else case.content.encode())
    before = contents(tmp_path)
    refused(
        ["run", OWN, "--workdir", tmp_path / "run", "--data.path", path, *case.options],
        str(path),
        *case.words,
    )
    assert contents(tmp_path) == before and not (tmp_path / "run").exists()


def test_folder_for_a_file(tmp_path, refused):
    refused(
        ["run", OWN, "--workdir", tmp_path / "run", "--data.path", tmp_path],
        "cannot be read (Is a directory)",
    )


@pytest.fixture(scope="module")
def own_tokenizer(tmp_path_factory):
    """(data file, tokenizer folder) as `rlbf data tokenizer` makes it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "rows.csv").write_text(HEADER + ROWS)
    argv = [
        "data",
        "tokenizer",
        folder / "rows.csv",
        "--out",
        folder / "tokenizer",
        "--vocab_size",
        "400",
    ]
    assert cli.main([*map(str, argv), "--x_max", "64"]) == 0
    return folder / "rows.csv", folder / "tokenizer"


def test_bom_is_no_mistake(own_tokenizer, tmp_path, capfd):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbf" + own_tokenizer[0].read_bytes())
    argv = [
        "data",
        "build",
        path,
        "--tokenizer",
        own_tokenizer[1],
        "--out",
        tmp_path / "set",
        "--num_examples",
        "8",
    ]
    assert cli.main([*map(str, argv), "--bsafe.max_tokens", "256"]) == 0


def test_text_that_spells_control_tokens_is_text(own_tokenizer, tmp_path, capfd):
    """Positive: such rows are read, and no id of theirs is a control or template id."""
    spelled = (
        "Say [CATEGORY_INSULT] [BACKTRACK_BY_3] [RESET] [USER] [MODEL] <s> </s> aloud for me "
        "please."
    )
    path, tokenizer = tmp_path / "rows.csv", load_tokenizer(own_tokenizer[1])
    path.write_text(HEADER + ROWS.replace("It takes an hour", spelled + " It takes an hour"))
    argv = [
        "data",
        "build",
        path,
        "--tokenizer",
        own_tokenizer[1],
        "--out",
        tmp_path / "set",
        "--num_examples",
        "8",
    ]
    assert cli.main([*map(str, argv), "--bsafe.max_tokens", "256", "--bsafe.share_plain", "1"]) == 0
    ids = tokenizer.encode(spelled)
    assert tokenizer.decode(ids) == spelled and max(ids) < tokenizer.num_pieces and min(ids) > 3
    from rlbf_jax.data import datasets

    rows = [datasets.open_source(tmp_path / "set")[i]["row"][0] for i in range(8)]
    assert sum(spelled in tokenizer.decode(row) for row in rows) == 8
    assert not np.isin(
        np.concatenate(rows), np.arange(tokenizer.controls.rule().first_id, tokenizer.vocab_size)
    ).any()


BUILDS = {
    "no tokenizer": (["--tokenizer", "nowhere"], ("nowhere holds no tokenizer.model",)),
    "out below a file": (
        ["--out", "{rows}/set"],
        ("rows.csv", "a file is there", "choose another place"),
    ),
    "max_tokens too small": (["--bsafe.max_tokens", "12"], ("raise max_tokens",)),
    "endpoint without scheme": (
        ["--injector.base_url", "127.0.0.1:9/v1"],
        ("base_url must begin with http://",),
    ),
    "endpoint down": (
        [
            "--injector.base_url",
            "http://127.0.0.1:9/v1",
            "--injector.model",
            "m",
            "--injector.retries",
            "0",
        ],
        ("http://127.0.0.1:9/v1", "is the server up?"),
    ),
}


@pytest.mark.parametrize("name", BUILDS)
def test_data_build(name, own_tokenizer, tmp_path, refused):
    more, words = BUILDS[name]
    rows, tokenizer = own_tokenizer
    before = contents(rows.parent)
    argv = [
        "data",
        "build",
        rows,
        "--tokenizer",
        tokenizer,
        "--out",
        tmp_path / "set",
        "--num_examples",
        "10",
    ]
    refused(
        [*argv, "--bsafe.max_tokens", "256", *(arg.replace("{rows}", str(rows)) for arg in more)],
        *words,
    )
    assert contents(rows.parent) == before
    # What an endpoint has answered, or refused to, is kept on purpose.
    assert {p.name for p in tmp_path.iterdir()} <= {"set.answers.jsonl"}


def test_tokenizer_refuses_and_writes_nothing(own_tokenizer, tmp_path, refused):
    argv = ["data", "tokenizer", own_tokenizer[0], "--out", tmp_path / "t"]
    refused([*argv, "--vocab_size", "100"], "vocab_size 100 is too small", "at least")
    refused([*argv, "--vocab_size", "100000"], "vocab_size 100000 is too large", "at most")
    refused([*argv, "--x_max", "0"], "x_max is 0")
    assert not (tmp_path / "t").exists()


# Options ------------------------------------------------------------------------------------------


OPTIONS = {
    "unknown": (
        "--sft.optimizer.learning_rat 1",
        "no such option (did you mean --sft.optimizer.learning_rate?)",
    ),
    "unknown, far from all": ("--zzz 1", "--zzz: no such option"),
    "wrong type": ("--sft.steps many", "--sft.steps", "'many'", "INT"),
    "no value": ("--sft.steps", "--sft.steps", "Missing value"),
    "wrong choice": ("--semantics sideways", "'sideways'", "'keep', 'rewind'"),
    "stray word": ("--baselines False", "'False' belongs to no option", "--no_name"),
    "share beyond 1": ("--bsafe_plus.share_plain 1.5", "share_plain is 1.5", "0..1"),
    "steps below 0": ("--sft.steps -1", "sft: steps is -1, expected 0 or more"),
    "empty batch": ("--sft.batch_size 0", "batch_size is 0, expected 1 or more"),
    "batch and microbatches": ("--sft.accumulate 3", "sft.batch_size", "choose a multiple of 3"),
    "learning rate that is none": ("--sft.optimizer.learning_rate nan", "learning_rate is nan"),
    "greedy rollouts": (
        "--reinforcement.temperature 0",
        "temperature is 0.0, expected more than 0",
    ),
    "reward that is none": (
        "--reinforcement.reward.clean nan",
        "clean is nan, expected a finite number",
    ),
    "negative weight": ("--rollouts.none -1", "rollouts: none is -1.0"),
    "seed": ("--seed -1", "seed is -1"),
    "knobs of the evaluation": (
        "--evaluation.knobs.temperature -2",
        "temperature is -2.0, expected 0 (greedy)",
    ),
    "no attack": ("--evaluation.attacks", "attacks is empty"),
    "unknown attack": (
        "--evaluation.attacks flattery",
        "unknown attack 'flattery'",
        "middle_filling",
    ),
    "no such option as a method": ("--method magic", "--method: no such option"),
    "rule that the vocabulary lacks": (
        "--data.rules reset",
        "data.rules is reset; method rlbf needs backtrack among them",
    ),
    "mesh that does not fit": (
        "--mesh.data 3",
        "mesh data=3 x fsdp=1 x tensor=1 does not fit",
        "devices",
    ),
    "mesh axis of 0": ("--mesh.data 0", "data is 0, expected 1 or more, or -1"),
    "odd heads": (
        "--model.num_heads 3 --model.num_kv_heads 2",
        "num_heads 3 is not a multiple of num_kv_heads 2",
    ),
    "rows that do not block": (
        "--data.row_length 1100",
        "data.row_length: 1100 ids",
        "a multiple of it",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name, tmp_path, refused):
    options, *words = OPTIONS[name]
    refused(["run", TINY, "--workdir", tmp_path / "run", *options.split()], *words)
    assert not (tmp_path / "run").exists()


def test_unknown_option_in_a_process_of_its_own(tmp_path):
    """Without Unicode on standard output tyro draws other boxes."""
    argv = ["run", TINY, "--workdir", tmp_path / "run", "--sft.stepps", "3"]
    in_child(
        argv,
        ("--sft.stepps: no such option (did you mean --sft.steps?)",),
        "export PYTHONIOENCODING=ascii;",
    )
    assert not any(tmp_path.iterdir())


FITS = {
    "X_max too small for a violation": (
        "--data.x_max 3",
        "x_max is 3",
        "violations need more",
        "raise x_max to",
    ),
    "vocabulary too small": ("--data.vocab_size 260", "vocab_size 260 is too small", "at least"),
    "rows too short": ("--data.row_length 12", "row_length is 12", "raise it"),
    "too few examples": (
        "--refusal_examples 1 --sft_examples 1",
        "sft.batch_size is 2",
        "raise sft_examples",
    ),
    "prompt longer than the buffer": (
        "--max_prompt 1 --rollout_tokens 70",
        "a rollout of",
        "set --max_prompt",
    ),
    "forced text longer than max_tokens": (
        "--evaluation.knobs.max_tokens 20",
        "max_tokens = 20",
        "raise knobs.max_tokens",
    ),
    "rollouts too short for an attack": ("--rollout_tokens 30", "rollouts:", "max_tokens = 30"),
}
"""Found out when tokenizer and data are there; before any training."""


@pytest.mark.parametrize("name", FITS)
def test_text_and_shapes_that_do_not_fit(name, tmp_path, refused):
    options, *words = FITS[name]
    argv = ["run", TINY, "--workdir", tmp_path / "run"]
    refused([*argv, *options.split()], *words)
    assert not (tmp_path / "run" / "stages").exists() and not list(tmp_path.rglob("*.tmp"))
    mended = options.replace("--rollout_tokens 30", "--rollout_tokens 31")
    if mended != options:
        # Data and tokenizer do not depend on it: the folder goes on, and fails at the new value.
        refused([*argv, *mended.split()], "rollouts:", "max_tokens = 31")
    if any((tmp_path / "run" / "done").iterdir()):
        # Other settings than what is prepared was made with.
        refused([*argv, "--data.vocab_size", "261"], "holds a run with other settings")
    else:
        # Another setting that fails as soon: a run that came to nothing does not take the folder.
        refused([*argv, "--data.vocab_size", "261"], "vocab_size 261 is too small")


EXPERIMENTS = {
    "missing": (None, "no such file", "get_config()"),
    "syntax error": ("def get_config(:\n", "line 1", "invalid syntax"),
    "no get_config": ("x = 1\n", "defines no get_config()"),
    "get_config raises": ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
    "import fails": (
        "import no_such_module_anywhere\n",
        "line 1: ModuleNotFoundError",
        "no_such_module_anywhere",
    ),
    "returns something else": (
        "def get_config():\n    return {}\n",
        "returned a dict, expected a dataclass",
    ),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_file(name, tmp_path, refused):
    content, *words = EXPERIMENTS[name]
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    refused(["run", path, "--workdir", tmp_path / "run"], str(path), *words)
    assert not (tmp_path / "run").exists()


# Folders ------------------------------------------------------------------------------------------


def test_workdir_that_cannot_be_written(tmp_path, refused):
    """Below a file, where even root cannot write."""
    (tmp_path / "file").write_text("mine")
    refused(
        ["run", TINY, "--workdir", tmp_path / "file" / "run"],
        "Not a directory",
        "choose another --workdir",
    )
    refused(
        ["run", TINY, "--workdir", tmp_path / "file"], "a file is there", "choose another --workdir"
    )
    assert contents(tmp_path) == {"file": hashlib.sha256(b"mine").hexdigest()}


def test_workdir_of_another_experiment(run_folder, refused):
    before = contents(run_folder)
    refused(
        ["run", TINY, "--workdir", run_folder, "--sft.steps", "9"],
        "sft.steps is 7 there, 9 here",
        "--workdir",
    )
    assert contents(run_folder) == before


@pytest.mark.parametrize("command", ["generate", "evaluate", "report"])
def test_folder_that_is_no_run(command, tmp_path, refused):
    prompt = ["--prompt", "Hi?"] if command == "generate" else []
    (tmp_path / "empty").mkdir()
    refused([command, tmp_path / "nowhere", *prompt], "nowhere")
    refused([command, tmp_path / "empty", *prompt], "no run here", "make one with `rlbf run`")
    assert [p.name for p in tmp_path.rglob("*")] == ["empty"]


def test_run_that_is_not_finished(run_folder, refused):
    undo(run_folder, "rlbf")
    before = contents(run_folder)
    words = ("no finished stage 'rlbf'; finished are base, sft",)
    ask = ["generate", run_folder, "--prompt", "Hi?"]
    refused([*ask, "--stage", "rlbf"], *words)
    refused(["evaluate", run_folder, "--stage", "rlbf"], *words)
    refused(["attack", run_folder, "--stage", "rlbf", "--attack", "direct"], *words)
    refused([*ask, "--stage", "sfft"], "no finished stage 'sfft'")
    assert contents(run_folder) == before
    # Without a stage the last finished one answers.
    assert open_run(run_folder).last_stage == "sft"
    assert cli.main([str(arg) for arg in [*ask, "--max_tokens", "4"]]) == 0


def test_run_of_which_nothing_is_finished(run_folder, refused):
    shutil.rmtree(run_folder / "stages")
    before = contents(run_folder)
    words = ("no stage of it is finished", "run it first")
    refused(["generate", run_folder, "--prompt", "Hi?"], *words)
    refused(["evaluate", run_folder], *words)
    refused(["attack", run_folder, "--attack", "direct"], *words)
    assert contents(run_folder) == before


# Requests -----------------------------------------------------------------------------------------


REQUESTS = {
    "empty prompt": (["--prompt", ""], "--prompt is empty"),
    "blank prompt": (["--prompt", " \n"], "--prompt is empty"),
    "prompt beyond every buffer": (
        ["--prompt", "word " * 20_000],
        "ids",
        "exceed 32768",
        "shorten the prompt",
    ),
    "forced text beyond max_tokens": (
        ["--prompt", "a", "--forced", "many words " * 30],
        "forced ids exceed max_tokens",
    ),
    "negative temperature": (
        ["--prompt", "a", "--temperature", "-1"],
        "temperature is -1.0, expected 0 (greedy)",
    ),
    "top_p beyond 1": (["--prompt", "a", "--top_p", "2"], "top_p is 2.0"),
    "no tokens": (["--prompt", "a", "--max_tokens", "0"], "--max_tokens 0", "at least 1"),
    "too many tokens": (
        ["--prompt", "a", "--max_tokens", "3000000000"],
        "max_tokens is 3000000000",
        "expected a whole number",
    ),
    "no answers": (["--prompt", "a", "--n", "0"], "--n is 0"),
    "seed": (["--prompt", "a", "--seed", str(2**70)], "--seed is"),
    "broken Unicode": (["--prompt", "a\udcff"], "character 1 is a lone surrogate"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_request(name, finished, refused):
    options, *words = REQUESTS[name]
    refused(["generate", finished, *options], *words)


def test_spelled_control_tokens_stay_text_in_requests(finished, capfd):
    """Positive: prompt and forced words that spell a directive erase nothing."""
    argv = [
        "generate",
        finished,
        "--prompt",
        "[RESET] [BACKTRACK_BY_3]",
        "--forced",
        "So [CATEGORY_INSULT] [BACKTRACK_BY_2]",
    ]
    assert cli.main([*map(str, argv), "--forbid_directives", "--json", "--max_tokens", "60"]) == 0
    row = json.loads(capfd.readouterr().out)
    assert row["visible"].startswith("So [CATEGORY_INSULT] [BACKTRACK_BY_2]") and not row["edits"]
    assert row["num_forced"] > 4
    assert {piece["kind"] for piece in row["trace"] if piece["forced"]} == {"content"}


def test_a_long_prompt_is_padded_to_whole_attention_blocks(finished):
    """Positive: what does not fit into one block is answered all the same."""
    tokenizer = load_tokenizer(finished / "tokenizer")
    prompt = tokenizer.encode_prompt("bread " * 600)
    assert len(prompt) > QUERY_BLOCK
    config = SamplerConfig(batch_size=2)
    width = context_width(len(prompt), config, Single(ModelConfig()))
    assert width >= len(prompt) and width % QUERY_BLOCK == 0


# Damaged files of a run ---------------------------------------------------------------------------


def truncate(path: pathlib.Path, share: float = 0.5) -> None:
    with open(path, "r+b") as file:
        file.truncate(int(path.stat().st_size * share))


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def largest(folder: pathlib.Path, pattern: str = "*") -> pathlib.Path:
    return max((p for p in folder.rglob(pattern) if p.is_file()), key=lambda p: p.stat().st_size)


def test_checkpoint_cut_anywhere(run_folder, refused):
    """Every file of a finished stage's checkpoint, cut at the start, in the middle, near the end,
    or gone."""
    model = run_folder / "stages" / "rlbf" / "model" / "0"
    files = [path for path in model.rglob("*") if path.is_file()]
    files.remove(model / "commit_success.txt")  # nobody reads it on a file system that renames
    assert len(files) > 10
    for path in files:
        whole = path.read_bytes()
        for share in (0.0, 0.5, 0.95):
            truncate(path, share)
            assert checkpoint.find_damage(model), path
            path.write_bytes(whole)
    path = largest(model)
    for spoil in (flip, truncate, pathlib.Path.unlink):
        whole = path.read_bytes()
        spoil(path)
        before = contents(run_folder)
        refused(
            ["generate", run_folder, "--prompt", "a"],
            str(model),
            "damaged",
            path.name,
            "then `rlbf run`",
        )
        assert contents(run_folder) == before
        path.write_bytes(whole)


def test_what_a_damaged_checkpoint_advises_works(run_folder, finished, no_report, capfd):
    truncate(largest(run_folder / "stages" / "rlbf" / "model"))
    assert cli.main(["generate", str(run_folder), "--prompt", "a"]) == 2
    advised = re.search(r"delete (\S+) and (\S+), then", capfd.readouterr().err)
    shutil.rmtree(advised[1])
    os.unlink(advised[2])
    assert cli.main(["run", str(TINY), "--workdir", str(run_folder)]) == 0
    same_parameters(run_folder, finished, "rlbf")


def same_parameters(one: pathlib.Path, other: pathlib.Path, stage: str) -> None:
    mine, theirs = (open_run(folder).policy(stage).params for folder in (one, other))
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)


def test_truncated_checkpoint_in_a_process_of_its_own(run_folder):
    """Without its checksums: Orbax's own complaints, from threads too, are one line still."""
    model = run_folder / "stages" / "rlbf" / "model" / "0"
    (model / checkpoint.CHECKSUMS).unlink()
    truncate(largest(model))
    in_child(
        ["generate", run_folder, "--prompt", "a"], (str(model), "cannot be read", "then `rlbf run`")
    )


def test_damaged_checkpoint_of_an_unfinished_stage(run_folder, refused):
    (run_folder / "done" / "sft").unlink()
    shutil.rmtree(run_folder / "stages" / "sft" / "model")
    flip(largest(run_folder / "stages" / "sft" / "checkpoints"))
    before = contents(run_folder)
    refused(
        ["run", TINY, "--workdir", run_folder],
        "checkpoints/7: damaged",
        "other bytes",
        "start the stage again",
    )
    assert contents(run_folder) == before


def stored(**config) -> str:
    """A manifest of this version."""
    return json.dumps({"format": 2, "config": config, "stages": [], "shared": {}})


MANIFESTS = {
    "of version 0.1": '{"config": {"seed": 0}, "versions": {"rlbf_jax": "0.1.0"}}',
    "half": '{"config": {"seed"',
    "empty": "",
    "list": "[]",
    "number for a configuration": '{"config": 3}',
    "wrong type": stored(seed="x"),
    "impossible": stored(model={"num_heads": 3, "num_kv_heads": 2}),
    "stages that are none": '{"config": {}, "format": 2, "stages": [3], "shared": {}}',
    "binary": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest(name, run_folder, refused):
    content = MANIFESTS[name]
    (run_folder / "manifest.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    before = contents(run_folder)
    refused(["generate", run_folder, "--prompt", "a"], "manifest.json")
    refused(["evaluate", run_folder], "manifest.json")
    refused(["run", TINY, "--workdir", run_folder], str(run_folder), "--workdir")
    assert contents(run_folder) == before


@pytest.mark.parametrize("content", ["[{", "{}", "[1]", "[{}]", b"\xff"])
def test_results(content, run_folder, refused):
    """An old report is not replaced by an empty one, and an evaluation is not lost at its end."""
    (run_folder / "results.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    before = contents(run_folder)
    refused(["report", run_folder], "results.json")
    refused(["evaluate", run_folder, "--n_prompts", "1"], "results.json")
    assert contents(run_folder) == before


def test_metrics_cut_by_hand(run_folder, refused):
    (run_folder / "done" / "sft").unlink()
    shutil.rmtree(run_folder / "stages" / "sft" / "model")
    truncate(run_folder / "stages" / "sft" / "metrics.jsonl")
    before = contents(run_folder)
    refused(
        ["run", TINY, "--workdir", run_folder],
        "sft/metrics.jsonl has",
        "its checkpoint says",
        "start the stage again",
    )
    assert contents(run_folder) == before


DATA_DAMAGE: dict[str, Callable[[pathlib.Path], None]] = {
    "records cut": lambda data: truncate(largest(data, "*.array_record*")),
    "records flipped": lambda data: flip(largest(data, "*.array_record*")),
    "records empty": lambda data: truncate(largest(data, "*.array_record*"), 0),
    "content": lambda data: truncate(data / "content.json"),
    "content without fields": lambda data: (data / "content.json").write_text("{}") and None,
    "description": lambda data: truncate(data / "dataset_info.json"),
    "features": lambda data: truncate(data / "features.json"),
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("name", DATA_DAMAGE)
def test_data_set(name, run_folder, refused):
    undo(run_folder, "sft")
    data = run_folder / "data" / "bsafe_plus"
    DATA_DAMAGE[name](data)
    before = contents(run_folder)
    refused(
        ["run", TINY, "--workdir", run_folder],
        str(data),
        "done/bsafe_plus_data",
        "makes the same data again",
    )
    assert contents(run_folder) == before


TOKENIZER_DAMAGE = {
    "model cut": ("tokenizer.model", None),
    "model empty": ("tokenizer.model", ""),
    "junk": ("tokenizer.model", "junk"),
    "settings cut": ("tokenizer.json", None),
    "other settings": ("tokenizer.json", '{"categories": ["a"], "x_max": 4}'),
}


@pytest.mark.parametrize("name", TOKENIZER_DAMAGE)
def test_tokenizer(name, run_folder, refused):
    file, content = TOKENIZER_DAMAGE[name]
    path = run_folder / "tokenizer" / file
    truncate(path) if content is None else path.write_text(content)
    before = contents(run_folder)
    refused(
        ["generate", run_folder, "--prompt", "a"],
        str(path.parent),
        "done/tokenizer",
        "makes the same tokenizer",
    )
    assert contents(run_folder) == before


def test_what_damaged_data_and_tokenizer_advise_works(run_folder, finished, no_report):
    undo(run_folder, "sft")
    (run_folder / "tokenizer" / "tokenizer.model").write_text("junk")
    shutil.rmtree(run_folder / "data")
    for stage in ("tokenizer", "pretraining_data", "bsafe_plus_data"):
        (run_folder / "done" / stage).unlink()
    assert cli.main(["run", str(TINY), "--workdir", str(run_folder)]) == 0
    same_parameters(run_folder, finished, "sft")


# Machine and numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [True, False])
def test_disk_fills_while_a_checkpoint_is_written(
    run_folder, finished, no_report, refused, monkeypatch, waits
):
    """The checkpoint before stays loadable, nothing half-written stays, and the same command ends
    as if undisturbed; whether the training waits for the checkpoint, or hears of it steps later."""
    undo(run_folder, "sft")
    save = checkpoint.Checkpoints.save
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_at_4(self, step, state, meta):
        if step == 4:
            self.finish()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        save(self, step, state, meta)
        if step == 4 and waits:
            self.finish()

    argv = ["run", TINY, "--workdir", run_folder]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", full_at_4)
        try:
            refused(
                argv,
                "sft/checkpoints/4: cannot be written (File too large)",
                "make room",
                "last whole checkpoint",
            )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    folder = run_folder / "stages" / "sft" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["2"] and not checkpoint.find_damage(folder / "2")
    # Orbax leaves tasks that failed; asyncio reports them when they are collected, with tracebacks
    # for which Python 3.11 parses source. In the middle of another parse that is a SystemError.
    gc.collect()
    assert cli.main([str(arg) for arg in argv]) == 0
    metrics = "stages/sft/metrics.jsonl"
    assert (run_folder / metrics).read_bytes() == (finished / metrics).read_bytes()
    same_parameters(run_folder, finished, "sft")


def test_the_last_whole_checkpoint_stays_whoever_hears_of_a_failure_first(tmp_path):
    """Asked at every moment, so that the failure is heard before the thread that would clean up."""
    kept = checkpoint.Checkpoints(tmp_path / "checkpoints", 1, writes=True)
    state = {"x": np.random.default_rng(0).normal(size=60_000).astype(np.float32)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept.save(2, state, {})
    kept.finish()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(UserError, match="checkpoints/4: cannot be written"):
            kept.save(4, state, {})
            end = time.monotonic() + 3
            while time.monotonic() < end:
                kept.check()
            kept.finish()  # the thread was first
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    time.sleep(1.0)
    assert [p.name for p in kept.folder.iterdir()] == ["2"]
    assert not checkpoint.find_damage(kept.folder / "2")
    gc.collect()


@pytest.mark.parametrize("keep", [1, 2])
def test_so_many_of_the_newest_checkpoints_stay(tmp_path, keep):
    kept = checkpoint.Checkpoints(tmp_path / "checkpoints", keep, writes=True)
    for step in (2, 4, 6, 8):
        kept.save(step, {"x": np.full(3, step, np.float32)}, {})
        kept.finish()
        names = sorted(int(p.name) for p in kept.folder.iterdir())
        assert names == [s for s in (2, 4, 6, 8) if s <= step][-keep:]
    kept.close()


def test_what_stragglers_write_after_a_failed_checkpoint_goes_too(tmp_path, monkeypatch):
    """After the first array has failed, Orbax still writes others, which makes the removed folder
    anew."""
    half = tmp_path / "4.orbax-checkpoint-tmp" / "state"
    checkpoints = checkpoint.Checkpoints(tmp_path, writes=True)

    def straggle():
        for index in range(30):
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                half.mkdir(parents=True, exist_ok=True)
                (half / str(index)).write_bytes(b"late")
            time.sleep(0.01)

    stragglers = [threading.Thread(target=straggle) for _ in range(3)]

    def fails(*args, **options):
        for thread in stragglers:
            thread.start()
        no_space()

    monkeypatch.setattr(checkpoints._manager, "save", fails)
    with pytest.raises(UserError, match="make room"):
        checkpoints.save(4, {"a": np.zeros(3)}, {})
    assert not any(thread.is_alive() for thread in stragglers)
    assert not list(tmp_path.iterdir())


def test_disk_full_in_a_process_of_its_own(tmp_path):
    argv = ["run", TINY, "--workdir", tmp_path / "run"]
    in_child(
        argv,
        ("data/pretraining: cannot be written", "File too large", "make room"),
        "ulimit -f 40;",
    )
    assert not [p for p in tmp_path.rglob("*") if "tmp" in p.name or "unfinished" in p.name]


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_full_while_the_report_is_written(run_folder, refused, monkeypatch):
    before = contents(run_folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        refused(
            ["report", run_folder],
            str(run_folder),
            "No space left on device",
            "make room on the disk",
        )
    after = contents(run_folder)
    assert {name: after.get(name) for name in before} == before and not list(
        run_folder.rglob("*.tmp")
    )


def test_disk_full_while_metrics_are_written(run_folder, refused, monkeypatch):
    undo(run_folder, "sft")
    before = contents(run_folder)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "os", types.SimpleNamespace(fsync=no_space))
        refused(
            ["run", TINY, "--workdir", run_folder],
            "sft/",
            ".jsonl",
            "No space left on device",
            "make room",
        )
    after = contents(run_folder)
    assert {name: after.get(name) for name in before} == before


def test_disk_full_from_the_start(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_space)
    refused(
        ["run", TINY, "--workdir", tmp_path / "run"],
        str(tmp_path / "run"),
        "No space left on device",
    )
    assert not list(tmp_path.rglob("*.*"))


def test_loss_that_is_not_finite(tmp_path, refused):
    options = "--pretraining.optimizer.learning_rate 1e30 --pretraining.optimizer.warmup_steps 0"
    argv = [
        "run",
        TINY,
        "--workdir",
        tmp_path / "run",
        *options.split(),
        "--pretraining.checkpoint_every",
        "1",
    ]
    refused(argv, "stage base, step", "not finite", "is kept", "Lower the learning rate")
    work = open_run(tmp_path / "run").run
    kept = checkpoint.Checkpoints(work.stage_folder("base") / "checkpoints")
    assert kept.latest and not checkpoint.find_damage(kept.folder / str(kept.latest))
    rows = (work.stage_folder("base") / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == kept.latest and all(np.isfinite(json.loads(row)["nll"]) for row in rows)


def test_reward_that_is_not_finite(run_folder, refused):
    """1e39 is a number, but none that a float32 can hold."""
    undo(run_folder, "rlbf")
    options = []
    for name in ("clean", "violation", "failed", "recovered", "unneeded"):
        change_setting(run_folder, f"reinforcement.reward.{name}", 1e39)
        options += [f"--reinforcement.reward.{name}", "1e39"]
    before = contents(run_folder / "stages")
    refused(
        ["run", TINY, "--workdir", run_folder, *options],
        "rewards that are not finite",
        "reinforcement.reward",
    )
    after = contents(run_folder / "stages")
    assert {name: after.get(name) for name in before} == before


def test_endpoint_of_the_critic_is_down(run_folder, refused):
    undo(run_folder, "rlbf")
    options = []
    for name, value in {"base_url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}.items():
        change_setting(run_folder, f"critic_endpoint.{name}", value)
        options += [f"--critic_endpoint.{name}", value]
    before = contents(run_folder / "stages")
    refused(
        ["run", TINY, "--workdir", run_folder, *options],
        "http://127.0.0.1:9/v1",
        "is the server up?",
        "same command",
    )
    after = contents(run_folder / "stages")
    assert {name: after.get(name) for name in before} == before


def test_memory_runs_out(finished, refused, monkeypatch):
    from rlbf_jax.sampling import sampler

    def too_much(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(sampler.loop, "go_on", too_much)
    refused(["generate", finished, "--prompt", "a"], "out of memory", "smaller batches")
