"""A published checkpoint through the whole program: import, a run that starts from it, export, and
back."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.smoke import get_config as smoke
from rlbf_jax.cli import main as cli
from rlbf_jax.critics.judges.record_judge import RecordJudge
from rlbf_jax.data.worlds.toy_world import ToyWorld, ToyWorldConfig
from rlbf_jax.directives import Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.export.recipe import read_recipe
from rlbf_jax.models.families import styled
from rlbf_jax.models.published_config import config_to_hf
from rlbf_jax.models.weights.read import read_checkpoint
from rlbf_jax.runs import execute as runner
from rlbf_jax.runs import start
from rlbf_jax.runs.load import open_run
from rlbf_jax.tokenizers import import_tokenizer, load_tokenizer
from rlbf_jax.training.model_folder import load_model
from rlbf_jax.training.policy import PolicyConfig
from tests.runs.opened import do, keep, run_of
from tests.runs.published_checkpoint import SPARE, make_checkpoint
from tests.runs.test_own_data import THINGS

CATEGORIES = ToyWorld(ToyWorldConfig()).categories
X_MAX = 40


def tiny(start_from, **changes):
    """The smoke run, smaller still, from a checkpoint."""
    e = smoke()
    supervised = dataclasses.replace(e.method.sft, steps=2)
    policy = PolicyConfig(algorithm="grpo")
    e = e.replace(
        start_from=str(start_from),
        semantics=Semantics.KEEP,
        pretraining=dataclasses.replace(e.base.pretraining, batch_size=10**6),
        refusal_sft=supervised,
        sft=supervised,
        reinforcement=dataclasses.replace(
            e.method.reinforcement, steps=1, updates_per_step=1, policy=policy
        ),
        evaluation=dataclasses.replace(e.evaluation, n=2, attacks=("direct",)),
        perplexity_examples=4,
        baselines=False,
        max_prompt=40,
    )
    return e.replace(**changes)


def started(config, folder):
    """A run whose tokenizer is made."""
    return do(config, folder, "tokenizer")


def start_params(config, folder):
    """Parameters that the run takes from its checkpoint, where its tokenizer is made."""
    run = run_of(config, folder)
    base, noted = config.base, run.noted_data("start_from")
    return start.params_of(base.start_from, base.model, run.tokenizer, config.seed, run.mesh, noted)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture(scope="module")
def imported(published):
    out = published.parent / "imported"
    assert (
        cli.main(
            [
                "import",
                str(published),
                str(out),
                "--categories",
                ",".join(CATEGORIES),
                "--x_max",
                "40",
            ]
        )
        == 0
    )
    return out


def test_an_import_has_control_ids_of_the_rules_that_are_named(published, tmp_path):
    words = ["import", str(published), str(tmp_path / "in"), "--categories", "one,two"]
    assert cli.main([*words, "--rules", "replace"]) == 0
    controls = load_tokenizer(tmp_path / "in").controls
    assert controls.kinds == ("replace",) and len(controls.ids) == 3


EXPERIMENT = """
from rlbf_jax.data.builders.bsafe_plus import BsafePlusConfig
from tests.runs.test_start import tiny

def get_config():
    return tiny("", sft_examples=40, refusal_examples=4, bsafe_plus=BsafePlusConfig())
"""


@pytest.fixture(scope="module")
def asked(published):
    """The arguments of a run on rows of one's own from a copy of the checkpoint, and its folder."""
    folder = published.parent / "own"
    folder.mkdir()
    (folder / "mine.py").write_text(EXPERIMENT)
    lines = [
        f"What is a {thing}?,A {thing} is old. It is big. It is a good place to be. Many like it."
        for thing in THINGS
    ]
    (folder / "rows.csv").write_text("\n".join(["question,answer", *lines]))
    shutil.copytree(published, folder / "model")
    argv = [
        "run",
        folder / "mine.py",
        "--workdir",
        folder / "run",
        "--start_from",
        folder / "model",
    ]
    argv += [
        "--data.path",
        folder / "rows.csv",
        "--semantics",
        "keep",
        "--evaluation.middle.long_words",
        "7",
    ]
    return [str(a) for a in argv], folder


@pytest.fixture(scope="module")
def finished(asked):
    """A finished run on rows of one's own whose checkpoint's folder is gone."""
    argv, folder = asked
    assert cli.main(argv) == 0
    shutil.rmtree(folder / "model")
    return folder / "run"


def command(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out.strip(), out.err.strip()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            "--max_prompt 15",
            r"rows.csv: the prompt of row-\d+ may take \d+ ids, .* set --max_prompt \d+, or leave",
        ),
        (
            "--rollout_tokens 30",
            r"rollouts: .*max_tokens .* 30.*raise knobs.max_tokens to \d+ .* is --rollout_tokens",
        ),
        (
            "--evaluation.attacks middle_filling --evaluation.knobs.max_tokens 20",
            r"evaluation: .* raise knobs.max_tokens to \d+ or more.* "
            r"as --evaluation.knobs.max_tokens",
        ),
        (
            "--evaluation.middle.long_words 40",
            "no train answer of at least 40 words .*lower middle.long_words",
        ),
        ("--bsafe_plus.max_tokens 25", "longer than max_tokens.*raise max_tokens"),
        ("--chat_template tools", "no chat template is called 'tools'; found default"),
    ],
)
def test_settings_that_are_too_small_are_told_with_what_suffices(
    options, told, published, asked, tmp_path, capsys
):
    argv = [str(published) if a.endswith("/model") else a for a in asked[0]]
    argv[argv.index("--workdir") + 1] = str(tmp_path / "run")
    code, _, error = command(capsys, *argv, *options.split())
    # Data are made first, and say so.
    (line,) = [line for line in error.splitlines() if not re.match(r"\[\d/\d\] \w+: ", line)]
    assert code == 2 and line.startswith("error: ") and re.search(told, line), error
    assert not (tmp_path / "run" / "stages").exists()


def test_import_adds_control_tokens_and_their_rows(published, imported):
    tokenizer = load_tokenizer(imported)
    old, before = read_checkpoint(published)
    config, params = read_checkpoint(imported)
    assert (
        tokenizer.controls.rule().categories == tuple(CATEGORIES)
        and tokenizer.controls.rule().x_max == X_MAX
    )
    assert config == dataclasses.replace(old, vocab_size=tokenizer.vocab_size)
    assert config.vocab_size == old.vocab_size + len(tokenizer.new_ids)
    real = old.vocab_size - SPARE
    for name in ("embedding", "unembedding"):
        table = np.asarray(params[name])
        np.testing.assert_array_equal(table[: old.vocab_size], before[name])
        rows = table[list(tokenizer.new_ids)]
        trained = np.asarray(before[name])[:real]
        assert np.abs(rows.mean(0) - trained.mean(0)).max() < 0.1 * trained.std()
        assert 0.05 < rows.std(0).mean() / trained.std(0).mean() < 0.15
    assert len(np.unique(params["embedding"][old.vocab_size :], axis=0)) == len(tokenizer.new_ids)
    rest = {k: v for k, v in params.items() if "embedding" not in k}
    jax.tree.map(
        np.testing.assert_array_equal,
        rest,
        {k: v for k, v in before.items() if "embedding" not in k},
    )
    generation = json.loads((imported / "generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == set(tokenizer.eos_ids) and len(tokenizer.eos_ids) == 2
    assert generation["temperature"] == 0.6
    assert json.loads((imported / "config.json").read_text())["eos_token_id"] == tokenizer.eos_id


def test_a_run_starts_from_the_folder_and_outlives_it(imported, finished, capsys):
    """On rows of one's own; the run has the tokenizer and parameters that `rlbf import` would have
    made."""
    opened = open_run(finished)
    work = opened.run
    assert work.tokenizer.digest() == load_tokenizer(imported).digest()
    _, params = read_checkpoint(imported)
    jax.tree.map(np.testing.assert_array_equal, opened.policy("base").params, params)
    assert work.model == read_checkpoint(imported)[0]
    assert not (finished / "data" / "pretraining").exists()
    assert opened.policy("rlbf").semantics is Semantics.KEEP
    assert isinstance(opened.evaluator("rlbf").judge, RecordJudge)
    assert work.world.prompts("train")[0].text.startswith("What is a")
    rows = [
        json.loads(line)
        for line in (finished / "evaluation" / "rlbf.jsonl").read_text().splitlines()
    ]
    assert rows and all(row["prompt"].startswith("What is a") for row in rows)
    records = json.loads((finished / "results.json").read_text())
    assert {record["stage"] for record in records} == {"base", "sft", "rlbf"}
    code, out, _ = command(
        capsys, "generate", finished, "--prompt", "Hello.", "--max_tokens", "5", "--json"
    )
    assert code == 0 and json.loads(out)["prompt"] == "Hello."
    assert command(capsys, "report", finished)[0] == 0
    assert "A published checkpoint" in (finished / "report.md").read_text()


def test_a_run_starts_from_what_was_imported(imported, finished, tmp_path):
    """With its control tokens as they are."""
    config = tiny(imported)
    work = started(config, tmp_path)
    assert work.tokenizer.digest() == load_tokenizer(imported).digest()
    params = open_run(finished).policy("base").params
    jax.tree.map(np.testing.assert_array_equal, start_params(config, tmp_path), params)


def test_export_is_the_run(finished, tmp_path, capsys):
    code, out, _ = command(
        capsys, "export", finished / "stages" / "rlbf", tmp_path / "out", "--max_tokens", "300"
    )
    assert (
        code == 0
        and "at most 300 ids (--max_tokens; the run was evaluated on at most 88) and 4 directives"
        in out
    )
    opened = open_run(finished)
    work, budget = opened.run, opened.experiment.evaluation.knobs.budget
    config, params = read_checkpoint(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, params, opened.policy("rlbf").params)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.digest() == work.tokenizer.digest()
    recipe = read_recipe(tmp_path / "out")
    assert (
        recipe.rule == work.tokenizer.controls.rule() and recipe.eos_ids == work.tokenizer.eos_ids
    )
    assert (recipe.limits.max_emitted, recipe.limits.budget) == (300, budget)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["bos_token_id"] == tokenizer.bos_id and told["pad_token_id"] == tokenizer.pad_id
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (
        generation["eos_token_id"] == list(tokenizer.eos_ids) and generation["temperature"] == 0.6
    )
    # The exported folder imports and exports as it is, recipe included.
    assert command(capsys, "import", tmp_path / "out", tmp_path / "again")[0] == 0
    files = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(files) == 12
    note = json.loads((tmp_path / "out" / "rlbf_policy.json").read_text())
    assert note == {"rule": "backtrack", "semantics": "keep"}
    assert all(
        (tmp_path / "again" / f).read_bytes() == (tmp_path / "out" / f).read_bytes() for f in files
    )


def test_a_run_adds_control_tokens_itself(published, tmp_path):
    """From the raw folder; scanned layers; one seed gives the same rows, another one others."""
    config = tiny(published, model=dataclasses.replace(smoke().base.model, scan_layers=True))
    work = started(config, tmp_path)
    assert work.tokenizer.digest() == import_tokenizer(
        published, CATEGORIES, X_MAX, 1 + max(work.tokenizer.new_ids) - len(work.tokenizer.new_ids)
    ).digest()  # fmt: skip
    params = start_params(config, tmp_path)
    shapes = jax.eval_shape(work.initial_params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    jax.tree.map(np.testing.assert_array_equal, params, start_params(config, tmp_path))
    other = start_params(config.replace(seed=1), tmp_path)
    new = np.asarray(work.tokenizer.new_ids)
    assert not np.array_equal(params["embedding"][new], other["embedding"][new])
    np.testing.assert_array_equal(params["embedding"][: new[0]], other["embedding"][: new[0]])


def test_a_folder_that_changes_or_goes_is_told(published, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(published, folder)
    config, run = tiny(folder), tmp_path / "run"
    started(config, run)
    (folder / "notes.txt").write_text("of no weight")
    start_params(config, run)
    weights = folder / "model.safetensors"
    published_bytes = weights.read_bytes()
    weights.write_bytes(
        published_bytes[:-1] + bytes([published_bytes[-1] ^ 1])
    )  # other numbers, the same size
    with pytest.raises(
        UserError, match="is not what it was when this run's data was made.*put the checkpoint back"
    ):
        start_params(config, run)
    weights.write_bytes(published_bytes)
    start_params(config, run)
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"more")
    with pytest.raises(
        UserError, match="is not what it was when this run's data was made.*put the checkpoint back"
    ):
        start_params(config, run)
    shutil.rmtree(folder)
    with pytest.raises(
        UserError,
        match="start_from: .*model holds no config.json; expected a GGUF file, or a checkpoint",
    ):
        start_params(config, run)
    with pytest.raises(UserError, match="start_from: .*nowhere holds no config.json"):
        runner.run(tiny(tmp_path / "nowhere"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_large_weight_files_are_known_by_pieces(published, tmp_path, monkeypatch):
    """The header, the first and the last numbers and pieces between them; a megabyte a file and no
    more."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(published / "config.json", folder / "config.json")
    monkeypatch.setattr(start, "PIECE", 4)
    content = bytearray(range(1, 251)) * 4
    content[:8] = (92).to_bytes(8, "little")  # a header of 92 bytes, so numbers from 100 on

    def digest_with(at: int | None = None, extra: bytes = b"") -> str:
        changed = bytearray(content)
        if at is not None:
            changed[at] ^= 255
        (folder / "model.safetensors").write_bytes(bytes(changed) + extra)
        return start.digest(folder)

    whole = digest_with()
    noticed = [at for at in range(8, 1000) if digest_with(at) != whole]
    assert noticed[:96] == list(range(8, 104)) and noticed[-4:] == list(range(996, 1000))
    assert (
        len(noticed) == 92 + 16 * 4 and digest_with(extra=b"x") != whole and digest_with() == whole
    )


def test_other_control_tokens_are_told(imported, tmp_path):
    config = tiny(imported, data=dataclasses.replace(smoke().data, x_max=12))
    with pytest.raises(
        UserError, match=rf"x_max {X_MAX} \(.*\), expected .* and x_max 12 \(.*\); set --data.x_max"
    ):
        started(config, tmp_path)


def test_another_chat_template_is_told(imported):
    with pytest.raises(
        UserError,
        match="with the chat template 'default', --chat_template is 'tools'; import the orig",
    ):
        start.find_tokenizer(imported, start.Wanted(CATEGORIES, X_MAX, chat_template="tools"))
    with pytest.raises(ValueError, match="chat_template is 'tools', but start_from is empty"):
        tiny("", chat_template="tools")


def test_learned_positions_are_those_of_the_checkpoint(tmp_path):
    hf = config_to_hf(styled(ModelConfig(family="gpt2", max_positions=100)))
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(UserError, match="data.row_length: 128 ids; the model has 100 positions"):
        runner.run(tiny(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_toy_run_is_exported_as_a_llama(tmp_path, capsys):
    """Its own vocabulary and two tables in place of one; nothing of the answers changes."""
    data = dataclasses.replace(smoke().data, vocab_size=400, pretraining_examples=100)
    pretraining = smoke().base.pretraining
    config = tiny("", data=data, pretraining=pretraining, semantics=Semantics.REWIND)
    workdir = tmp_path / "run"
    work = started(config, workdir)
    keep(work, "sft", work.initial_params())
    code, out, _ = command(capsys, "export", workdir / "stages" / "sft", tmp_path / "out")
    assert (
        code == 0
        and "llama, " in out
        and "no recipe for transformers and vLLM: this run's semantics is rewind" in out
    )
    assert not (tmp_path / "out" / "custom_generate").exists()
    tokenizer = load_tokenizer(tmp_path / "out")
    assert (
        tokenizer.controls.rule() == work.tokenizer.controls.rule()
        and tokenizer.vocab_size == work.tokenizer.vocab_size
    )
    assert (tokenizer.eos_ids, tokenizer.pad_id, tokenizer.bos_id) == ((2,), 0, 1)

    def logits(model, params):
        ids = jnp.asarray([work.tokenizer.encode_prompt("What is the moon?")])
        hidden, _ = transformer.forward(
            model, params, ids, Visibility(jnp.arange(ids.shape[1])[None])
        )
        return transformer.unembed(model, params, hidden)

    ours, theirs = (
        logits(*load_model(workdir / "stages" / "sft")),
        logits(*load_model(tmp_path / "out")),
    )
    np.testing.assert_array_equal(ours, theirs)
    # What was exported can be started from again.
    again = started(tiny(tmp_path / "out"), tmp_path / "next")
    assert again.model.vocab_size == tokenizer.vocab_size
