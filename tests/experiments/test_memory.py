"""The planned memory of phases: what is known exactly must come out exactly."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from experiments.benchmarks import memory
from rlbf_jax.directives import Semantics
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.parallel.axes import AXES
from rlbf_jax.parallel.mesh import make_mesh

MODEL = ModelConfig(
    vocab_size=64, num_layers=1, width=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_width=16
)


def test_bytes_of_arguments_and_outputs():
    setting = memory.Setting(MODEL, Semantics.KEEP, batch=4, length=8, drawn=4, accumulate=2)
    params = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(setting.params))
    row = memory.planned("sft_update", setting)
    # Parameters and two moments, three counters; two arrays of ids and two of flags.
    assert 0 <= row["arguments"] - (3 * params + 4 * 8 * (4 + 4 + 1 + 1)) < 64
    assert row["reused"] >= 3 * params and row["temporaries"] > 0
    assert row["total"] == row["arguments"] + row["temporaries"] + row["outputs"] - row["reused"]
    assert memory.planned("score", setting)["outputs"] - 2 * 4 * 8 * 4 in range(64)


@pytest.mark.parametrize("placed", [False, True])
def test_every_phase_is_lowered(placed):
    """With shapes alone, and with places on a mesh, as for a topology."""
    model = dataclasses.replace(MODEL, scan_layers=True)
    mesh = make_mesh(devices=jax.devices()[:1]) if placed else None
    setting = memory.Setting(
        model, Semantics.REWIND, batch=4, length=8, drawn=4, accumulate=2, mesh=mesh
    )
    for lower in memory.PHASES.values():
        text = lower(setting).as_text()
        assert "stablehlo" in text[:2000] and (not placed or "sdy.sharding" in text)


def test_rows_and_parameters_have_places_of_their_own():
    mesh = AbstractMesh((1, 1, 2, 2), AXES)
    model = dataclasses.replace(MODEL, num_heads=2, num_kv_heads=2)
    setting = memory.Setting(
        model, Semantics.KEEP, batch=4, length=8, drawn=4, accumulate=1, mesh=mesh
    )
    params = memory.placed(setting, setting.params)
    assert params["embedding"].sharding.spec == PartitionSpec(("tensor", "fsdp"), None)
    assert params["blocks_0"]["layers_0"]["qkv"].sharding.spec == PartitionSpec(
        "fsdp", "tensor", None, None
    )
    rows = memory.placed(setting, memory.rows_of(setting), rows=True)
    assert {x.sharding.spec for x in rows} == {PartitionSpec(("slice", "data", "fsdp"))}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--tensor 2", "the devices of a --topology, and none is given"),
        ("--topology v5p:2x2x1 --batch 6 --fsdp 4", "--batch 6 does not divide over 4 devices"),
    ],
)
def test_options_that_do_not_fit_are_told(options, told, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["memory.py", *options.split()])
    with pytest.raises(SystemExit):
        memory.parse()
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_a_tpu_compiler_plans_one_device(run_in_child):
    """Without a TPU. Arguments are those of any compiler, up to the padding of small arrays."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install 'jax[tpu]'")
    script = str(pathlib.Path(memory.__file__).resolve())
    options = (
        "--topology v5p:2x2x1 --tensor 2 --batch 4 --length 128 --phases sft_update score --json"
    ).split()
    rows = [json.loads(line) for line in run_in_child(script, *options, devices=1).splitlines()]
    assert [row["name"] for row in rows] == ["sft_update", "score"] and rows[0][
        "backend"
    ] == "tpu compiler"
    assert all(row["temporaries"] > 0 and row["arguments"] > 1e6 for row in rows)
