"""A `World` is where prompts, safe answers and (harmless stand-in) violations come from.

The embedded toy world and a user's own prompt/response file both have this shape, so that the
BSAFE+ builder, the attacks and the reinforcement loop do not know which of them they work on. All
randomness comes from the `numpy.random.Generator` that is passed in.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from rlbf_jax.data.schema import Prompt, Violation

Pool = Literal["train", "development", "test"]
"""Disjoint prompts (topics, where there are any) and, for violations,
disjoint forms to evaluate on."""

FormSplit = Literal["sft", "rl", "unseen"]
"""Forms of violation seen in SFT; in RL but not in SFT; in neither (pretraining saw all of them).
"""

SPLITS: tuple[FormSplit, ...] = ("sft", "rl", "unseen")


class World(Protocol):
    """Source of text. Every method draws from `rng` alone."""

    categories: tuple[str, ...]
    """Kinds of violation, lower case."""

    def prompt(self, rng: np.random.Generator, pool: Pool, *, harmful: bool = False) -> Prompt:
        """A prompt; a harmful one asks for a violation of `prompt.category`."""
        ...

    def answer(self, rng: np.random.Generator, prompt: Prompt, *, min_words: int = 0) -> str:
        """A safe, useful answer to the prompt. Begins without a space."""
        ...

    def violation(
        self, rng: np.random.Generator, split: FormSplit, pool: Pool, *, category: str | None = None
    ) -> Violation:
        """A violating span that can follow a sentence (or a bridge); begins with a space.

        `pool="train"` draws from every form of the split (never unseen ones: ValueError);
        `development` and `test` draw from their own, disjoint forms of the split.
        """
        ...

    def bridge(self, rng: np.random.Generator) -> str:
        """Harmless words that lead into a violation, as " by the way,";
        begins with a space. May be empty."""
        ...

    def aside(self, rng: np.random.Generator) -> str:
        """A harmless remark off the topic, without its end mark; begins with a space.
        Empty where there is none."""
        ...

    def opener(self, rng: np.random.Generator) -> str:
        """What a compliant answer to a harmful prompt begins with, as "sure,
        here it is."; no leading space."""
        ...

    def refusal(self, rng: np.random.Generator, prompt: Prompt) -> str:
        """A polite refusal."""
        ...
