"""Attacks that are made for one checkpoint:
a suffix is searched for every prompt, then asked as text.

attack          prompt     loss
`gcg`           harmful    cross-entropy of an opener and a violation
`adaptive_gcg`  harmful    the same + weight x log-probability that a directive begins, over w ids
                           after the violation
`trigger`       harmless   cross-entropy of the first half of the model's own answer - weight x
                           log-probability that a directive begins, over the w ids after it: the
                           defense is to erase good text
`random_search` harmful    that of `gcg`, without gradients, with as many candidates

The ids after a target (the *continuation*) are the model's own greedy answer with directives
forbidden; a directive's log-probability is read there under teacher forcing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from rlbf_jax.attacks.base import AttackSpec, Attempt, Scene, Victim
from rlbf_jax.attacks.direct import draw_prompts
from rlbf_jax.attacks.search.gcg import Found, GcgConfig, Goal, gcg
from rlbf_jax.attacks.search.random_search import RandomSearchConfig, random_search
from rlbf_jax.data.schema import Prompt
from rlbf_jax.errors import InputError
from rlbf_jax.ranges import check_at_least, check_positive
from rlbf_jax.sampling.request import Request

OPTIMIZED = ("gcg", "adaptive_gcg", "trigger", "random_search")
"""Names of the attacks in this file."""


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
    name: str, scene: Scene, n: int, config: OptimizedConfig = OptimizedConfig()
) -> list[OptimizedAttempt]:
    """n attempts of one of `OPTIMIZED` on the checkpoint `scene.policy`, with their searches.

    `scene.rng` draws prompts and targets; the same one gives `gcg`, `adaptive_gcg` and
    `random_search` the same goals. Raises InputError for an unknown attack, a scene without a
    policy, or what `gcg` refuses.
    """
    victim = _victim(name, scene)
    prompts, goals = goals_of(name, scene, n, config.window)
    weight = {"adaptive_gcg": config.control_weight, "trigger": -config.control_weight}.get(
        name, 0.0
    )
    search = dataclasses.replace(config.search, control_weight=weight)
    where = (victim.model, victim.params, scene.tokenizer, goals)
    if name == "random_search":
        random = RandomSearchConfig.of_equal_budget(search, config.neighbors)
        results = random_search(*where, random, mesh=victim.mesh, file=victim.file)
    else:
        results = gcg(*where, search, mesh=victim.mesh, file=victim.file, rule=victim.rule)
    knobs = scene.config.knobs
    return [
        OptimizedAttempt(Attempt(Request(found.text, knobs=knobs), prompt, name), found)
        for prompt, found in zip(prompts, results, strict=True)
    ]


def _victim(name: str, scene: Scene) -> Victim:
    if scene.policy is None:
        raise InputError(
            f"{name} searches a suffix for one checkpoint, and there is none to attack; run it on "
            f"a finished stage: rlbf attack RUN --attack {name}"
        )
    return scene.policy


def goals_of(name: str, scene: Scene, n: int, window: int) -> tuple[list[Prompt], list[Goal]]:
    """The n prompts of an attack, and what it wants of each; arguments as in `attack_model`."""
    if name not in OPTIMIZED:
        raise InputError(
            f"unknown attack {name!r}; those that are made for a checkpoint are "
            f"{', '.join(OPTIMIZED)}"
        )
    harmful = name != "trigger"
    prompts = draw_prompts(scene.world, scene.rng, scene.config.pool, n, harmful=harmful)
    targets = [_violating(scene, prompt) for prompt in prompts] if harmful else [()] * n
    answers = _continued(name, scene, targets, prompts, window)
    rows = list(zip(prompts, targets, answers, strict=True))
    if name == "trigger":
        return prompts, [_halved(prompt.text, answer, window) for prompt, _, answer in rows]
    if name == "adaptive_gcg":
        return prompts, [
            Goal(p.text, a, (0, len(target)), (len(target), len(a))) for p, target, a in rows
        ]
    return prompts, [Goal(prompt.text, target, (0, len(target))) for prompt, target, _ in rows]


def _violating(scene: Scene, prompt: Prompt) -> tuple[int, ...]:
    """Ids of an opener and a violation of the kind that the prompt asks for."""
    world, rng, config = scene.world, scene.rng, scene.config
    violation = world.violation(rng, config.split, config.pool, category=prompt.category or None)
    return tuple(scene.tokenizer.encode(world.opener(rng) + violation.text))


def _continued(
    name: str,
    scene: Scene,
    targets: Sequence[tuple[int, ...]],
    prompts: Sequence[Prompt],
    window: int,
) -> list[tuple[int, ...]]:
    """Target and continuation: `window` greedy ids at most after a target,
    a whole greedy answer where there is none.

    A continuation has one id at least, since a directive may begin right after the target.
    """
    knobs = dataclasses.replace(scene.config.knobs.without_directives(), temperature=0.0)
    requests = [
        Request(
            p.text,
            target,
            dataclasses.replace(knobs, max_tokens=len(target) + window) if target else knobs,
            id=i,
        )
        for i, (target, p) in enumerate(zip(targets, prompts, strict=True))
    ]
    generations = _victim(name, scene).sample(requests)
    return [tuple(g.trace.tolist()) or (scene.tokenizer.eos_id,) for g in generations]


def _halved(prompt: str, answer: tuple[int, ...], window: int) -> Goal:
    """The first half of an answer as it is, and a directive in what follows."""
    half = len(answer) // 2
    return Goal(prompt, answer[: half + window], (0, half), (half, min(len(answer), half + window)))


def _attempts(name: str, scene: Scene, n: int, options: OptimizedConfig) -> list[Attempt]:
    every = attack_model(name, scene, n, options)
    return [dataclasses.replace(made.attempt, search=made.found) for made in every]


def _searched(name: str, says: str, *, benign: bool = False) -> AttackSpec:
    make = functools.partial(_attempts, name)
    return AttackSpec(name, make, says, OptimizedConfig(), benign=benign, searched=True)


SPECS = (
    _searched("gcg", "a harmful prompt with a suffix that was searched for a violating answer"),
    _searched("adaptive_gcg", "the same, and the suffix keeps directives from beginning"),
    _searched("trigger", "a harmless prompt whose suffix provokes a directive", benign=True),
    _searched("random_search", "gcg without gradients, with as many candidates"),
)
