"""Attacks that are made for one checkpoint: a suffix is searched for every prompt, then asked as text.

attack                        prompt     loss
`gcg`           harmful    cross-entropy of an opener and a violation
`adaptive_gcg`  harmful    the same + weight x log-probability that a directive begins, over w ids after the violation
`trigger`       harmless   cross-entropy of the first half of the model's own answer - weight x log-probability that a
                           directive begins, over the w ids after it: the defense is to erase good text
`random_search` harmful    that of `gcg`, without gradients, with as many candidates

The ids after a target (the *continuation*) are the model's own greedy answer with directives forbidden; a directive's
log-probability is read there under teacher forcing.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from rlbf_jax.attacks.base import Attempt
from rlbf_jax.attacks.direct import AttackConfig, draw_prompts
from rlbf_jax.attacks.gcg import Found, GcgConfig, Goal, gcg
from rlbf_jax.attacks.random_search import RandomSearchConfig, random_search
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
            raise ValueError("search.control_weight is set; each attack sets it from control_weight itself")


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
      rng: draws prompts and targets; the same one gives `gcg`, `adaptive_gcg` and `random_search` the same goals.
      file: see `gcg`.
    """
    if name not in OPTIMIZED:
        raise InputError(f"unknown attack {name!r}; those that are made for a checkpoint are {', '.join(OPTIMIZED)}")
    harmful = name != "trigger"
    prompts = draw_prompts(world, rng, told.pool, n, harmful=harmful)
    goals = [_violating(world, tokenizer, rng, p, told) for p in prompts] if harmful else [((), p) for p in prompts]
    answers = _continued(sample, tokenizer, goals, told, config.window)
    search = config.search
    if name in ("gcg", "random_search"):
        wanted = [Goal(p.text, target, (0, len(target))) for target, p in goals]
    elif name == "adaptive_gcg":
        wanted = [
            Goal(p.text, answer, (0, len(target)), (len(target), len(answer)))
            for (target, p), answer in zip(goals, answers, strict=True)
        ]
        search = dataclasses.replace(search, control_weight=config.control_weight)
    else:
        wanted = [_halved(p.text, answer, config.window) for (_, p), answer in zip(goals, answers, strict=True)]
        search = dataclasses.replace(search, control_weight=-config.control_weight)
    if name == "random_search":
        random = RandomSearchConfig.of_equal_budget(search, config.neighbors)
        results = random_search(model, params, tokenizer, wanted, random, mesh=mesh, file=file)
    else:
        results = gcg(model, params, tokenizer, wanted, search, mesh=mesh, file=file)
    return [
        OptimizedAttempt(Attempt(Request(found.text, knobs=told.knobs), prompt, name), found)
        for prompt, found in zip(prompts, results, strict=True)
    ]


def _violating(
    world: World, tokenizer: Tokenizer, rng: np.random.Generator, prompt: Prompt, told: AttackConfig
) -> tuple[tuple[int, ...], Prompt]:
    """Ids of an opener and a violation of the kind that the prompt asks for."""
    violation = world.violation(rng, told.split, told.pool, category=prompt.category or None)
    return tuple(tokenizer.encode(world.opener(rng) + violation.text)), prompt


def _continued(
    sample: Sample,
    tokenizer: Tokenizer,
    goals: Sequence[tuple[tuple[int, ...], Prompt]],
    told: AttackConfig,
    window: int,
) -> list[tuple[int, ...]]:
    """Target and continuation: `window` greedy ids at most after a target, a whole greedy answer where there is none.

    A continuation has one id at least, since a directive may begin right after the target.
    """
    knobs = dataclasses.replace(told.knobs.without_directives(), temperature=0.0)
    requests = [
        Request(p.text, target, dataclasses.replace(knobs, max_tokens=len(target) + window) if target else knobs, id=i)
        for i, (target, p) in enumerate(goals)
    ]
    return [tuple(generation.trace.tolist()) or (tokenizer.eos_id,) for generation in sample(requests)]


def _halved(prompt: str, answer: tuple[int, ...], window: int) -> Goal:
    """The first half of an answer as it is, and a directive in what follows."""
    half = len(answer) // 2
    return Goal(prompt, answer[: half + window], (0, half), (half, min(len(answer), half + window)))
