"""Small tokenizers of the toy world, and examples taken apart."""

from __future__ import annotations

import numpy as np

from rlbf_jax.data.schema import Example
from rlbf_jax.data.worlds.toy_world import ToyWorld
from rlbf_jax.tokenizers import Tokenizer, train_tokenizer


def toy_tokenizer(world: ToyWorld, kinds: tuple[str, ...]) -> Tokenizer:
    rng = np.random.default_rng(0)
    documents = [world.document(rng) for _ in range(300)]
    texts = [text for d in documents for text in (d.prompt.text, d.response)]
    return train_tokenizer(texts, 700, world.categories, 40, kinds=kinds)


def responses_of(example: Example) -> tuple[list[int], np.ndarray]:
    """(ids of the response, which of them are in the loss)."""
    start = example.prompt_length
    assert not example.in_loss[:start].any()
    return example.tokens[start:].tolist(), example.in_loss[start:]
