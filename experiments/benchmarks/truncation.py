"""Top-k and top-p by thresholds found bit by bit, against two sorts of the vocabulary.

Command: python experiments/benchmarks/truncation.py --json

50 rows of 8,192 ids; half of the rows ask for top-k, half for top-p. `different` counts places in
which the two
disagree: at the last bit of a sum, either may be right.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from common import arguments, compare, report

from rlbf_jax.sampling.distribution import Truncation, kept_by_truncation

ROWS, VOCABULARY = 50, 8192


def by_sorting(probabilities: jax.Array, truncation: Truncation) -> jax.Array:
    """The same set: ids in order of probability, counted and summed from the likeliest down."""
    order = jnp.argsort(-probabilities, axis=-1, stable=True)
    descending = jnp.take_along_axis(probabilities, order, axis=-1)
    rank = jnp.argsort(order, axis=-1)
    vocab = probabilities.shape[-1]
    top_k = jnp.where(truncation.top_k > 0, truncation.top_k, vocab)[:, None]
    mass = jnp.cumsum(jnp.where(jnp.arange(vocab)[None] < top_k, descending, 0.0), axis=-1)
    reached = mass < truncation.top_p[:, None] * mass[:, -1:]
    count = jnp.where(
        truncation.top_p[:, None] < 1, 1 + jnp.sum(reached, axis=-1, keepdims=True), vocab
    )
    return rank < jnp.minimum(top_k, count)


def truncated(repeats: int) -> dict:
    rng = np.random.default_rng(0)
    probabilities = jax.nn.softmax(
        jnp.asarray(rng.normal(size=(ROWS, VOCABULARY)) * 3, jnp.float32)
    )
    top_k = jnp.asarray(rng.integers(1, 200, ROWS) * rng.integers(0, 2, ROWS), jnp.int32)
    top_p = jnp.asarray(np.where(rng.random(ROWS) < 0.5, rng.random(ROWS), 1), jnp.float32)
    knobs = Truncation(top_k, top_p, jnp.zeros(ROWS))
    ours, sorts = jax.jit(kept_by_truncation), jax.jit(by_sorting)
    row = compare(
        "truncation",
        lambda: ours(probabilities, knobs),
        lambda: sorts(probabilities, knobs),
        "two sorts",
        repeats,
    )
    return row | {
        "different": int(jnp.sum(ours(probabilities, knobs) != sorts(probabilities, knobs)))
    }


if __name__ == "__main__":
    args = arguments(__doc__)
    report([truncated(args.repeats)], args.json)
