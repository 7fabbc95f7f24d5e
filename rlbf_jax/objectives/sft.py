"""Supervised loss: negative log-likelihood of the targets (RLBF 1.3 step 5 and L_SFT_guidance of
1.6)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

CHUNK = 512
"""Ids whose logits exist at a time in `linear_nll`; about what stays in a CPU core's cache."""


def token_nll(logits: Array, targets: Array) -> Array:
    """Negative log-likelihood of `targets` [...] under float32 `logits` [..., V], in nats."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


@jax.custom_vjp
def linear_nll(hidden: Array, table: Array, targets: Array, counts: Array) -> Array:
    """Summed negative log-likelihood of targets under softmax(hidden @ table.T), without a [B, T,
    V] array.

    Loss and gradients are found chunk by chunk in one forward sweep, so no logits are kept or
    computed twice.

    Args:
      hidden: [B, T, D].
      table: [V, D] unembedding.
      targets: [B, T] int32.
      counts: [B, T] bool, which targets are in the sum.

    Returns:
      float32 scalar, nats.
    """
    return _sweep(hidden, table, targets, counts)[0]


def _sweep(
    hidden: Array, table: Array, targets: Array, counts: Array
) -> tuple[Array, Array, Array]:
    """The loss, and its gradients for hidden and table."""
    batch, time, width = hidden.shape
    chunk = max(1, min(time, CHUNK // batch))
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
        nll = (
            jnp.log(norm[:, 0])
            + highest[:, 0]
            - jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        )
        hit = jnp.arange(wide.shape[0])[None] == target[:, None]
        slope = jnp.where(counted[:, None], mass / norm - hit, 0.0).astype(hidden.dtype)
        table_gradient += jnp.matmul(slope.T, flat, preferred_element_type=jnp.float32)
        return (total + jnp.sum(jnp.where(counted, nll, 0.0)), table_gradient), (
            slope @ wide
        ).reshape(rows.shape)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(table.shape, jnp.float32))
    (total, table_gradient), pieces = jax.lax.scan(
        body, start, (split(hidden), split(targets), split(counts))
    )
    hidden_gradient = jnp.moveaxis(pieces, 0, 1).reshape(batch, time + pad, width)[:, :time]
    return total, hidden_gradient, table_gradient.astype(table.dtype)


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
