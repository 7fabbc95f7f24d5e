"""Attention of many rows that begin alike:
keys and values of the common beginning exist once, not once a row.

`transformer.prefix_of` reads a beginning, `transformer.extend` feeds what follows it. P ids in the
prefix, T after it; other shape letters as in `attention.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32

from rlbf_jax.directives import NEVER


class Prefix(NamedTuple):
    """A beginning that rows share. Padding has position NEVER and is never seen."""

    pairs: tuple[tuple[Array, Array], ...]
    """Key and value [K, P, H] of every layer, in order."""
    position: Array
    """[P] int32."""


def joined(prefix: Prefix, more: Prefix, count: int) -> Prefix:
    """A prefix and the first `count` (static) ids of another one."""
    pairs = tuple(
        (jnp.concatenate([k, k2[:, :count]], 1), jnp.concatenate([v, v2[:, :count]], 1))
        for (k, v), (k2, v2) in zip(prefix.pairs, more.pairs, strict=True)
    )
    return Prefix(pairs, jnp.concatenate([prefix.position, more.position[:count]]))


def sees_prefixed(
    prefix: Int32[Array, " P"], own: Int32[Array, " T"], window: int | None
) -> Bool[Array, "T P+T"]:
    """[T, P + T] bool: the keys that each id at positions `own` [T] sees,
    after ids at positions `prefix` [P]."""
    key = jnp.concatenate([prefix, own])
    allowed = (key[None] <= own[:, None]) & (key[None] < NEVER)
    return allowed if window is None else allowed & (own[:, None] - key[None] < window)


def attend_prefixed(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    prefix: tuple[Float[Array, "K P H"], Float[Array, "K P H"]],
    allowed: Bool[Array, "T P+S"],
    softcap: float | None,
) -> Float[Array, "B N T H"]:
    """Softmax attention to a shared prefix and to the rows' own ids.

    Args:
      query: [B, N, T, H], scaled already.
      key, value: [B, K, S, H] of the rows' own ids.
      prefix: key and value [K, P, H].
      allowed: [T, P + S] bool.
      softcap: scores become softcap * tanh(scores / softcap).

    Returns:
      [B, N, T, H], in the dtype of `value`; the softmax is float32.
    """
    batch, heads, time, size = query.shape
    kv_heads, width = key.shape[1], prefix[0].shape[1]
    folded = query.reshape(batch, kv_heads, -1, size)
    scores = jnp.concatenate(
        [
            jnp.einsum("bkth,ksh->bkts", folded, prefix[0], preferred_element_type=jnp.float32),
            jnp.einsum("bkth,bksh->bkts", folded, key, preferred_element_type=jnp.float32),
        ],
        axis=-1,
    )
    scores = scores.reshape(batch, kv_heads, heads // kv_heads, time, -1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    weights = (
        jax.nn.softmax(scores, axis=-1)
        .astype(value.dtype)
        .reshape(batch, kv_heads, folded.shape[2], -1)
    )
    attended = jnp.einsum("bkts,ksh->bkth", weights[..., :width], prefix[1])
    attended += jnp.einsum("bkts,bksh->bkth", weights[..., width:], value)
    return attended.reshape(batch, heads, time, size)
