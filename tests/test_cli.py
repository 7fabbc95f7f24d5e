"""The command line: overrides arrive, a user's mistake costs one line and exit code 2,
nothing heavy loads early."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import subprocess
import sys
import types
from typing import ClassVar

import numpy as np
import pytest

from rlbf_jax import methods
from rlbf_jax.cli import main as cli
from rlbf_jax.errors import UserError
from rlbf_jax.runs.experiment import MethodConfig
from rlbf_jax.sampling.request import Generation
from rlbf_jax.tokenizers import load_tokenizer, train_tokenizer

EXPERIMENT = '''
"""A made-up experiment."""
import dataclasses
import enum

class Semantics(enum.Enum):
    KEEP = "keep"
    REWIND = "rewind"

@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-3
    """Peak learning rate."""

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, expected more than 0")

@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment."""
    optimizer: Optimizer = Optimizer()
    num_steps: int = 3
    """Updates."""
    semantics: Semantics = Semantics.KEEP

def get_config():
    return Config(num_steps=5)
'''
TEXT = (
    "Bread rises best in a warm corner of the kitchen. Call me later, said the baker to the guest. "
    * 30
)


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "made_up.py"
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture
def runner(monkeypatch):
    """Stands in for runs.execute and runs.load and writes down how they were called."""
    execute = types.ModuleType("rlbf_jax.runs.execute")
    load = types.ModuleType("rlbf_jax.runs.load")
    import rlbf_jax.runs

    calls = []
    execute.run = lambda *args: calls.append(("run", *args))
    load.open_run = lambda folder: calls.append(("open_run", folder)) or Opened(calls)
    for module in (execute, load):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(rlbf_jax.runs, module.__name__.split(".")[-1], module, raising=False)
    return types.SimpleNamespace(execute=execute, load=load, calls=calls)


class Opened:
    """Stands in for a run that was opened, and for an evaluator of its stages."""

    last_stage = "rlbf"
    suite = types.SimpleNamespace(n=5)

    def __init__(self, calls):
        self.calls = calls

    def evaluator(self, stage):
        self.calls.append(("evaluator", stage))
        return self

    def with_suite(self, **changes):
        self.calls.append(("with_suite", changes))
        return self

    def evaluate(self):
        self.calls.append(("evaluate",))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 320, ["privacy"], 4)


def test_run_applies_overrides(experiment, runner, tmp_path, capsys):
    args = [
        "run",
        str(experiment),
        "--workdir",
        str(tmp_path / "w"),
        "--optimizer.learning_rate",
        "0.5",
    ]
    args += ["--semantics", "rewind"]
    assert cli.main(args) == 0
    ((name, config, workdir),) = runner.calls
    assert (name, config.optimizer.learning_rate, config.num_steps, workdir) == (
        "run",
        0.5,
        5,
        tmp_path / "w",
    )
    assert config.semantics.value == "rewind"
    assert "report.html" in capsys.readouterr().out


def test_run_has_a_default_workdir(experiment, runner):
    assert cli.main(["run", str(experiment)]) == 0
    assert str(runner.calls[0][2]) == "runs/made_up"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--optimizer.learning_rat", "1"], "--optimizer.learning_rate"),
        (["--num_steps", "many"], "--num_steps"),
        (["--optimizer.learning_rate", "-1"], "expected more than 0"),
    ],
)
def test_wrong_overrides_are_refused(experiment, runner, capsys, more, words):
    assert words in one_line_error(["run", str(experiment), *more], capsys)
    assert not runner.calls


def test_run_help_lists_the_fields(experiment, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(experiment), "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for word in (
        "A made-up experiment.",
        "--workdir",
        "--num_steps",
        "Updates. (default: 5)",
        "Peak learning rate.",
    ):
        assert word in out


def one_line_error(argv, capsys):
    assert cli.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_users_mistakes_cost_one_line(experiment, runner, tmp_path, capsys):
    assert "no such file" in one_line_error(["run", str(tmp_path / "no.py")], capsys)
    assert "did you mean report" in one_line_error(["reprot"], capsys)
    assert "needs a command" in one_line_error([], capsys)
    assert "needs a FILE" in one_line_error(["run", "--workdir", "x"], capsys)
    assert "not a folder" in one_line_error(["report", str(tmp_path / "no")], capsys)
    for text, words in [
        ("x = 1", "defines no get_config"),
        ("def get_config(): return {}", "returned a dict"),
        ("def get_config(:", "line 1"),
        ("def get_config(): raise ValueError('too small')", "too small"),
    ]:
        experiment.write_text(text)
        assert words in one_line_error(["run", str(experiment)], capsys)
    assert not runner.calls


def test_errors_that_are_ours_keep_their_traceback(experiment, runner, monkeypatch):
    def broken(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(runner.execute, "run", broken)
    with pytest.raises(RuntimeError):
        cli.main(["run", str(experiment)])


def test_interruption_says_how_to_go_on(experiment, runner, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.execute, "run", interrupted)
    assert cli.main(["run", str(experiment), "--num_steps", "4"]) == 130
    assert f"rlbf run {experiment} --num_steps 4" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def loaded(runner, tokenizer, monkeypatch):
    """A model that writes something, takes back its last two ids and goes on."""
    rule = tokenizer.controls.rule()

    def sample(requests, seed):
        generations = []
        for request in requests:
            head, gone, tail = (
                tokenizer.encode(t) for t in ("Bread rises", " best", " in a warm corner")
            )
            gone = gone[-2:]
            directive = [rule.category_id("privacy"), rule.backtrack_id(len(gone))]
            trace = [*request.forced, *head, *gone, *directive, *tail, tokenizer.eos_id]
            visible = (*request.forced, *head, *tail)
            text = tokenizer.decode(visible)
            empty = np.zeros(0, np.int32)
            generations.append(
                Generation(
                    text, np.asarray(trace), (), np.zeros(len(trace), np.float32), visible, empty,
                    len(request.forced), True, 0, request,
                )
            )  # fmt: skip
        runner.calls.append(("sample", requests, seed))
        return generations

    def load(folder, stage):
        runner.calls.append(("load", folder, stage))
        return types.SimpleNamespace(sample=sample, tokenizer=tokenizer, rule=rule)

    runner.load.load = load
    return runner


def test_generate_in_a_pipe_prints_visible_text(loaded, tokenizer, capsys):
    args = [
        "generate",
        "w",
        "--prompt",
        "Hi?",
        "--prompt",
        "Ho?",
        "--n",
        "2",
        "--seed",
        "7",
        "--forced",
        "Well, ",
    ]
    assert cli.main([*args, "--temperature", "0", "--forbid_directives"]) == 0
    assert capsys.readouterr().out == "Well, Bread rises in a warm corner\n" * 4
    assert loaded.calls[0] == ("load", pathlib.Path("w"), "")
    _, requests, seed = loaded.calls[-1]
    assert [r.prompt for r in requests] == ["Hi?", "Hi?", "Ho?", "Ho?"] and seed == 7
    assert requests[0].forced == tuple(tokenizer.encode("Well, "))
    assert (requests[0].knobs.temperature, requests[0].knobs.forbid_from) == (0, 0)


def test_generate_takes_knobs_of_directives(loaded, capsys):
    args = ["generate", "w", "--prompt", "Hi?"]
    given = ["--budget", "1", "--control_bias", "categories", "2.5", "privacy", "-1"]
    assert cli.main([*args, *given]) == 0
    knobs = loaded.calls[-1][1][0].knobs
    assert knobs.budget == 1 and knobs.control_bias == {"categories": 2.5, "privacy": -1.0}
    capsys.readouterr()
    assert "--budget is -1" in one_line_error([*args, "--budget", "-1"], capsys)


def test_generate_json(loaded, capsys):
    assert cli.main(["generate", "w", "--prompt", "Hi?", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["visible"] == "Bread rises in a warm corner"
    assert [p["kind"] for p in row["trace"]] == [
        "content",
        "content",
        "category",
        "retraction",
        "content",
        "end",
    ]
    assert [p["erased"] for p in row["trace"]] == [False, True, False, False, False, False]


def test_generate_on_a_terminal_strikes_out(loaded, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert cli.main(["generate", "w", "--prompt", "[bold]Hi?"]) == 0
    shown = screen.getvalue()
    assert "\x1b[9;31m" in shown and "[CATEGORY_PRIVACY]" in shown and "[bold]Hi?" in shown


def test_generate_reads_prompts_from_standard_input(loaded, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\n\nTwo?\n"))
    assert cli.main(["generate", "w"]) == 0
    assert [r.prompt for r in loaded.calls[-1][1]] == ["One?", "Two?"]
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert "no prompt" in one_line_error(["generate", "w"], capsys)


def test_evaluate_and_report(runner, tmp_path):
    (tmp_path / "results.json").write_text("[]")
    asked = ["--stage", "sft", "--data", "test", "--n_prompts", "8"]
    assert cli.main(["evaluate", str(tmp_path), *asked]) == 0
    assert runner.calls == [
        ("open_run", tmp_path),
        ("evaluator", "sft"),
        ("with_suite", {"pool": "test", "n": 8}),
        ("evaluate",),
    ]
    assert (tmp_path / "report.html").is_file()
    (tmp_path / "report.html").unlink()
    assert cli.main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()


def test_without_a_stage_the_last_one_is_evaluated(runner, tmp_path):
    (tmp_path / "results.json").write_text("[]")
    assert cli.main(["evaluate", str(tmp_path)]) == 0
    assert runner.calls[1:3] == [
        ("evaluator", "rlbf"),
        ("with_suite", {"pool": "development", "n": 5}),
    ]


def test_generate_takes_the_stage_that_is_asked_for(loaded):
    assert cli.main(["generate", "w", "--stage", "sft", "--prompt", "Hi?"]) == 0
    assert loaded.calls[0] == ("load", pathlib.Path("w"), "sft")


@dataclasses.dataclass(frozen=True)
class Other(MethodConfig):
    """Another paper's settings."""

    name: ClassVar[str] = "other"
    paper: ClassVar[str] = "Other, arXiv 1"
    strength: float = 1.0


def test_an_option_of_another_paper_is_refused_by_name(runner, monkeypatch, capsys):
    monkeypatch.setitem(methods.METHODS, "other", Other)
    smoke = str(pathlib.Path(__file__).parent.parent / "experiments" / "smoke.py")
    said = one_line_error(["run", smoke, "--strength", "2"], capsys)
    assert "--strength: a setting of other (Other, arXiv 1), and" in said
    assert "runs rlbf (RLBF, arXiv 2602.08377)" in said
    assert "no such option" in one_line_error(["run", smoke, "--strengths", "2"], capsys)
    assert cli.main(["run", smoke, "--sft.steps", "2"]) == 0
    assert runner.calls[0][1].method.sft.steps == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (("--max_tokens", "9"), "--max_tokens is for --benchmark"),
        (("--judge", "run"), "--judge is for --benchmark"),
        (("--tradeoff", "--benchmark", "xstest=x.csv"), "several commands"),
    ],
)
def test_evaluate_refuses_what_it_would_ignore(runner, tmp_path, capsys, options, message):
    assert message in one_line_error(["evaluate", str(tmp_path), *options], capsys)
    assert runner.calls == []


def test_a_tokenizer_has_control_ids_of_the_rules_that_are_named(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["data", "tokenizer", str(tmp_path / "text.txt"), "--vocab_size", "320"]
    for rules, kinds in (("replace, reset", ("replace", "reset")), (None, ("backtrack", "reset"))):
        given = ["--rules", rules] if rules else []
        assert cli.main([*words, *given, "--out", str(tmp_path / "made")]) == 0
        assert load_tokenizer(tmp_path / "made").controls.kinds == kinds
    capsys.readouterr()
    assert "kinds are" in one_line_error([*words, "--out", "x", "--rules", "erase"], capsys)


def test_data_tokenizer_and_build(tmp_path, capsys):
    file, words = tmp_path / "rows.csv", TEXT.split()
    lines = ["prompt,response"]
    for i in range(60):
        answer = (
            " ".join(words[i : i + 14]).replace(",", "")
            + ". It takes an hour or two to do all of this well."
        )
        lines.append(f"What about loaf number {i}?,{answer}")
    file.write_text("\n".join(lines))
    folder = str(tmp_path / "tokenizer")
    args = ["data", "tokenizer", str(file), "--out", folder, "--vocab_size", "400", "--x_max", "64"]
    assert cli.main(args) == 0 and "69 of them control ids" in capsys.readouterr().out
    build = [
        "data",
        "build",
        str(file),
        "--tokenizer",
        folder,
        "--out",
        str(tmp_path / "set"),
        "--num_examples",
        "12",
    ]
    assert cli.main([*build, "--bsafe.max_tokens", "256"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (
        sum(n for kind, n in first["made"].items() if kind.split()[0] in ("plain", "plain_harmful"))
        > 0
    )
    assert cli.main([*build, "--bsafe.max_tokens", "256"]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == first["sha256"]
    assert "100000" in one_line_error([*args[:6], "100000"], capsys)
    file.write_text("a,b\n1,2\n")
    assert "rows.csv" in one_line_error(build, capsys)


def test_error_messages_fit_one_line(monkeypatch, capsys):
    def broken(argv):
        raise UserError("first\nsecond")

    monkeypatch.setitem(cli.COMMANDS, "report", broken)
    assert one_line_error(["report"], capsys) == "error: first second"


def test_help_loads_nothing_heavy():
    heavy = "{'jax', 'numpy', 'matplotlib'}"
    code = (
        f"import sys; from rlbf_jax.cli import main; main.main(['--help']); print(sorted({heavy} "
        "& set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines()[-1] == "[]"
    for command in ("run", "generate", "evaluate", "report", "data"):
        assert f"  {command} " in out
