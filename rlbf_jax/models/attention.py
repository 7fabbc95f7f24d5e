"""Rotary positions and attention, over whole rows or over a cache.

Rows up to `QUERY_BLOCK` have their scores computed in one piece. Longer rows are swept block by
block, with a running softmax (Milakov and Gimelshein 2018; Rabe and Staats 2021; FlashAttention,
Dao et al. 2022), so that no [T, T] array exists in either direction; blocks that no query can see
are skipped. On a GPU, cuDNN's flash attention does the plain causal case in half precision.

Shape letters of the project: B rows, T time (queries), S keys or cache slots, D width, N query
heads, K key/value heads, G = N / K query heads a key head, H head size, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float32, Int32

from rlbf_jax.parallel.backend import backend

QUERY_BLOCK = 1024
"""Longest row whose [T, T] scores are computed in one piece.
Longer rows are multiples of it, and go block by block."""
CPU_BLOCK, BLOCK = 256, 512
"""Queries, and keys, of one block of a longer row. Small ones fit a CPU's cache,
large ones keep a GPU or TPU busy."""
_MASKED = float(np.finfo(np.float32).min)


class Visibility(NamedTuple):
    """Who may attend to whom within a batch of rows, as vectors;
    masks are made from it block by block."""

    position: Array
    """[B, T] int32: live ids before this one."""
    segment: Array | None = None
    """[B, T] int32: packing segment, 0 for padding. None: every row is one segment."""
    died: Array | None = None
    """[B, T] int32: query i sees key j iff j <= i < died[j].
    None: nothing dies, so segments are consecutive ids and `position` counts on by one within them
    (rows longer than `QUERY_BLOCK` rely on it)."""


def can_attend(
    visibility: Visibility,
    start: int | Array,
    size: int,
    window: int | None,
    first_key: int | Array = 0,
    num_keys: int | None = None,
) -> Array:
    """[B or 1, size, num_keys] bool mask: do the queries start..start+size see the keys
    first_key..first_key+num_keys?

    By default the keys are all T. An id always sees itself.
    """
    num_keys = visibility.position.shape[1] if num_keys is None else num_keys
    key = first_key + jnp.arange(num_keys, dtype=jnp.int32)
    query = start + jnp.arange(size, dtype=jnp.int32)
    allowed = (key[None, :] <= query[:, None])[None]

    def queries(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)[:, :, None]

    def keys(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, first_key, num_keys, axis=1)[:, None, :]

    if visibility.segment is not None:
        allowed &= queries(visibility.segment) == keys(visibility.segment)
    if visibility.died is not None:
        allowed &= query[None, :, None] < keys(visibility.died)
    if window is not None:
        allowed &= queries(visibility.position) - keys(visibility.position) < window
    return allowed | (key[None, :] == query[:, None])[None]


class RopeScaling(NamedTuple):
    """How rotary frequencies are changed for texts longer than the model was first made for."""

    factor: float
    """Frequencies are divided by this (linear scaling) ..."""
    band: tuple[float, float] | None = None
    """... or, given (low, high), only those that turn less than `low` times
    within `original_length`; those that turn more than `high` times stay,
    and between them the two are mixed (Llama 3.1)."""
    original_length: int = 0


def rotary(
    position: Int32[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float32[Array, "B 1 T half"], Float32[Array, "B 1 T half"]]:
    """Cosine and sine, [B, 1, T, H / 2] float32, of the half-split rotary embedding."""
    frequency = rotary_frequencies(head_dim, theta, scaling)
    angle = position.astype(jnp.float32)[:, None, :, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Float32[Array, " half"]:
    """Radians a position, [H / 2] float32."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None and scaling.band is None:
        frequency = frequency / scaling.factor
    elif scaling is not None and scaling.band is not None:
        low, high = scaling.band
        turns = scaling.original_length * frequency / (2 * jnp.pi)
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    return frequency


def rotate(
    x: Float[Array, "B heads T H"],
    cosine: Float32[Array, "#B 1 T half"],
    sine: Float32[Array, "#B 1 T half"],
) -> Float[Array, "B heads T H"]:
    """Applies a rotary embedding to [B, heads, T, H]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], -1
    ).astype(x.dtype)


def attend(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    allowed: Bool[Array, "#B T S"],
    softcap: float | None = None,
) -> Float[Array, "B N T H"]:
    """Softmax attention.

    Args:
      query: [B, N, T, H], scaled already.
      key, value: [B, K, S, H]; N is a multiple of K.
      allowed: [B or 1, T, S] bool.
      softcap: scores become softcap * tanh(scores / softcap).

    Returns:
      [B, N, T, H], in the dtype of `value`; the softmax is float32.
    """
    scores = jnp.where(allowed[:, None, None], _scores(query, key, softcap), _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    # The heads of a group share keys: fold the group into time,
    # so that one batched matmul serves it.
    folded = weights.reshape(*key.shape[:2], -1, key.shape[2])
    return jnp.einsum("bkts,bksh->bkth", folded, value).reshape(query.shape)


def _scores(query: Array, key: Array, softcap: float | None) -> Array:
    """[B, K, G, T, S] float32."""
    batch, heads, time, size = query.shape
    folded = query.reshape(batch, key.shape[1], heads // key.shape[1] * time, size)
    scores = jnp.einsum("bkth,bksh->bkts", folded, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, key.shape[1], -1, time, key.shape[2])
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def attend_rows(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    visibility: Visibility,
    window: int | None,
    softcap: float | None,
) -> Float[Array, "B N T H"]:
    """Attention of whole rows onto themselves: shapes as in `attend`, S = T;
    no [T, T] array above `QUERY_BLOCK`.

    Raises ValueError for a row that is longer than `QUERY_BLOCK` and no multiple of it.
    """
    time = query.shape[2]
    causal = visibility.segment is None and visibility.died is None
    if causal and softcap is None and fused(query):
        return attend_fused(query, key, value, window)
    if time <= QUERY_BLOCK:
        return attend(query, key, value, can_attend(visibility, 0, time, window), softcap)
    if time % QUERY_BLOCK:
        raise ValueError(
            f"rows of {time} ids: pad rows longer than {QUERY_BLOCK} to a multiple of it"
        )
    if causal:
        # One mask for all rows; masks never cross a block.
        visibility = Visibility(jnp.arange(time, dtype=jnp.int32)[None])
    return attend_blocks(query, key, value, visibility, window, softcap)


def fused(query: Array) -> bool:
    """Whether cuDNN's flash attention is there for queries [B, N, T, H] of this type and size.

    Heads of 256 need a Hopper GPU; they go block by block, as float32 does.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return backend() == "gpu" and half and query.shape[3] <= 128 and query.shape[3] % 8 == 0


def attend_fused(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B N T H"]:
    """Causal attention by `jax.nn.dot_product_attention`; shapes as in `attend_rows`."""
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    near = None if window is None else (window - 1, 0)
    attended = jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=1.0,
        is_causal=True,
        local_window_size=near,
        implementation=implementation,
    )
    return jnp.swapaxes(attended, 1, 2)


def visible_blocks(time: int, block: int, window: int | None) -> np.ndarray:
    """[P, 2] int32 pairs (block of queries, block of keys) that hold a query and a key at most
    `window` - 1 before it.

    Each query's own block comes first, so that a running softmax starts from a key that is seen.
    """
    count = time // block
    back = count if window is None else -(-(window - 1) // block)
    pairs = [(q, k) for q in range(count) for k in range(q, max(0, q - back) - 1, -1)]
    return np.asarray(pairs, np.int32)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_blocks(
    query: Array,
    key: Array,
    value: Array,
    visibility: Visibility,
    window: int | None,
    softcap: float | None,
) -> Array:
    """`attend` of whole rows under `can_attend`, without [T, T] arrays, forward and backward.

    One scan over the pairs of blocks that can see each other: its length is known when it is
    compiled, and its body is compiled once, however long the rows are.
    """
    return _blocks_forward(query, key, value, visibility, window, softcap)[0]


def _pairs(time: int, visibility: Visibility, window: int | None) -> tuple[int, Array]:
    """Block size and the pairs to scan over, in ids. Under lifetimes positions stand closer than
    indices, so that a window may reach any earlier block."""
    block = min(CPU_BLOCK if backend() == "cpu" else BLOCK, QUERY_BLOCK)
    return block, jnp.asarray(
        visible_blocks(time, block, window if visibility.died is None else None) * block
    )


def _take(x: Array, start: Array, size: int) -> Array:
    """Columns start..start+size of [B, heads, T, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=2)


def _put(x: Array, start: Array, new: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, new, start, axis=2)


def _blocks_forward(query, key, value, visibility, window, softcap):
    block, pairs = _pairs(query.shape[2], visibility, window)

    def body(carry, pair):
        q, k = pair
        highest, mass, total = carry
        scores = _scores(_take(query, q, block), _take(key, k, block), softcap)
        allowed = can_attend(visibility, q, block, window, k, block)
        scores = jnp.where(allowed[:, None, None], scores, _MASKED)
        before = _take(highest, q, block)
        after = jnp.maximum(before, jnp.max(scores, axis=-1).reshape(before.shape))
        kept = jnp.exp(before - after)
        weights = jnp.exp(scores - after.reshape(scores.shape[:-1])[..., None])
        added = jnp.einsum(
            "bkts,bksh->bkth",
            weights.reshape(*key.shape[:2], -1, block).astype(value.dtype),
            _take(value, k, block),
            preferred_element_type=jnp.float32,
        )
        sums = _take(mass, q, block) * kept + jnp.sum(weights, axis=-1).reshape(before.shape)
        values = _take(total, q, block) * kept[..., None] + added.reshape(*before.shape, -1)
        return (_put(highest, q, after), _put(mass, q, sums), _put(total, q, values)), None

    rows = query.shape[:3]
    start = tuple(
        jnp.full(shape, x, jnp.float32)
        for shape, x in ((rows, _MASKED), (rows, 0), (query.shape, 0))
    )
    (highest, mass, total), _ = jax.lax.scan(body, start, pairs)
    attended = (total / mass[..., None]).astype(value.dtype)
    return attended, (query, key, value, visibility, attended, highest + jnp.log(mass))


def _blocks_backward(window, softcap, kept, slope):
    query, key, value, visibility, attended, norm = kept
    block, pairs = _pairs(query.shape[2], visibility, window)
    # What softmax takes off every score's slope.
    mean = jnp.sum(slope.astype(jnp.float32) * attended.astype(jnp.float32), axis=-1)
    matmul = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def fold(x: Array) -> Array:
        """[B, N, block, ...] or [B, K, G, block, ...] -> [B, K, G x block, ...]."""
        return x.reshape(*key.shape[:2], -1, x.shape[-1])

    def body(carry, pair):
        q, k = pair
        queries, keys, values = _take(query, q, block), _take(key, k, block), _take(value, k, block)
        slopes = fold(_take(slope, q, block))
        scores = _scores(queries, keys, softcap)
        allowed = can_attend(visibility, q, block, window, k, block)[:, None, None]
        by_row = (*scores.shape[:-1], 1)
        weights = jnp.where(allowed, jnp.exp(scores - _take(norm, q, block).reshape(by_row)), 0.0)
        toward = matmul("bkth,bksh->bkts", slopes, values).reshape(scores.shape)
        change = weights * (toward - _take(mean, q, block).reshape(by_row))
        if softcap is not None:
            change *= 1 - jnp.square(scores / softcap)
        change, weights = fold(change.astype(query.dtype)), fold(weights.astype(value.dtype))
        added = (
            matmul("bkts,bksh->bkth", change, keys).reshape(queries.shape),
            matmul("bkts,bkth->bksh", change, fold(queries)),
            matmul("bkts,bkth->bksh", weights, slopes),
        )
        at = (q, k, k)
        return tuple(
            _put(x, i, _take(x, i, block) + new) for x, i, new in zip(carry, at, added, strict=True)
        ), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
    gradients, _ = jax.lax.scan(body, start, pairs)
    return *(g.astype(x.dtype) for g, x in zip(gradients, (query, key, value), strict=True)), None


attend_blocks.defvjp(_blocks_forward, _blocks_backward)
