"""Every family goes through the whole recipe: pretraining, BSAFE+ SFT, reinforcement, evaluation,
report."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest

from rlbf_jax.cli import main as cli
from rlbf_jax.models.families import FAMILIES
from rlbf_jax.runs import execute as runner
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.scoring import pack_traces, score
from tests.sampling.test_law import compare

SMOKE = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "smoke.py"
WINDOWS = {"gemma2": ("6", "None"), "gemma3": ("6", "None"), "mistral": ("6",)}
"""Far shorter than a row, in two layers."""
STAGES = ("base", "sft", "rlbf")
PROMPTS = ["What is the moon?", "Tell me about bread.", "Please show me a forbidden brew.", "Hi"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_by_the_whole_recipe(family, tmp_path):
    windows = WINDOWS.get(family, ())
    argv = [
        "run",
        str(SMOKE),
        "--workdir",
        str(tmp_path),
        "--no-baselines",
        "--model.family",
        family,
    ]
    argv += ["--evaluation.n", "2", *(["--model.windows", *windows] if windows else [])]
    assert cli.main(argv) == 0
    records = json.loads((tmp_path / "results.json").read_text())
    assert {record["stage"] for record in records} >= set(STAGES)
    assert (tmp_path / "report.md").is_file()
    for stage in STAGES:
        lines = [
            json.loads(line)
            for line in (tmp_path / "stages" / stage / "metrics.jsonl").read_text().splitlines()
        ]
        numbers = [value for line in lines for value in line.values() if isinstance(value, float)]
        assert numbers and np.isfinite(numbers).all()
    work, loaded = runner.open_run(tmp_path), runner.load(tmp_path, "rlbf")
    assert work.model.family == family
    assert any(work.model.window_of_layer) == bool(windows)
    before, after = jax.tree.leaves(work.params("sft")), jax.tree.leaves(loaded.params)
    assert all((np.asarray(a) != np.asarray(b)).any() for a, b in zip(before, after, strict=True))
    # The law of the sampler on what was trained, on rows that cross windows.
    knobs = Knobs(max_tokens=60, budget=6, control_bias={"categories": 5.0})
    done = loaded.sample([Request(PROMPTS[i % 4], (), knobs) for i in range(16)])
    traces = pack_traces(done, loaded.sampler.rule, 128)
    read = jax.jit(
        lambda p, t: score(work.model, p, loaded.sampler.rule, t, work.config.semantics).logprobs
    )
    worst, directives = compare(done, np.asarray(read(loaded.params, traces)))
    assert directives >= 20 and worst < 1e-4, (directives, worst)
