"""Logical axes: what divides a dimension."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from rlbf_jax.parallel import tables
from rlbf_jax.parallel.axes import (
    AXES,
    LOGICAL,
    LogicalAxes,
    constrain,
    current_mesh,
    names_of,
    over_rows,
    traced_for,
)
from rlbf_jax.parallel.chunks import CPU_LOGITS, LEAST, LOGITS, ids_at_once
from rlbf_jax.parallel.mesh import RULES

MESH = AbstractMesh((2, 2, 4, 3), AXES)


@pytest.mark.parametrize(
    ("names", "shape", "spec"),
    [
        (("rows", None), (16, 5), PartitionSpec(("slice", "data", "fsdp"), None)),
        # As many axes as divide it, the outermost first.
        (("rows", None), (4, 5), PartitionSpec(("slice", "data"), None)),
        (("rows",), (2,), PartitionSpec("slice")),
        (("rows",), (3,), PartitionSpec(None)),
        (("few_rows", None, "embed"), (8, 1, 8), PartitionSpec(("slice", "data"), None, "fsdp")),
        (("vocab", None), (24, 7), PartitionSpec(("tensor", "fsdp"), None)),
        (("vocab", None), (9, 7), PartitionSpec("tensor", None)),
        (("embed", "heads"), (6, 4), PartitionSpec(None, None)),
    ],
)
def test_dimensions_are_divided_by_what_divides_them(names, shape, spec):
    assert LOGICAL.spec(names, shape, MESH) == spec


def test_axes_of_one_device_are_left_out():
    mesh = AbstractMesh((1, 4, 1, 2), AXES)
    assert LOGICAL.spec(("few_rows", "vocab"), (8, 8), mesh) == PartitionSpec("data", "tensor")


@pytest.mark.parametrize("names", [("rows", "embed"), ("heads", "mlp"), ("vocab", "logits")])
def test_two_dimensions_never_share_a_mesh_axis(names):
    with pytest.raises(ValueError, match="collide on mesh axis (fsdp|tensor)"):
        LOGICAL.spec(names, (24, 24), MESH)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="heads: no mesh axis model"):
        LogicalAxes(heads=("model",))
    with pytest.raises(ValueError, match="each mesh axis once"):
        LogicalAxes(rows=("data", "data"))
    with pytest.raises(ValueError, match="2 names for 1 dimensions"):
        LOGICAL.spec(("rows", None), (4,), MESH)


@pytest.mark.parametrize("name", RULES)
def test_no_rule_collides(name):
    LOGICAL.spec(RULES[name], (24,) * len(RULES[name]), MESH)


def test_names_of_partitions():
    assert names_of(PartitionSpec(("data", "fsdp"), None, "tensor")) == ("data", "fsdp", "tensor")
    assert names_of(()) == ()


# One device ---------------------------------------------------------------------------------------


def test_on_one_device_programs_are_as_they_were():
    """Not a single operation more."""
    table, ids = jnp.arange(12.0).reshape(6, 2), jnp.asarray([[3, 0], [5, 1]])

    def ours(table, ids):
        x = constrain(tables.look_up(table, ids, jnp.float32), "rows", None, None)
        own, total = over_rows(lambda whole, rows: (rows * whole, rows.sum()), 2.0, x)
        return own, total, tables.pick(x, ids)

    def plain(table, ids):
        x = jnp.take(table, ids, axis=0).astype(jnp.float32)
        return x * 2.0, x.sum(), jnp.take_along_axis(x, ids[..., None], axis=-1)[..., 0]

    one = AbstractMesh((1, 1, 1, 1), AXES)
    for function in (ours, traced_for(None, ours), traced_for(one, ours)):
        assert str(jax.make_jaxpr(function)(table, ids)) == str(jax.make_jaxpr(plain)(table, ids))
    assert current_mesh() is None


def test_picked_numbers_may_stand_beside_infinite_ones():
    x = np.full((2, 3, 5), -np.inf, np.float32)
    x[..., 2] = np.arange(6).reshape(2, 3)
    ids = jnp.full((2, 3), 2)
    np.testing.assert_array_equal(tables.pick(jnp.asarray(x), ids), x[..., 2])


@pytest.mark.parametrize(
    ("vocab", "backend", "ids"),
    [
        (2088, "cpu", CPU_LOGITS // 2088),
        (256_000, "cpu", LEAST),
        (128_256, "tpu", LOGITS // 128_256),
        (2**22, "tpu", LEAST),
    ],
)
def test_chunks_have_few_logits_and_not_too_few_ids(monkeypatch, vocab, backend, ids):
    monkeypatch.setattr("rlbf_jax.parallel.chunks.backend", lambda: backend)
    assert ids_at_once(vocab) == ids


def test_chunks_grow_with_the_devices_that_divide_logits():
    seen = []

    def f(x):
        seen.append(ids_at_once(8192))
        return x

    jax.make_jaxpr(traced_for(AbstractMesh((1, 1, 1, 4), AXES), f))(1.0)
    assert seen == [4 * CPU_LOGITS // 8192]
