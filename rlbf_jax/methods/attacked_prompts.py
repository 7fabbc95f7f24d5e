"""What rollouts of reinforcement start from: plain and attacked prompts of the `train` pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from rlbf_jax.attacks import ATTACKS, spec_of
from rlbf_jax.attacks.base import Attempt
from rlbf_jax.attacks.direct import AttackConfig
from rlbf_jax.data.world import FormSplit
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.suite import SuiteConfig, configured_attack
from rlbf_jax.ranges import check_at_least, check_between
from rlbf_jax.runs.run import Run
from rlbf_jax.sampling.request import Knobs
from rlbf_jax.training.rollouts import PromptSource, Rollout, bounded


@dataclasses.dataclass(frozen=True)
class RolloutMix:
    """What rollouts start from, as relative weights. Ours: the paper does not say.

    Without attacked contexts the policy learns to prevent and forgets how to recover, because after
    SFT live violations are too rare to learn from.
    """

    none: float = 0.2
    """Harmless prompts, nothing forced."""
    direct: float = 0.15
    """Harmful prompts, nothing forced."""
    prefilling: float = 0.2
    deep_prefilling: float = 0.1
    middle_filling: float = 0.3
    benign_prefill: float = 0.0
    benign_middle: float = 0.05
    rl_forms: float = 0.7
    """Share of forced violations whose form SFT has not seen."""

    def __post_init__(self):
        weights = [field.name for field in dataclasses.fields(self) if field.name != "rl_forms"]
        check_at_least(self, 0, *weights)
        check_between(self, 0, 1, "rl_forms")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"every weight is 0, expected one of {', '.join(weights)} above 0")

    def shares(self) -> tuple[list[str], np.ndarray]:
        """Attack names and their probabilities."""
        kinds = [field.name for field in dataclasses.fields(self) if field.name in ATTACKS]
        weights = np.asarray([getattr(self, kind) for kind in kinds], np.float64)
        return kinds, weights / weights.sum()


@dataclasses.dataclass(frozen=True)
class Drawn:
    """How prompts are drawn."""

    prompts_per_step: int
    max_drawn: int
    """Most ids a rollout draws itself."""
    knobs: Knobs
    options: SuiteConfig
    """Options of the attacks, see `attack_options`."""


def attack_options(suite: SuiteConfig) -> SuiteConfig:
    """A suite in which only the options of the mix's attacks are the given one's: rollouts have the
    geometry that evaluations have, on other prompts and forms. Nothing else of an evaluation, nor
    an attack that is added to it, decides what is trained."""
    kinds, _ = RolloutMix().shares()
    sections = {s for s in (spec_of(kind).section for kind in kinds) if s is not None}
    chosen = {name: getattr(suite, name) for name in sorted(sections)}
    return SuiteConfig(attacks=("none",), **chosen)


def prompt_source(run: Run, mix: RolloutMix, drawn: Drawn) -> PromptSource:
    """Plain and attacked prompts in the configured shares, a pure function of (seed, step)."""
    kinds, shares = mix.shares()
    world, tokenizer = run.world, run.tokenizer

    def source(step: int) -> list[Rollout]:
        rng = np.random.default_rng([run.seed, 7, step])
        counts = rng.multinomial(drawn.prompts_per_step, shares)
        attempts: list[Attempt] = []
        for kind, count in zip(kinds, counts, strict=True):
            unseen_by_sft = rng.binomial(count, mix.rl_forms)
            splits: tuple[tuple[FormSplit, int], ...] = (
                ("rl", unseen_by_sft),
                ("sft", count - unseen_by_sft),
            )
            for form_split, n in splits:
                if n:
                    where = AttackConfig(pool="train", split=form_split, knobs=drawn.knobs)
                    attack = configured_attack(kind, drawn.options)
                    attempts += attack(world, tokenizer, rng, int(n), where)
        return [Rollout(bounded(a.request, drawn.max_drawn), a.prompt) for a in attempts]

    return source


def check_fits(
    source: PromptSource,
    steps: int,
    encode_prompt: Callable[[str], Sequence[int]],
    room: tuple[int, int],
) -> None:
    """Draws the prompts of some steps.

    `room`: most ids of a prompt, and of a rollout's row with its prompt.

    Raises UserError where an attack finds nothing that fits, or a prompt and its response may have
    more ids than a row.
    """
    try:
        requests = [rollout.request for step in range(steps) for rollout in source(step)]
    except ValueError as error:
        raise UserError(
            f"rollouts: {error} (knobs.max_tokens of rollouts is --rollout_tokens; an attack's "
            "other options are those of --evaluation)"
        ) from error
    max_prompt, width = room
    sizes = [len(encode_prompt(request.prompt)) + request.knobs.max_tokens for request in requests]
    if max(sizes) > width:
        prompt = requests[sizes.index(max(sizes))].prompt
        raise UserError(
            f"max_prompt + rollout_tokens is {width}, but a rollout of {prompt!r} may take "
            f"{max(sizes)} ids; set --max_prompt {max_prompt + max(sizes) - width} or more"
        )
