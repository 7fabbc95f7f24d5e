"""Rotary positions and attention, over whole rows or over a cache.

Shape letters of the project: B rows, T time (queries), S keys or cache slots, D width, N query heads, K key/value
heads, G = N / K query heads a key head, H head size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

QUERY_BLOCK = 1024
"""Longest row whose [T, T] scores are computed in one piece; longer rows go block by block."""


class Visibility(NamedTuple):
    """Who may attend to whom within a batch of rows, as vectors; masks are made from it block by block."""

    position: Array
    """[B, T] int32: live ids before this one."""
    segment: Array | None = None
    """[B, T] int32: packing segment, 0 for padding. None: every row is one segment."""
    died: Array | None = None
    """[B, T] int32: query i sees key j iff j <= i < died[j]. None: nothing dies."""


def can_attend(visibility: Visibility, start: int | Array, size: int, window: int | None) -> Array:
    """[B or 1, size, T] bool mask of the queries start..start+size. An id always sees itself."""
    key = jnp.arange(visibility.position.shape[1], dtype=jnp.int32)
    query = start + jnp.arange(size, dtype=jnp.int32)
    allowed = (key[None, :] <= query[:, None])[None]

    def queries(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)[:, :, None]

    if visibility.segment is not None:
        allowed &= queries(visibility.segment) == visibility.segment[:, None, :]
    if visibility.died is not None:
        allowed &= query[None, :, None] < visibility.died[:, None, :]
    if window is not None:
        allowed &= queries(visibility.position) - visibility.position[:, None, :] < window
    return allowed | (key[None, :] == query[:, None])[None]


class RopeScaling(NamedTuple):
    """How rotary frequencies are changed for texts longer than the model was first made for."""

    factor: float
    """Frequencies are divided by this (linear scaling) ..."""
    band: tuple[float, float] | None = None
    """... or, given (low, high), only those that turn less than `low` times within `original_length`; those that turn
    more than `high` times stay, and between them the two are mixed (Llama 3.1)."""
    original_length: int = 0


def rotary(position: Array, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Array, Array]:
    """Cosine and sine, [B, 1, T, H / 2] float32, of the half-split rotary embedding."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None and scaling.band is None:
        frequency = frequency / scaling.factor
    elif scaling is not None and scaling.band is not None:
        low, high = scaling.band
        turns = scaling.original_length * frequency / (2 * jnp.pi)
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    angle = position.astype(jnp.float32)[:, None, :, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cosine: Array, sine: Array) -> Array:
    """Applies a rotary embedding to [B, heads, T, H]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1).astype(x.dtype)


def attend(query: Array, key: Array, value: Array, allowed: Array, softcap: float | None = None) -> Array:
    """Softmax attention.

    Args:
      query: [B, N, T, H], scaled already.
      key, value: [B, K, S, H]; N is a multiple of K.
      allowed: [B or 1, T, S] bool.
      softcap: scores become softcap * tanh(scores / softcap).

    Returns:
      [B, N, T, H], in the dtype of `value`; the softmax is float32.
    """
    batch, heads, time, size = query.shape
    groups = heads // key.shape[1]
    # The heads of a group share keys: fold the group into time, so that one batched matmul serves it.
    folded = query.reshape(batch, key.shape[1], groups * time, size)
    scores = jnp.einsum("bkth,bksh->bkts", folded, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, key.shape[1], groups, time, key.shape[2])
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = weights.reshape(batch, key.shape[1], groups * time, key.shape[2])
    return jnp.einsum("bkts,bksh->bkth", weights, value).reshape(batch, heads, time, size)


def attend_rows(
    query: Array, key: Array, value: Array, visibility: Visibility, window: int | None, softcap: float | None
) -> Array:
    """Attention of whole rows onto themselves; above `QUERY_BLOCK` block by block, so that no [T, T] array exists."""
    time = query.shape[2]
    if time <= QUERY_BLOCK:
        return attend(query, key, value, can_attend(visibility, 0, time, window), softcap)
    if time % QUERY_BLOCK:
        raise ValueError(f"rows of {time} ids: pad rows longer than {QUERY_BLOCK} to a multiple of it")

    def block(start: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(query, start, QUERY_BLOCK, axis=2)
        return attend(part, key, value, can_attend(visibility, start, QUERY_BLOCK, window), softcap)

    blocks = jax.lax.map(jax.checkpoint(block), jnp.arange(0, time, QUERY_BLOCK))
    return jnp.moveaxis(blocks, 0, 2).reshape(query.shape)
