"""The BSAFE+ builder: an injected violation, a directive that takes it back, and the safe rest.

After RLBF (arXiv 2602.08377), section 3 and appendix A.1. The paper writes the input without the
violation although X counts its tokens; we train on

    prompt + part1 + bridge + violation + directive + part2

with loss on the directive and part2 only, the one reading under which X refers to text
that is there. X = all ids between part1 and the directive, so that the visible ids after it
are exactly part1 + part2. Several violations (ours) are taken back by a directive each, the last
one first; X of each reaches to the one before.
"""

from __future__ import annotations

import functools

import numpy as np

from rlbf_jax.data.builders.examples import Built, Rejection, collect, plain_example
from rlbf_jax.data.builders.injection import (
    BsafePlusConfig,
    InjectedIds,
    Injector,
    build_injected,
    injected_example,
)
from rlbf_jax.data.schema import Example, Injection
from rlbf_jax.data.world import Pool, World
from rlbf_jax.directives import BacktrackRule
from rlbf_jax.tokenizers import Tokenizer


def backtrack(
    rule: BacktrackRule, config: BsafePlusConfig, ids: InjectedIds
) -> list[int] | Rejection:
    """`[CATEGORY_c] [BACKTRACK_BY_X]` and part2, one directive for each violation, the last one
    first; several, where X is split; a rejection where X is beyond x_max (`refuse`)."""
    directives: list[int] = []
    for category, taken in reversed(ids.stretches):
        if len(taken) > rule.x_max and config.on_too_long == "refuse":
            return Rejection("X beyond x_max")
        for start in range(0, len(taken), rule.x_max):
            amount = min(rule.x_max, len(taken) - start)
            directives += [rule.category_id(category), rule.backtrack_id(amount)]
    return [*directives, *ids.part2]


def to_example(
    injection: Injection,
    tokenizer: Tokenizer,
    config: BsafePlusConfig,
    *,
    violation_cut: float | None = None,
) -> Example | Rejection:
    """Tokenizes an injection with its directive; see `injection.injected_example`."""
    take_back = functools.partial(backtrack, backtrack_rule(tokenizer), config)
    return injected_example(injection, tokenizer, config, take_back, violation_cut)


def backtrack_rule(tokenizer: Tokenizer) -> BacktrackRule:
    """The backtrack rule of a vocabulary. Raises ValueError where it has no such control ids."""
    rule = tokenizer.controls.rule("backtrack")
    assert isinstance(rule, BacktrackRule)
    return rule


def build_bsafe_plus(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    config: BsafePlusConfig,
    num_examples: int,
    *,
    injector: Injector | None = None,
) -> Built:
    """Injected and plain examples, see `injection.build_injected`.

    Raises:
        ValueError: the tokenizer lacks a category of the world, or nearly all draws are rejected.
    """
    rule = backtrack_rule(tokenizer)
    missing = set(world.categories) - set(rule.categories)
    if missing:
        raise ValueError(
            f"the tokenizer has no control id for the categories {', '.join(sorted(missing))}; "
            "retrain it"
        )
    take_back = functools.partial(backtrack, rule, config)
    return build_injected(world, tokenizer, rng, config, num_examples, take_back, injector)


def build_refusal(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    config: BsafePlusConfig,
    num_examples: int,
) -> Built:
    """The refusal baseline: harmful prompts get a refusal, harmless ones their answer;
    no directive anywhere.

    `share_harmful` and `share_other_pools` are those of the config; the rest of it plays no role.
    """

    def draw() -> tuple[str, Example | Rejection]:
        if rng.random() < config.share_harmful:
            prompt = world.prompt(rng, "train", harmful=True)
            return "refusal", plain_example(
                prompt.text, world.refusal(rng, prompt), tokenizer, config.max_tokens
            )
        pool: Pool = "train"
        if rng.random() < config.share_other_pools:
            pool = "development" if rng.random() < 0.5 else "test"
        prompt = world.prompt(rng, pool)
        return "plain", plain_example(
            prompt.text, world.answer(rng, prompt), tokenizer, config.max_tokens
        )

    return collect(draw, num_examples)
