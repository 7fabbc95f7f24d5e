"""From logits to a drawn id: the same distribution in the sampler, the scorer and every trainer.

log-probabilities = log_softmax((logits + control bias, illegal ids at -inf) / temperature).

Truncation (top-k, top-p, min-p) only narrows what is drawn; recorded log-probabilities are those above, so that a
scorer reproduces them from the trace alone.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlbf_jax.directives import EditRule, Legal


class Truncation(NamedTuple):
    """Per-row arrays [B]: `top_k` int32 (0 keeps all), `top_p` and `min_p` float32 (1 and 0 keep all)."""

    top_k: Array
    top_p: Array
    min_p: Array


def legal_logits(rule: EditRule, logits: Array, legal: Legal, control_bias: Array, temperature: Array) -> Array:
    """Tempered logits with illegal ids at -inf.

    Args:
      logits: [..., V] float32.
      legal: [...] bool each.
      control_bias: [..., C] float32, added to the logits of the rule's C control ids.
      temperature: [...] float32. 0 is greedy, and log-probabilities are then those at temperature 1.
    """
    vocab = logits.shape[-1]
    after = vocab - rule.end_id
    bias = jnp.pad(control_bias, [(0, 0)] * (control_bias.ndim - 1) + [(rule.first_id, after)])
    tempered = (logits + bias) / jnp.where(temperature > 0, temperature, 1.0)[..., None]
    return jnp.where(rule.legal_ids(legal, vocab), tempered, -jnp.inf)


def kept_by_truncation(probabilities: Array, truncation: Truncation) -> Array:
    """[B, V] bool: ids that survive top-k, then top-p on what is left (renormalized), and min-p.

    Top-p keeps the smallest set of likeliest ids whose mass reaches p; ties fall to the lower id.
    """
    order = jnp.argsort(-probabilities, axis=-1, stable=True)
    descending = jnp.take_along_axis(probabilities, order, axis=-1)
    rank = jnp.argsort(order, axis=-1)
    vocab = probabilities.shape[-1]
    top_k = jnp.where(truncation.top_k > 0, truncation.top_k, vocab)[:, None]
    mass = jnp.cumsum(jnp.where(jnp.arange(vocab)[None] < top_k, descending, 0.0), axis=-1)
    reached = mass < truncation.top_p[:, None] * mass[:, -1:]
    count = jnp.where(truncation.top_p[:, None] < 1, 1 + jnp.sum(reached, axis=-1, keepdims=True), vocab)
    likely = probabilities >= truncation.min_p[:, None] * descending[:, :1]
    return (rank < jnp.minimum(top_k, count)) & likely


def draw(logits: Array, truncation: Truncation, temperature: Array, uniform: Array) -> Array:
    """One id a row by inverse CDF, in vocabulary order.

    Args:
      logits: [B, V] from `legal_logits`.
      temperature: [B]; rows at 0 take the argmax.
      uniform: [B] float32 in [0, 1).

    Returns:
      [B] int32 ids.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    truncated = jnp.any((truncation.top_k > 0) | (truncation.top_p < 1) | (truncation.min_p > 0))
    # A sort of the vocabulary at every id is dear, so rows pay for it only when some row asks.
    probabilities = jax.lax.cond(
        truncated,
        lambda p: jnp.where(kept_by_truncation(p, truncation), p, 0.0),
        lambda p: p,
        probabilities,
    )
    mass = jnp.cumsum(probabilities, axis=-1)
    # Of the ids with some mass, the first whose cumulative mass exceeds the draw.
    passed = (mass <= (uniform * mass[:, -1])[:, None]) | (probabilities <= 0)
    drawn = jnp.argmin(passed, axis=-1)
    likeliest = jnp.argmax(probabilities, axis=-1)
    return jnp.where((temperature > 0) & ~jnp.all(passed, axis=-1), drawn, likeliest).astype(jnp.int32)
