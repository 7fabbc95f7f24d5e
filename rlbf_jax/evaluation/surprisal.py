"""How surprised a model is by each id of a text: one teacher-forced pass, without directives."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.transformer import ModelConfig
from rlbf_jax.objectives.sft import token_nll
from rlbf_jax.parallel.placing import fetched
from rlbf_jax.sampling.scoring import in_time_chunks

WIDTH = 64
"""Texts are padded to multiples of so many ids, so few programs compile."""


def surprisals(
    config: ModelConfig,
    params: dict,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = 32,
) -> list[np.ndarray]:
    """Of each (prompt ids, text ids) pair, in order: float64 [n], nats of each id of the text.

    Raises ValueError for an empty prompt or text: the first id of a text needs one before it.
    """
    for number, (prompt, text) in enumerate(pairs):
        if not prompt or not text:
            raise ValueError(f"pair {number}: the {'text' if prompt else 'prompt'} is empty")
    groups: dict[int, list[int]] = {}
    for number, (prompt, text) in enumerate(pairs):
        width = transformer.padded_width(config, len(prompt) + len(text), WIDTH)
        groups.setdefault(width, []).append(number)
    found: dict[int, np.ndarray] = {}
    for width, numbers in groups.items():
        for start in range(0, len(numbers), batch_size):
            part = numbers[start : start + batch_size]
            tokens = np.zeros((batch_size, width), np.int32)
            for row, number in enumerate(part):
                prompt, text = pairs[number]
                tokens[row, : len(prompt) + len(text)] = [*prompt, *text]
            nll = np.asarray(fetched(_nll(config, params, tokens)), np.float64)
            for row, number in enumerate(part):
                prompt, text = pairs[number]
                found[number] = nll[row, len(prompt) - 1 :][: len(text)]
    return [found[number] for number in range(len(pairs))]


@functools.partial(jax.jit, static_argnums=0)
def _nll(config: ModelConfig, params: dict, tokens: jax.Array) -> jax.Array:
    """[B, T - 1]: column t is of the id in column t + 1. Padding stands on the right, where no id
    of a text sees it."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = transformer.forward(config, params, tokens, Visibility(position))

    def read(params: dict, knobs: tuple, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return token_nll(transformer.unembed(config, params, hidden), targets)

    return in_time_chunks(read, params, (), (hidden[:, :-1], tokens[:, 1:]), config.vocab_size)
