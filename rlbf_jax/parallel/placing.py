"""Arrays between a process and the devices of all processes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlbf_jax.parallel import hosts


def placed(tree: Any, sharding: Any) -> Any:
    """Arrays on the devices of all processes, of which each puts its own part there.

    Args:
      tree: arrays that every process has whole, or that are there already.
      sharding: one for all arrays, or a tree of them.
    """
    if not hosts.several():
        return jax.device_put(tree, sharding)
    if not isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(_placed, tree, sharding)
    return jax.tree.map(lambda x: _placed(x, sharding), tree)


def dealt(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """What a jitted function takes in place of these arrays: with one process itself, for then it
    places them as it runs."""
    return placed(tree, sharding) if hosts.several() else tree


def _placed(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            _placed(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x)
        )
    # Unlike device_put, this does not ask every process for the whole array to compare it.
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])


def rows_here(count: int, sharding: jax.sharding.Sharding) -> list[int]:
    """Which of `count` rows the devices of this process hold, in order."""
    found: set[int] = set()
    for part in sharding.addressable_devices_indices_map((count,)).values():
        assert part is not None
        found |= set(range(count)[part[0]])
    return sorted(found)


class Assembled:
    """Batches of rows on the devices of all processes, of which each reads its own rows alone.

    Args:
      rows: an iterator of dicts of arrays, of the rows that `rows_here` says; with `get_state` and
        `set_state`.
      count: rows of a whole batch.
    """

    def __init__(self, rows: Any, count: int, sharding: jax.sharding.Sharding):
        self._rows, self._count, self._sharding = rows, count, sharding
        here = rows_here(count, sharding)
        self._place = np.full(count, -1)
        self._place[here] = np.arange(len(here))

    def __iter__(self) -> Assembled:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        return {name: self._whole(part) for name, part in next(self._rows).items()}

    def get_state(self) -> Any:
        return self._rows.get_state()

    def set_state(self, state: Any) -> None:
        self._rows.set_state(state)

    def _whole(self, part: np.ndarray) -> jax.Array:
        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            rows, *rest = index
            return part[self._place[rows]][:, *rest] if rest else part[self._place[rows]]

        shape = (self._count, *part.shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, read)


def fetched(tree: Any) -> Any:
    """Arrays as numpy, whole on every process, wherever their parts are. All processes call it."""
    if hosts.several():
        leaves, structure = jax.tree.flatten(tree)
        far = [n for n, x in enumerate(leaves) if _is_elsewhere(x)]
        found = multihost_utils.process_allgather([leaves[n] for n in far], tiled=True)
        for n, x in zip(far, found, strict=True):
            leaves[n] = x
        tree = jax.tree.unflatten(structure, leaves)
    return jax.device_get(tree)


def _is_elsewhere(x: Any) -> bool:
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
