"""The key/value cache: an explicit pytree whose slots carry positions.

A row never clears anything. An id is written to slot `position % slots`, a query sees the slots
whose stored position is at or below its own (and inside the layer's window), and rewinding is
moving the cursor: what lies above it is masked until it is overwritten.

Retracted ids accumulate above the cursor, so a sliding-window ring needs slots for them as well:
after rewinding by r ids in all since the high-water mark, the oldest position still inside the
window must not have been overwritten.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32

from rlbf_jax.directives import NEVER
from rlbf_jax.parallel.axes import constrain


class Quantized(NamedTuple):
    """Keys or values in a byte each: x = scale * number, up to half a scale.

    A scale is a 127th of the largest magnitude of its vector of H numbers, so that no number is off
    by more than a 254th of it. That is 4 and 2 times as small as float32 and bfloat16.
    """

    number: Array
    """[B, K, S, H] int8."""
    scale: Array
    """[B, K, S, 1] float32."""


class KVCache(NamedTuple):
    """Keys and values of every layer.

    `key[l]`, `value[l]`: [B, K, S_l, H], arrays or `Quantized`.
    With scanned layers there is one entry per place in the repeating block, [R, B, K, S, H].
    `position[l]`: [B, S_l] int32, NEVER where nothing was written.
    """

    key: tuple[Array | Quantized, ...]
    value: tuple[Array | Quantized, ...]
    position: tuple[Array, ...]


def ring_slots(window: int | None, capacity: int, rewound: int) -> int:
    """Slots of a layer: all of `capacity`, or as many as a window needs
    when at most `rewound` ids are taken back.

    Under KEEP `rewound` is 0; under REWIND it is what the rule says (`EditRule.rewound`).
    """
    return capacity if window is None else min(capacity, window + rewound)


def quantize(x: Float[Array, "B K S H"]) -> Quantized:
    """To a byte a number, rounded to the nearest; vectors of zeros stay zeros."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
    number = jnp.round(wide / jnp.where(scale > 0, scale, 1.0))
    return Quantized(number.astype(jnp.int8), scale)


def quantized(caches: Any) -> Any:
    """A pytree of caches of floats, with all keys and values as `Quantized`."""

    def one(cache: KVCache) -> KVCache:
        key, value = (tuple(quantize(read(x, jnp.float32)) for x in layers) for layers in cache[:2])
        return KVCache(key, value, cache.position)

    return jax.tree.map(one, caches, is_leaf=lambda x: isinstance(x, KVCache))


def divided(caches: Any) -> Any:
    """A pytree of caches, rows and heads divided among the devices of a mesh."""

    def one(cache: KVCache) -> KVCache:
        def place(x: Array) -> Array:
            return constrain(x, "rows", "heads", None, None)

        key, value = jax.tree.map(place, (cache.key, cache.value))
        return KVCache(key, value, tuple(constrain(x, "rows", None) for x in cache.position))

    return jax.tree.map(one, caches, is_leaf=lambda x: isinstance(x, KVCache))


def read(cache: Array | Quantized, dtype) -> Float[Array, "B K S H"]:
    """Keys or values to attend with."""
    if isinstance(cache, Quantized):
        return (cache.number.astype(jnp.float32) * cache.scale).astype(dtype)
    return cache


def write(
    cache: Float[Array, "B K S H"] | Quantized,
    new: Float[Array, "B K 1 H"],
    slot: Int32[Array, " B"],
    one_hot: bool,
) -> Float[Array, "B K S H"] | Quantized:
    """Writes one id a row: `new` [B, K, 1, H] into `cache` [B, K, S, H] at `slot` [B].

    `one_hot` spells it as a select over all slots, which wins on TPU and halves the speed on CPU
    where there are several rows.
    """
    if isinstance(cache, Quantized):
        byte = quantize(new)
        return Quantized(
            _write(cache.number, byte.number, slot, one_hot),
            _write(cache.scale, byte.scale, slot, one_hot),
        )
    return _write(cache, new, slot, one_hot)


def _write(cache: Array, new: Array, slot: Array, one_hot: bool) -> Array:
    if one_hot:
        hit = jnp.arange(cache.shape[2])[None] == slot[:, None]
        return jnp.where(hit[:, None, :, None], new, cache)
    return jax.vmap(lambda row, x, at: jax.lax.dynamic_update_slice(row, x, (0, at, 0)))(
        cache, new, slot
    )


def write_position(
    positions: Int32[Array, "B S"], position: Int32[Array, " B"], slot: Int32[Array, " B"]
) -> Int32[Array, "B S"]:
    """[B, S] with `position` [B] stored at `slot` [B]."""
    return jnp.where(
        jnp.arange(positions.shape[1])[None] == slot[:, None], position[:, None], positions
    )


def sees(
    positions: Int32[Array, "B S"], position: Int32[Array, " B"], window: int | None
) -> Bool[Array, "B 1 S"]:
    """[B, 1, S] bool: which slots a query at `position` [B] may attend to."""
    allowed = positions <= position[:, None]
    if window is not None:
        allowed &= position[:, None] - positions < window
    return allowed[:, None]


def latest_writer(
    position: Int32[Array, "B C"], length: Int32[Array, " B"], slots: int
) -> tuple[Int32[Array, "B slots"], Int32[Array, "B slots"]]:
    """Which id of a row a slot holds after the row was fed id by id.

    Args:
      position: [B, C] int32 positions of the ids.
      length: [B] int32, how many ids of the row are real.
      slots: S.

    Returns:
      index [B, S] int32 of the last id written to each slot (0 where none),
      and its position [B, S] (NEVER where none).
    """
    time = jnp.arange(position.shape[1], dtype=jnp.int32)
    slot = jnp.where(time[None] < length[:, None], position % slots, slots)
    last = jnp.full((position.shape[0], slots), -1, jnp.int32)
    last = jax.vmap(lambda row, at: row.at[at].max(time, mode="drop"))(last, slot)
    held = jnp.take_along_axis(position, jnp.maximum(last, 0), axis=1)
    return jnp.maximum(last, 0), jnp.where(last >= 0, held, NEVER)
