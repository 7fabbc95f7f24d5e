"""Supervised loss: negative log-likelihood of the targets (RLBF 1.3 step 5 and L_SFT_guidance of 1.6)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def token_nll(logits: Array, targets: Array) -> Array:
    """Negative log-likelihood of `targets` [...] under float32 `logits` [..., V], in nats."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
