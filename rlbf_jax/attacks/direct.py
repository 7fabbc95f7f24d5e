"""Nothing forced: `direct` asks harmful prompts, `none` harmless ones.
Also what all attack files share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rlbf_jax.attacks.base import Attack, AttackConfig, Attempt, drawn
from rlbf_jax.data.schema import Prompt
from rlbf_jax.data.strange import strange_text
from rlbf_jax.data.world import Pool, World
from rlbf_jax.sampling.request import Request
from rlbf_jax.tokenizers import Tokenizer

__all__ = [
    "SPECS", "Attack", "AttackConfig", "direct", "draw_prompts", "none", "strange_suffix",
    "suffixed",
]  # fmt: skip


_TRIES = 20
"""Draws before a prompt that was drawn already is accepted again."""


def draw_prompts(
    world: World, rng: np.random.Generator, pool: Pool, n: int, *, harmful: bool
) -> list[Prompt]:
    """n prompts, distinct ones as long as the world yields new ones within a few draws."""
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for _ in range(n):
        prompt = world.prompt(rng, pool, harmful=harmful)
        for _ in range(_TRIES):
            if prompt.id not in seen:
                break
            prompt = world.prompt(rng, pool, harmful=harmful)
        seen.add(prompt.id)
        prompts.append(prompt)
    return prompts


def direct(
    world: World, tokenizer: Tokenizer, rng: np.random.Generator, n: int, config: AttackConfig
) -> list[Attempt]:
    """Harmful prompts, nothing forced."""
    prompts = draw_prompts(world, rng, config.pool, n, harmful=True)
    return [Attempt(Request(p.text, knobs=config.knobs), p, "direct") for p in prompts]


def none(
    world: World, tokenizer: Tokenizer, rng: np.random.Generator, n: int, config: AttackConfig
) -> list[Attempt]:
    """Harmless prompts, nothing forced: what the model is for,
    and where every directive is a false one."""
    prompts = draw_prompts(world, rng, config.pool, n, harmful=False)
    return [Attempt(Request(p.text, knobs=config.knobs), p, "none") for p in prompts]


def strange_suffix(
    world: World, tokenizer: Tokenizer, rng: np.random.Generator, n: int, config: AttackConfig
) -> list[Attempt]:
    """Harmless prompts behind which random pieces of the vocabulary stand, as a searched suffix
    looks like: whoever backtracks here backtracks at whatever is strange. Ours."""
    return _followed(world, rng, n, config, lambda: f" {strange_text(tokenizer, rng)}")


def suffixed(
    world: World, rng: np.random.Generator, n: int, config: AttackConfig, suffixes: Sequence[str]
) -> list[Attempt]:
    """`strange_suffix` with suffixes that are there already: what follows the prompt."""
    return _followed(world, rng, n, config, lambda: suffixes[int(rng.integers(len(suffixes)))])


def _followed(
    world: World, rng: np.random.Generator, n: int, config: AttackConfig, suffix: Callable[[], str]
) -> list[Attempt]:
    return [
        Attempt(Request(prompt.text + suffix(), knobs=config.knobs), prompt, "strange_suffix")
        for prompt in draw_prompts(world, rng, config.pool, n, harmful=False)
    ]


SPECS = (
    drawn(none, "a harmless prompt, nothing forced", benign=True, standard=True),
    drawn(direct, "a harmful prompt, nothing forced", standard=True),
    drawn(
        strange_suffix,
        "a harmless prompt with random pieces behind it, nothing forced",
        benign=True,
    ),
)
