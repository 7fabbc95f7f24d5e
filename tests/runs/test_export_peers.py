"""Exported runs in `transformers`: logits, tokenizer and edited answers are ours. Needs a python
that has torch."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.smoke import get_config as smoke
from rlbf_jax.cli import main as cli
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.export.recipe import read_recipe
from rlbf_jax.runs.load import load, open_run
from rlbf_jax.sampling.request import Knobs, Request
from tests.runs.opened import do, keep
from tests.runs.published_checkpoint import make_checkpoint
from tests.runs.test_start import tiny

pytestmark = pytest.mark.slow
CHILD = pathlib.Path(__file__).with_name("export_child.py")
PROMPTS = ["What is the moon?", "Tell me about [RESET] and 7 birds.", "é 字  two spaces\nand lines"]
CONTROLS = [
    "[BACKTRACK_BY_3]",
    " [BACKTRACK_BY_3] [CATEGORY_insult]",
    " [RESET]",
    "[CATEGORY_1][RESET]",
    "\u2581[RESET]",
]
HARMLESS = ["The moon is far.", " a\u2581b\t\n", "éÅ字😀"]
MAX_TOKENS = 40


def make_run(folder: pathlib.Path, start_from: str) -> pathlib.Path:
    """A run whose stage `sft` is done, with random weights; exported."""
    data = dataclasses.replace(smoke().data, pretraining_examples=200)
    e = tiny(start_from, data=data, pretraining=smoke().base.pretraining)
    if start_from:
        do(e, folder / "run", "tokenizer")
        run = do(e, folder / "run", "base")
        params = run.model_of("base")[1]
    else:
        run = do(e, folder / "run", "tokenizer")
        params = jax.tree.map(lambda x: 2 * x, run.initial_params())
    keep(run, "sft", params)
    assert (
        cli.main(["export", str(folder / "run" / "stages" / "sft"), str(folder / "exported")]) == 0
    )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("runs")
    made = {"own": make_run(root / "own", "")}
    for family, model in dict(
        llama={}, gpt2=dict(num_kv_heads=2, tied_embeddings=True, max_positions=256)
    ).items():
        made[family] = make_run(
            root / family, str(make_checkpoint(root / "published" / family, family, **model))
        )
    return made


def logits_of(model, params: dict, ids: list[int]) -> np.ndarray:
    """[len(ids), V]."""
    hidden, _ = transformer.forward(
        model, params, jnp.asarray([ids]), Visibility(jnp.arange(len(ids))[None])
    )
    return np.asarray(transformer.unembed(model, params, hidden)[0])


def telling_bias(folder: pathlib.Path) -> float:
    """How much categories must gain for a random model to begin a directive now and then, not at
    once."""
    loaded, model = load(folder / "run", "sft"), open_run(folder / "run").run.model
    rule, gaps = loaded.tokenizer.controls.rule(), []
    plain = Knobs(temperature=0, max_tokens=MAX_TOKENS, budget=0)
    for answer in loaded.sample([Request(text, (), plain) for text in PROMPTS]):
        logits = logits_of(
            model, loaded.params, [*answer.prompt_ids.tolist(), *answer.trace.tolist()]
        )
        ours = logits[len(answer.prompt_ids) + 4 :]
        gaps += (
            ours.max(-1) - ours[:, rule.first_id : rule.first_id + len(rule.categories)].max(-1)
        ).tolist()
    return float(np.quantile(gaps, 0.2))


@pytest.fixture(scope="module")
def found(folders, tmp_path_factory) -> dict[str, dict]:
    python = os.environ.get("RLBF_JAX_PEERS")
    if not python:
        pytest.skip(
            "RLBF_JAX_PEERS is not set: point it at a python that has torch and transformers"
        )
    work, cases = tmp_path_factory.mktemp("child"), []
    for folder in folders.values():
        rule = open_run(folder / "run").run.tokenizer.controls.rule()
        eager = list(range(rule.first_id, rule.first_id + len(rule.categories)))
        cases.append(
            dict(folder=str(folder / "exported"), prompts=PROMPTS, texts=HARMLESS + CONTROLS,
                 eager=eager, bias=telling_bias(folder), max_tokens=MAX_TOKENS)
        )  # fmt: skip
    (work / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    # The modules' cache must be fresh, and the child must not see this package.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {
        "HF_HOME": str(work / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [python, str(CHILD), str(work / "cases.json"), str(work / "found.json")]
    done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((work / "found.json").read_text())
    return {name: case | result for name, case, result in zip(folders, cases, results, strict=True)}


@pytest.mark.parametrize("name", ["own", "llama", "gpt2"])
def test_transformers_has_the_run(folders, found, name):
    loaded, theirs = load(folders[name] / "run", "sft"), found[name]
    tokenizer, model = loaded.tokenizer, open_run(folders[name] / "run").run.model
    assert theirs["kind"] == ("GPT2LMHeadModel" if name == "gpt2" else "LlamaForCausalLM")
    assert theirs["ids"] == [tokenizer.encode_prompt(text) for text in PROMPTS]
    assert theirs["text_ids"] == [tokenizer.encode(text) for text in HARMLESS + CONTROLS]
    assert theirs["ends"] == list(tokenizer.eos_ids)
    assert theirs["special"][0] == tokenizer.bos_id and theirs["special"][2] == tokenizer.pad_id
    assert theirs["inputs"] == ["attention_mask", "input_ids"]
    length, finished = theirs["unlimited"]
    assert finished or length == read_recipe(folders[name] / "exported").limits.max_emitted
    difference, largest = 0.0, 0.0
    for ids, logits in zip(theirs["ids"], theirs["logits"], strict=True):
        ours = logits_of(model, loaded.params, ids)
        difference = max(difference, float(np.abs(ours - np.asarray(logits)).max()))
        largest = max(largest, float(np.abs(ours).max()))
    assert difference < 1e-5 * max(1.0, largest), (difference, largest)
    knobs = Knobs(temperature=0, max_tokens=MAX_TOKENS, control_bias={"categories": theirs["bias"]})
    answers = loaded.sample([Request(text, (), knobs) for text in PROMPTS])
    assert [list(answer.visible) for answer in answers] == theirs["visible"]
    # In a run of byte ids that is not UTF-8 the library writes U+FFFD for every byte, Python only
    # for the broken ones.
    whole = [(answer.text, text) for answer, text in zip(answers, theirs["answers"], strict=True)]
    whole = [(ours, text) for ours, text in whole if "\ufffd" not in ours]
    assert [ours for ours, _ in whole] == [text for _, text in whole]
    assert sum(bool(edit.removed) for answer in answers for edit in answer.edits) > 2
