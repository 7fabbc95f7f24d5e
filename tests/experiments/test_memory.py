"""The planned memory of phases: what is known exactly must come out exactly."""

from __future__ import annotations

import dataclasses
import math

import jax

from experiments.benchmarks import memory
from rlbf_jax.directives import Semantics
from rlbf_jax.models.config import ModelConfig

MODEL = ModelConfig(vocab_size=64, num_layers=1, width=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_width=16)


def test_bytes_of_arguments_and_outputs():
    setting = memory.Setting(MODEL, Semantics.KEEP, batch=4, length=8, drawn=4, accumulate=2)
    params = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(setting.params))
    row = memory.planned("sft_update", setting)
    # Parameters and two moments, three counters; two arrays of ids and two of flags.
    assert 0 <= row["arguments"] - (3 * params + 4 * 8 * (4 + 4 + 1 + 1)) < 64
    assert row["reused"] >= 3 * params and row["temporaries"] > 0
    assert row["total"] == row["arguments"] + row["temporaries"] + row["outputs"] - row["reused"]
    assert memory.planned("score", setting)["outputs"] - 2 * 4 * 8 * 4 in range(64)


def test_every_phase_is_lowered():
    model = dataclasses.replace(MODEL, scan_layers=True)
    setting = memory.Setting(model, Semantics.REWIND, batch=4, length=8, drawn=4, accumulate=2)
    for lower in memory.PHASES.values():
        assert "stablehlo" in lower(setting).as_text()[:2000]
