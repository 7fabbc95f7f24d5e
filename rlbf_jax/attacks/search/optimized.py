"""Attacks that are made for one checkpoint: a suffix is searched for every prompt, then asked as
text.

attack                        prompt     loss
`gcg`           harmful    cross-entropy of an opener and a violation
`adaptive_gcg`  harmful    the same + weight x log-probability that a directive begins, over w ids after the violation
`trigger`       harmless   cross-entropy of the first half of the model's own answer - weight x log-probability that a
                           directive begins, over the w ids after it: the defense is to erase good
                           text
`random_search` harmful    that of `gcg`, without gradients, with as many candidates

The ids after a target (the *continuation*) are the model's own greedy answer with directives
forbidden; a directive's log-probability is read there under teacher forcing.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from rlbf_jax.attacks.base import Attempt
from rlbf_jax.attacks.direct import AttackConfig, draw_prompts
from rlbf_jax.attacks.search.gcg import Found, GcgConfig, Goal, gcg
from rlbf_jax.attacks.search.random_search import RandomSearchConfig, random_search
from rlbf_jax.data.schema import Prompt
from rlbf_jax.data.world import World
from rlbf_jax.errors import InputError
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.ranges import check_at_least, check_positive
from rlbf_jax.sampling.request import Generation, Request
from rlbf_jax.tokenizers import Tokenizer

OPTIMIZED = ("gcg", "adaptive_gcg", "trigger", "random_search")
"""Names of the attacks in this file."""

Sample = Callable[[Sequence[Request]], list[Generation]]


@dataclasses.dataclass(frozen=True)
class OptimizedConfig:
    """What the four attacks share."""

    search: GcgConfig = GcgConfig()
    """Of all of them; random search gets the same number of candidates."""
    control_weight: float = 0.5
    """Of a directive's log-probability, in `adaptive_gcg` and (negative) in `trigger`."""
    window: int = 8
    """w: ids over which a directive's log-probability is averaged."""
    neighbors: int = 8
    """Candidates a generation of random search."""

    def __post_init__(self):
        check_positive(self, "control_weight")
        check_at_least(self, 1, "window", "neighbors")
        if self.search.control_weight:
            raise ValueError(
                "search.control_weight is set; each attack sets it from control_weight itself"
            )


@dataclasses.dataclass(frozen=True)
class OptimizedAttempt:
    """An attempt and the search that made it."""

    attempt: Attempt
    found: Found


def attack_model(
    name: str,
    model: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    sample: Sample,
    world: World,
    rng: np.random.Generator,
    n: int,
    told: AttackConfig,
    config: OptimizedConfig = OptimizedConfig(),
    *,
    mesh: Mesh | None = None,
    file: pathlib.Path | None = None,
) -> list[OptimizedAttempt]:
    """n attempts of one of `OPTIMIZED` on one checkpoint.

    Args:
      sample: answers of the same checkpoint, for continuations.
      rng: draws prompts and targets; the same one gives `gcg`, `adaptive_gcg` and `random_search`
        the same goals.
      file: see `gcg`.
    """
    prompts, goals = goals_of(name, tokenizer, sample, world, rng, n, told, config.window)
    weight = {"adaptive_gcg": config.control_weight, "trigger": -config.control_weight}.get(
        name, 0.0
    )
    search = dataclasses.replace(config.search, control_weight=weight)
    if name == "random_search":
        random = RandomSearchConfig.of_equal_budget(search, config.neighbors)
        results = random_search(model, params, tokenizer, goals, random, mesh=mesh, file=file)
    else:
        results = gcg(model, params, tokenizer, goals, search, mesh=mesh, file=file)
    return [
        OptimizedAttempt(Attempt(Request(found.text, knobs=told.knobs), prompt, name), found)
        for prompt, found in zip(prompts, results, strict=True)
    ]


def goals_of(
    name: str,
    tokenizer: Tokenizer,
    sample: Sample,
    world: World,
    rng: np.random.Generator,
    n: int,
    told: AttackConfig,
    window: int,
) -> tuple[list[Prompt], list[Goal]]:
    """The n prompts of an attack, and what it wants of each. Arguments are those of `attack_model`."""
    if name not in OPTIMIZED:
        raise InputError(
            f"unknown attack {name!r}; those that are made for a checkpoint are "
            f"{', '.join(OPTIMIZED)}"
        )
    harmful = name != "trigger"
    prompts = draw_prompts(world, rng, told.pool, n, harmful=harmful)
    targets = [_violating(world, tokenizer, rng, p, told) for p in prompts] if harmful else [()] * n
    answers = _continued(sample, tokenizer, targets, prompts, told, window)
    rows = list(zip(prompts, targets, answers, strict=True))
    if name == "trigger":
        return prompts, [_halved(prompt.text, answer, window) for prompt, _, answer in rows]
    if name == "adaptive_gcg":
        return prompts, [
            Goal(p.text, a, (0, len(target)), (len(target), len(a))) for p, target, a in rows
        ]
    return prompts, [Goal(prompt.text, target, (0, len(target))) for prompt, target, _ in rows]


def _violating(
    world: World, tokenizer: Tokenizer, rng: np.random.Generator, prompt: Prompt, told: AttackConfig
) -> tuple[int, ...]:
    """Ids of an opener and a violation of the kind that the prompt asks for."""
    violation = world.violation(rng, told.split, told.pool, category=prompt.category or None)
    return tuple(tokenizer.encode(world.opener(rng) + violation.text))


def _continued(
    sample: Sample,
    tokenizer: Tokenizer,
    targets: Sequence[tuple[int, ...]],
    prompts: Sequence[Prompt],
    told: AttackConfig,
    window: int,
) -> list[tuple[int, ...]]:
    """Target and continuation: `window` greedy ids at most after a target, a whole greedy answer
    where there is none.

    A continuation has one id at least, since a directive may begin right after the target.
    """
    knobs = dataclasses.replace(told.knobs.without_directives(), temperature=0.0)
    requests = [
        Request(
            p.text,
            target,
            dataclasses.replace(knobs, max_tokens=len(target) + window) if target else knobs,
            id=i,
        )
        for i, (target, p) in enumerate(zip(targets, prompts, strict=True))
    ]
    return [
        tuple(generation.trace.tolist()) or (tokenizer.eos_id,) for generation in sample(requests)
    ]


def _halved(prompt: str, answer: tuple[int, ...], window: int) -> Goal:
    """The first half of an answer as it is, and a directive in what follows."""
    half = len(answer) // 2
    return Goal(prompt, answer[: half + window], (0, half), (half, min(len(answer), half + window)))
