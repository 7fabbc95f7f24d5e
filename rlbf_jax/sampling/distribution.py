"""From logits to a drawn id: the same distribution in the sampler, the scorer and every trainer.

log-probabilities = log_softmax((logits + control bias, illegal ids at -inf) / temperature).

Truncation (top-k, top-p, min-p) only narrows what is drawn; recorded log-probabilities are those
above, so that a scorer reproduces them from the trace alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32, Int32

from rlbf_jax.directives import EditRule, Legal
from rlbf_jax.parallel.parts import Part, has_parts, over_parts
from rlbf_jax.parallel.tables import pick

ONE_BLOCK, BLOCK = 2048, 512
"""Ids of the largest vocabulary that is drawn from in one step, and ids of a block of larger ones.
"""


NOT_FINITE, NONE_LEGAL = -1, -2
"""What is drawn in place of an id from logits that hold NaN or infinity, and from logits that are
-inf everywhere: no id, so that nobody takes it for one."""


class Truncation(NamedTuple):
    """One number a row; 0, 1 and 0 keep all ids."""

    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]


def legal_logits(
    rule: EditRule,
    logits: Float32[Array, "*batch V"],
    legal: Legal,
    control_bias: Float32[Array, "*#batch C"],
    temperature: Float32[Array, "*#batch"],
) -> Float32[Array, "*batch V"]:
    """Tempered logits with illegal ids at -inf.

    Args:
      logits: [..., V] float32.
      legal: [...] bool each.
      control_bias: [..., C] float32, added to the logits of the rule's C control ids.
      temperature: [...] float32. 0 is greedy, and log-probabilities
        are then those at temperature 1.
    """
    vocab = logits.shape[-1]
    after = vocab - rule.end_id
    bias = jnp.pad(control_bias, [(0, 0)] * (control_bias.ndim - 1) + [(rule.first_id, after)])
    tempered = (logits + bias) / jnp.where(temperature > 0, temperature, 1.0)[..., None]
    return jnp.where(rule.legal_ids(legal, vocab), tempered, -jnp.inf)


def kept_by_truncation(
    probabilities: Float32[Array, "B V"], truncation: Truncation
) -> Bool[Array, "B V"]:
    """[B, V] bool: ids that survive top-k, then top-p on what is left (renormalized), and min-p.

    Top-p keeps the smallest set of likeliest ids whose mass reaches p; ties fall to the lower id.
    Nothing is sorted: the smallest probability that survives is found bit by bit, for floats that
    are not negative compare as their bits.
    """
    everything = jnp.ones(probabilities.shape, bool)
    # Sweeps of the vocabulary are dear: each kind is made only when some row asks for it.
    kept = jax.lax.cond(
        jnp.any(truncation.top_k > 0),
        lambda: _kept_by_top_k(probabilities, truncation.top_k),
        lambda: everything,
    )
    kept = jax.lax.cond(
        jnp.any(truncation.top_p < 1),
        lambda: _kept_by_top_p(probabilities, kept, truncation.top_p),
        lambda: kept,
    )
    return kept & (
        probabilities >= truncation.min_p[:, None] * jnp.max(probabilities, axis=-1, keepdims=True)
    )


def _kept_by_top_k(
    probabilities: Float32[Array, "B V"], top_k: Int32[Array, " B"]
) -> Bool[Array, "B V"]:
    vocab = probabilities.shape[-1]
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)
    top_k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    least = _largest(lambda bound: jnp.sum(bits >= bound, axis=-1) >= top_k, probabilities.shape[0])
    above = bits > least
    return above | _first(bits == least, top_k - jnp.sum(above, axis=-1))


def _kept_by_top_p(
    probabilities: Float32[Array, "B V"], kept: Bool[Array, "B V"], top_p: Float32[Array, " B"]
) -> Bool[Array, "B V"]:
    """Of what was kept so far; rows at 1 keep all of it."""

    left = jnp.where(kept, probabilities, -1.0)

    def mass(chosen: Array) -> Array:
        return jnp.sum(jnp.where(chosen, left, 0.0), axis=-1)

    def at(bits: Array) -> Array:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    # Something is wanted always: the least p is rounded to 0.
    wanted = jnp.maximum(top_p * mass(kept), jnp.finfo(jnp.float32).tiny)
    least = at(_largest(lambda bound: mass(left >= at(bound)) >= wanted, left.shape[0]))
    above = left > least
    count = jnp.ceil((wanted - mass(above)) / jnp.maximum(least[:, 0], jnp.finfo(jnp.float32).tiny))
    nucleus = above | _first(left == least, jnp.clip(count, 1, left.shape[-1]).astype(jnp.int32))
    return jnp.where(top_p[:, None] < 1, nucleus, kept)


def _largest(holds: Callable[[Array], Array], rows: int) -> Array:
    """[B, 1] int32: the largest value of which `holds` ([B, 1] -> [B] bool) is true;
    it is of all smaller ones."""

    def try_bit(step: Array, found: Array) -> Array:
        higher = found | (1 << (30 - step))
        return jnp.where(holds(higher)[:, None], higher, found)

    return jax.lax.fori_loop(0, 31, try_bit, jnp.zeros((rows, 1), jnp.int32))


def _first(chosen: Array, count: Array) -> Array:
    """[B, V] bool: the first `count` [B] of the chosen ids."""

    def own(part: Part, chosen: Array, count: Array) -> Array:
        held = part.gathered(jnp.sum(chosen, axis=-1))
        before = jnp.where(jnp.arange(held.shape[1]) < part.number, held, 0)
        return chosen & (jnp.cumsum(chosen, axis=-1) <= (count - jnp.sum(before, axis=-1))[:, None])

    def first() -> Array:
        if has_parts(chosen):
            return over_parts(own, chosen, count, whole=True)
        return chosen & (jnp.cumsum(chosen, axis=-1) <= count[:, None])

    return jax.lax.cond(
        jnp.any(jnp.sum(chosen, axis=-1) > count),
        first,
        lambda: chosen,
    )


def draw(
    logits: Float32[Array, "B V"],
    truncation: Truncation,
    temperature: Float32[Array, " B"],
    uniform: Float32[Array, " B"],
) -> Int32[Array, " B"]:
    """One id a row by inverse CDF, in vocabulary order.

    Args:
      logits: [B, V] from `legal_logits`.
      temperature: [B]; rows at 0 take the argmax.
      uniform: [B] float32 in [0, 1).

    Returns:
      [B] int32 ids; `NOT_FINITE` or `NONE_LEGAL` for a row that says nothing of any id.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    # One logit that is not finite makes all of a row's probabilities NaN.
    broken = jnp.isnan(pick(probabilities, jnp.zeros(uniform.shape, jnp.int32)))
    why = jnp.where(jnp.max(logits, axis=-1) == -jnp.inf, NONE_LEGAL, NOT_FINITE)
    truncated = jnp.any((truncation.top_k > 0) | (truncation.top_p < 1) | (truncation.min_p > 0))
    # Many sweeps of the vocabulary at every id are dear,
    # so rows pay for it only when some row asks.
    probabilities = jax.lax.cond(
        truncated,
        lambda p: jnp.where(kept_by_truncation(p, truncation), p, 0.0),
        lambda p: p,
        probabilities,
    )
    drawn = _drawn(probabilities, uniform, temperature)
    return jnp.where(broken, why, drawn).astype(jnp.int32)


def _drawn(weights: Array, uniform: Array, temperature: Array) -> Array:
    """[B]: by inverse CDF, and where the temperature is 0 the likeliest.

    Of weights that are divided among devices, each sums up what it has, and the one that the share
    falls to draws: blocks once more, of a device's size.
    """
    if not has_parts(weights):
        drawn = _inverse_cdf(weights, uniform)
        return jnp.where(temperature > 0, drawn, _likeliest(weights))

    def own(part: Part, weights: Array, uniform: Array, temperature: Array) -> Array:
        chosen, rest = _first_beyond(part.gathered(jnp.sum(weights, axis=-1)), uniform)
        highest = jnp.argmax(part.gathered(jnp.max(weights, axis=-1)), axis=-1)
        chosen = jnp.where(temperature > 0, chosen, highest)
        drawn = jnp.where(temperature > 0, _inverse_cdf(weights, rest), _likeliest(weights))
        drawn += part.number * weights.shape[1]
        return part.total(jnp.where(chosen == part.number, drawn, 0))

    return over_parts(own, weights, uniform, temperature)


def _inverse_cdf(
    weights: Float32[Array, "B V"], uniform: Float32[Array, " B"]
) -> Int32[Array, " B"]:
    """[B]: of the columns of [B, V] with some weight,
    the first whose cumulative weight exceeds the share `uniform`.

    A cumulative sum of many columns is dear, so a block of them is chosen first,
    and then one of its columns.
    """
    if weights.shape[-1] <= ONE_BLOCK:
        return _first_beyond(weights, uniform)[0]
    blocks = _blocks(weights)
    block, rest = _first_beyond(jnp.sum(blocks, axis=-1), uniform)
    return block * BLOCK + _first_beyond(_take_block(blocks, block), rest)[0]


def _first_beyond(weights: Array, uniform: Array) -> tuple[Array, Array]:
    """[B] column whose cumulative weight is the first to exceed the share,
    and how far into it the share reaches."""
    mass = jnp.cumsum(weights, axis=-1)
    target = uniform * mass[:, -1]
    # Rounding may raise the sum where no weight is, and leave nothing beyond.
    passed = (mass <= target[:, None]) | (weights <= 0)
    place = jnp.where(
        jnp.all(passed, axis=-1), jnp.argmax(weights, axis=-1), jnp.argmin(passed, axis=-1)
    )
    end, width = (jnp.take_along_axis(x, place[:, None], axis=1)[:, 0] for x in (mass, weights))
    return place, jnp.clip((target - (end - width)) / width, 0, 1)


def _likeliest(weights: Float32[Array, "B V"]) -> Int32[Array, " B"]:
    """[B]: the argmax of [B, V], the lower one of a tie. In two steps, for XLA's on CPU is slow."""
    blocks = _blocks(weights)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    return block * BLOCK + jnp.argmax(_take_block(blocks, block), axis=-1)


def _blocks(weights: Array) -> Array:
    """[B, V] -> [B, n, BLOCK], made up with zeros."""
    rows, vocab = weights.shape
    return jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK))).reshape(rows, -1, BLOCK)


def _take_block(blocks: Array, block: Array) -> Array:
    """[B, n, S] and [B] -> [B, S]."""
    return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
