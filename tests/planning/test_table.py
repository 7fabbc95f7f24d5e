"""Meshes and batch sizes that are tried."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest

from rlbf_jax.models.presets import PRESETS
from rlbf_jax.parallel.mesh import MeshConfig
from rlbf_jax.planning import table
from rlbf_jax.planning.forecast import Forecast
from rlbf_jax.planning.topology import Topology
from tests.small_run import get_config


def test_meshes_use_all_chips_and_divide_key_heads():
    model = PRESETS["gemma2_9b"]
    found = table.meshes(256, model)
    assert found[0] == MeshConfig(1, 256, 1)
    assert len(found) == len({dataclasses.astuple(m) for m in found})
    for mesh in found:
        assert math.prod(dataclasses.astuple(mesh)) == 256
        assert model.num_kv_heads % mesh.tensor == 0 and mesh.tensor <= table.MOST_TENSOR
    assert MeshConfig(256, 1, 1) not in found and MeshConfig(4, 16, 4) in found
    # 3 key heads allow a tensor axis of 1 and 3, of which 8 chips have 1.
    assert {m.tensor for m in table.meshes(8, get_config().base.model)} <= {1, 2}


def test_rows_are_scaled_everywhere():
    e = get_config()
    twice = table.scaled(e, 2)
    assert twice.method.sft.batch_size == 2 * e.method.sft.batch_size
    old, new = e.method.reinforcement, twice.method.reinforcement
    assert new.prompts_per_step == 2 * old.prompts_per_step and new.group_size == old.group_size
    assert new.guidance_batch_size == 2 * old.guidance_batch_size
    assert twice.sampling_batch == 2 * e.sampling_batch
    assert twice.base.pretraining.batch_size == 2 * e.base.pretraining.batch_size
    assert table.scaled(e, 1) == e


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """Programs that were asked about; each needs a byte more than the one before."""
    asked: list[str] = []

    def forecast(phase, chip):
        asked.append(phase.title)
        needed = len(asked)
        return Forecast(
            phase.name, phase.stages, phase.about, 1, 10, None, needed, 0, 0, {}, None,
            {"compute": 1.0}, needed < 4, 0.0,
        )  # fmt: skip

    monkeypatch.setattr(table, "forecast", forecast)
    return asked


HERE = Topology("here", "cpu", tuple(jax.devices()[:1]), None)
ONE = MeshConfig(1, 1, 1)


def test_a_row_ends_with_what_does_not_fit(counted):
    heard: list[str] = []
    (row,) = table.rows(get_config(), HERE, table.Choice([ONE], [1.0]), heard.append)
    assert len(row.forecasts) == 4 and row.fits is False and row.needed == 4
    assert heard[0] == "data=1,fsdp=1,tensor=1, rows x 1: base/sft update"
    assert row.worst is row.forecasts[3] and row.plain()["mesh"] == dataclasses.asdict(ONE)


def test_only_what_is_wanted_is_compiled(counted):
    choice = table.Choice([ONE], [1.0], ["decode"])
    (row,) = table.rows(get_config(), HERE, choice, lambda text: None)
    assert [f.phase for f in row.forecasts] == ["decode"] and row.fits


def test_meshes_that_cannot_be_and_time_that_is_over_are_told(counted):
    choice = table.Choice([MeshConfig(1, 2, 1)], [1.0])
    (row,) = table.rows(get_config(), HERE, choice, lambda text: None)
    assert row.fits is False and "does not fit 1 devices" in row.refused and not counted
    late = table.Choice([ONE], [1.0], seconds=-1)
    (row,) = table.rows(get_config(), HERE, late, lambda text: None)
    assert "out of time" in row.refused and not counted
