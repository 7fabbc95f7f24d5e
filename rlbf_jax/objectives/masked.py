"""Masked sums. A loss term is a (numerator, denominator) pair, reduced once,
after all microbatches."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32


class Term(NamedTuple):
    """A mean that is not yet divided; both float32 scalars."""

    numerator: Float32[Array, ""]
    denominator: Float32[Array, ""]

    @property
    def mean(self) -> Float32[Array, ""]:
        """0 where nothing counted."""
        return self.numerator / jnp.maximum(self.denominator, 1e-8)


def masked_sum(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Sum of x where mask holds. What is masked may be infinite or NaN; its gradient is 0."""
    return jnp.sum(jnp.where(mask, x, 0.0))


def masked_term(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Term:
    """Sum of x where mask holds, over how often it does."""
    return Term(masked_sum(x, mask), jnp.sum(mask, dtype=jnp.float32))


def per_row_mean(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """[B]: mean over time of each row, 0 for rows in which nothing counts."""
    total = jnp.sum(jnp.where(mask, x, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(mask, axis=1), 1)
