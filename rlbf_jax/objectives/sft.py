"""Supervised loss: negative log-likelihood of the targets
(RLBF 1.3 step 5 and L_SFT_guidance of 1.6)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int

from rlbf_jax.parallel.axes import over_rows
from rlbf_jax.parallel.backend import backend
from rlbf_jax.parallel.chunks import ids_at_once
from rlbf_jax.parallel.tables import pick

CHUNK = 512
"""Ids whose logits exist at a time in `linear_nll` on a CPU; about what stays in a core's cache."""


def token_nll(
    logits: Float32[Array, "*shape V"], targets: Int[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """Negative log-likelihood of `targets` [...] under float32 `logits` [..., V], in nats."""
    chosen = pick(logits, targets)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def sequence_logprobs(
    nll: Float[Array, "B T"],
    counts: Bool[Array, "B T"],
    segment: Int[Array, "B T"] | None = None,
    num_segments: int | None = None,
) -> Float32[Array, " B"] | Float32[Array, "B S"]:
    """Log-probability of whole sequences: minus the sum of their tokens' negative log-likelihoods.

    What DPO (Rafailov et al. 2023), KTO (Ethayarajh et al. 2024) and scores of whole completions
    are made of. Divided by the number of tokens it is a mean log-probability (SimPO).

    Args:
      nll: [B, T], nats, of the token in each column (see `token_nll`); where `counts` does not hold
        it may be infinite or NaN, and its gradient is 0.
      counts: [B, T] bool, tokens in the sum: a completion's, not the prompt's or padding.
      segment: [B, T] int32 of packed rows: 1, 2, ... for a row's sequences, 0 for padding.
        None: one sequence a row.
      num_segments: S (static), columns of the result for packed rows;
        sequences beyond are left out.

    Returns:
      float32 [B]; of packed rows [B, S], sequence s in column s - 1. 0 where nothing counts.

    Raises ValueError for `segment` without `num_segments`.
    """
    kept = jnp.where(counts, nll.astype(jnp.float32), 0.0)
    if segment is None:
        return -jnp.sum(kept, axis=1)
    if num_segments is None:
        raise ValueError("num_segments is None, expected the most sequences a packed row holds")
    sums = jax.vmap(lambda x, s: jax.ops.segment_sum(x, s, num_segments + 1))(kept, segment)
    return -sums[:, 1:]


@jax.custom_vjp
def linear_nll(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    counts: Bool[Array, "B T"] | Float32[Array, "B T"],
) -> Float32[Array, ""]:
    """Summed negative log-likelihood of targets under softmax(hidden @ table.T),
    without a [B, T, V] array.

    Loss and gradients are found chunk by chunk in one forward sweep,
    so no logits are kept or computed twice.

    Args:
      hidden: [B, T, D].
      table: [V, D] unembedding.
      targets: [B, T] int32.
      counts: [B, T] bool, which targets are in the sum, or float32, how much each counts.

    Returns:
      float32 scalar, nats.
    """
    return _sweep(hidden, table, targets, counts)[0]


def _sweep(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    counts: Bool[Array, "B T"] | Float32[Array, "B T"],
) -> tuple[Float32[Array, ""], Float[Array, "B T D"], Float[Array, "V D"]]:
    """The loss, and its gradients for hidden and table; each device sweeps its own rows, and the
    table's gradient is exchanged once."""

    def local(table, rows):
        total, hidden_gradient, table_gradient = _sweep_rows(table, *rows)
        return hidden_gradient, (total, table_gradient)

    hidden_gradient, (total, table_gradient) = over_rows(local, table, (hidden, targets, counts))
    return total, hidden_gradient, table_gradient.astype(table.dtype)


def _sweep_rows(
    table: Float[Array, "V D"],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    counts: Bool[Array, "B T"] | Float32[Array, "B T"],
) -> tuple[Float32[Array, ""], Float[Array, "B T D"], Float32[Array, "V D"]]:
    batch, time, width = hidden.shape
    ids = CHUNK if backend() == "cpu" else ids_at_once(table.shape[0])
    chunk = max(1, min(time, ids // batch))
    pad = -time % chunk

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        # Chunks run along time, so that rows split over devices stay where they are.
        return jnp.moveaxis(padded.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    wide = table.astype(hidden.dtype)

    def body(carry, piece):
        total, table_gradient = carry
        rows, target, counted = piece
        flat, target, counted = rows.reshape(-1, width), target.reshape(-1), counted.reshape(-1)
        logits = jnp.matmul(flat, wide.T, preferred_element_type=jnp.float32)
        highest = jnp.max(logits, axis=-1, keepdims=True)
        mass = jnp.exp(logits - highest)
        norm = jnp.sum(mass, axis=-1, keepdims=True)
        nll = jnp.log(norm[:, 0]) + highest[:, 0] - pick(logits, target)
        hit = jnp.arange(wide.shape[0])[None] == target[:, None]
        slope = mass / norm - hit
        if counted.dtype != bool:
            slope, nll = slope * counted[:, None], nll * counted
        slope = jnp.where(counted[:, None] != 0, slope, 0.0).astype(hidden.dtype)
        table_gradient += jnp.matmul(slope.T, flat, preferred_element_type=jnp.float32)
        return (total + jnp.sum(jnp.where(counted != 0, nll, 0.0)), table_gradient), (
            slope @ wide
        ).reshape(rows.shape)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(table.shape, jnp.float32))
    (total, table_gradient), pieces = jax.lax.scan(
        body, start, (split(hidden), split(targets), split(counts))
    )
    hidden_gradient = jnp.moveaxis(pieces, 0, 1).reshape(batch, time + pad, width)[:, :time]
    return total, hidden_gradient, table_gradient


def _forward(hidden, table, targets, counts):
    total, hidden_gradient, table_gradient = _sweep(hidden, table, targets, counts)
    return total, (hidden_gradient, table_gradient)


def _backward(gradients, cotangent):
    hidden, table = gradients
    return (
        hidden * cotangent.astype(hidden.dtype),
        table * cotangent.astype(table.dtype),
        None,
        None,
    )


linear_nll.defvjp(_forward, _backward)
