"""Small tokenizers of the toy world, and examples taken apart."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from rlbf_jax.data.builders.injection import BsafePlusConfig, InjectedIds, build_injected
from rlbf_jax.data.schema import Example
from rlbf_jax.data.worlds.toy_world import ToyWorld
from rlbf_jax.directives import EditRule
from rlbf_jax.tokenizers import Tokenizer, train_tokenizer


def toy_tokenizer(world: ToyWorld, kinds: tuple[str, ...]) -> Tokenizer:
    rng = np.random.default_rng(0)
    documents = [world.document(rng) for _ in range(300)]
    texts = [text for d in documents for text in (d.prompt.text, d.response)]
    return train_tokenizer(texts, 700, world.categories, 40, kinds=kinds)


def injected(
    world: ToyWorld, kind: str, take_back: Callable[[EditRule, InjectedIds], list[int]]
) -> tuple[Tokenizer, EditRule, list[Example]]:
    """(tokenizer, rule, examples) of a rule's kind: every shape of injection, none plain."""
    tokenizer = toy_tokenizer(world, (kind,))
    rule = tokenizer.controls.rule(kind)
    config = BsafePlusConfig(share_plain=0.0, max_tokens=256)
    rng = np.random.default_rng(0)
    taking_back = functools.partial(take_back, rule)
    examples, _ = build_injected(world, tokenizer, rng, config, 60, taking_back)
    return tokenizer, rule, examples


def responses_of(example: Example) -> tuple[list[int], np.ndarray]:
    """(ids of the response, which of them are in the loss)."""
    start = example.prompt_length
    assert not example.in_loss[:start].any()
    return example.tokens[start:].tolist(), example.in_loss[start:]
