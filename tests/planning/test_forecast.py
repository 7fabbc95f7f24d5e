"""Forecasts against what is known by formula."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest

from rlbf_jax.methods.reset import ResetConfig
from rlbf_jax.parallel.compiled import Collective
from rlbf_jax.parallel.hlo import Shape
from rlbf_jax.parallel.mesh import make_mesh
from rlbf_jax.planning import forecast as planning
from rlbf_jax.planning import shapes
from rlbf_jax.planning.chips import CHIPS, Chip
from rlbf_jax.planning.phases import Phase, phases
from tests.small_run import get_config

TINY = Chip("tiny", peak=1e9, memory=1e12, bandwidth=1e9, exchange=1e9)


def small_phase(scan: bool = False) -> tuple[Phase, int]:
    """The SFT update of a small experiment, and the bytes of its parameters."""
    e = dataclasses.replace(get_config(), method=ResetConfig())
    e = e.replace(model=dataclasses.replace(e.base.model, scan_layers=scan, num_layers=4))
    made = phases(e, make_mesh(devices=jax.devices()[:1]))
    leaves = jax.tree.leaves(shapes.parameters(shapes.vocabulary(e).model))
    return made[-1], sum(4 * math.prod(x.shape) for x in leaves)


@pytest.fixture(scope="module")
def small() -> tuple[planning.Forecast, int]:
    phase, params = small_phase()
    return planning.forecast(dataclasses.replace(phase, beside=1_000), TINY), params


def test_memory_is_what_the_compiler_plans(small):
    f, params = small
    m = f.memory
    # Parameters and two moments, three counters; rows of ids (two) and flags (two).
    rows, length = (int(n) for n in f.about.replace(" ids", "").split(" rows x "))
    assert 0 <= m.arguments - (3 * params + rows * length * (4 + 4 + 1 + 1)) < 64
    assert m.reused >= 3 * params and m.beside == 1_000
    program = m.arguments + m.temporaries + m.outputs - m.reused
    assert f.needed == m.total == program + 1_000 + m.code and f.fits


def test_a_scan_counts_all_its_layers(small):
    """XLA's cost analysis counts the body of a scan once: here it counts as often as it runs."""
    f, _ = small
    scanned = planning.forecast(small_phase(scan=True)[0], TINY)
    assert scanned.flops == pytest.approx(f.flops, rel=0.02)


def test_operations_are_six_a_weight_and_id(small):
    """2 forward, 4 backward for every weight of a product; attention's scores come on top."""
    f, _ = small
    e = get_config()
    vocabulary = shapes.vocabulary(e).model.vocab_size
    m = e.base.model
    attention = m.width * (m.num_heads * 2 + m.num_kv_heads * 2) * m.head_dim
    layer = attention + 3 * m.width * m.mlp_width
    rows, length = (int(n) for n in f.about.replace(" ids", "").split(" rows x "))
    weights = 4 * layer + vocabulary * m.width
    scores = 4 * 2 * 2 * m.num_heads * m.head_dim * length
    least = rows * length * 6 * weights
    assert least < f.flops < 1.1 * (least + 3 * rows * length * scores)


def test_the_highest_roof_binds(small):
    f, _ = small
    assert f.seconds == {"compute": f.flops / 1e9, "memory": f.traffic / 1e9, "exchange": 0.0}
    assert f.bound == max(f.seconds.values()) and f.binds in ("compute", "memory")
    assert f.step_seconds == f.bound * f.runs
    assert planning.roofs(CHIPS["v5e"], 197e12, 819e9, 90e9) == {
        "compute": 1.0, "memory": 1.0, "exchange": 1.0,
    }  # fmt: skip


def test_without_figures_nothing_is_said_of_seconds_and_fitting():
    f = planning.forecast(small_phase()[0], None)
    assert f.fits is None and f.bound is None and f.binds == "" and f.plain()["needed"] == f.needed


def test_collectives_are_summed_by_kind():
    big, small = Shape("f32", (1024,)), Shape("bf16", (8,))
    found = planning.by_kind(
        [
            Collective("all-gather", (small,), 4, 3, ""),
            Collective("all-reduce", (big,), 4, 10, ""),
            Collective("all-gather", (small, small), 2, 1, ""),
        ]
    )
    assert list(found) == ["all-reduce", "all-gather"]
    gather = found["all-gather"]
    assert (gather.places, gather.trips, gather.bytes) == (2, 4, 3 * 16 + 32)
    assert gather.sent == 3 * 16 * 3 / 4 + 32 / 2
    assert found["all-reduce"].sent == 10 * 2 * 3 / 4 * 4096
    assert found["all-reduce"].largest == "f32[1024] x 10 over 4: "
    assert gather.largest.startswith("bf16[8] x 3 over 4")


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
         "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.60G.", int(20.5 * 2**30)),
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (240.00G) "
         "exceeds available HBM (15.75G).", 240 * 2**30),
    ],
)  # fmt: skip
def test_a_program_that_is_too_large_is_told(message, needed):
    class Refusing:
        def compile(self):
            raise jax.errors.JaxRuntimeError(message)

    f = planning.forecast(Phase("update", ("sft",), Refusing, 1, 1, beside=5), CHIPS["v5e"])  # type: ignore[arg-type]
    assert f.memory is None and f.needed == needed + 5 and f.fits is False and f.seconds == {}


def test_other_errors_of_the_compiler_are_raised():
    class Failing:
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        planning.forecast(Phase("update", ("sft",), Failing, 1, 1), CHIPS["v5e"])  # type: ignore[arg-type]
