"""Rows of one number an id, whose ids are divided among devices: each device sees its part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from rlbf_jax.parallel.axes import LOGICAL, current_mesh, names_of, parts_of


@dataclasses.dataclass(frozen=True)
class Part:
    """Which part of all ids a device sees, and how it hears of the others."""

    axes: tuple[str, ...]
    number: Array
    """int32 scalar: parts before this one."""

    def gathered(self, x: Array) -> Array:
        """[B] of every part -> [B, parts], in order."""
        return jax.lax.all_gather(x, self.axes, axis=1)

    def total(self, x: Array) -> Array:
        """The sum over all parts."""
        return jax.lax.psum(x, self.axes)


def has_parts(x: Array) -> bool:
    """Whether the ids of [B, V] are divided among devices."""
    mesh = current_mesh()
    return mesh is not None and bool(names_of(_spec(x)[1:]))


def over_parts(
    function: Callable[..., Array], x: Array, *rows: Array, whole: bool = False
) -> Array:
    """`function(part, own, *rows)` on every device.

    Args:
      x: [B, V], of which a device gets `own` [b, V / parts].
      rows: [B] each, of which it gets [b].
      whole: the function's result is `own`'s shape, and the whole one is [B, V]; otherwise it is
        [b] and the same on all parts, as `Part.total` makes it.
    """
    mesh, held = current_mesh(), _spec(x)
    assert mesh is not None
    axes = names_of(held[1:])
    row, ids = PartitionSpec(held[0]), PartitionSpec(held[1])
    count = parts_of("vocab", x.shape[1], mesh)

    def local(number: Array, own: Array, *rows: Array) -> Array:
        return function(Part(axes, number[0]), own, *rows)

    return jax.shard_map(
        local,
        in_specs=(ids, held, *[row] * len(rows)),
        out_specs=held if whole else row,
        axis_names={*axes, *names_of(row)},
    )(jnp.arange(count, dtype=jnp.int32), x, *rows)


def _spec(x: Array) -> PartitionSpec:
    mesh = current_mesh()
    assert mesh is not None
    return LOGICAL.spec(("few_rows", "vocab"), x.shape, mesh)
