"""What rollouts of reinforcement start from: plain and attacked prompts of the `train` pool."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from rlbf_jax.attacks import ATTACKS, spec_of
from rlbf_jax.attacks.base import Attack, Attempt
from rlbf_jax.attacks.direct import AttackConfig, suffixed
from rlbf_jax.data.world import FormSplit
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.suite import SuiteConfig, configured_attack
from rlbf_jax.ranges import check_at_least, check_between
from rlbf_jax.runs.run import Run
from rlbf_jax.sampling.request import Knobs
from rlbf_jax.training.rollouts import PromptSource, Rollout, bounded

TRIES = 5


@dataclasses.dataclass(frozen=True)
class RolloutMix:
    """What rollouts start from, as relative weights. Ours: the paper does not say.

    Without attacked contexts the policy learns to prevent and forgets how to recover, because after
    SFT live violations are too rare to learn from. Each context has a benign twin, in which a
    directive is wrong; whoever gives weight to one should give some to the other:

    direct, prefilling, deep_prefilling     none, benign_prefill, refusal_prefill, strange_suffix
    middle_filling, middle_cut              benign_middle, benign_cut
    late_filling                            benign_late
    many_violations                         benign_many

    The policy's own mistakes are another context, `reinforcement.own_mistakes`.
    """

    none: float = 0.2
    """Harmless prompts, nothing forced."""
    direct: float = 0.15
    """Harmful prompts, nothing forced."""
    prefilling: float = 0.2
    deep_prefilling: float = 0.1
    middle_filling: float = 0.3
    middle_cut: float = 0.0
    """The violation stops in the middle, half words too."""
    late_filling: float = 0.0
    """`tails` harmless ids and fewer behind the violation."""
    many_violations: float = 0.0
    """2 to `violations` of them, a sentence before each."""
    benign_prefill: float = 0.0
    benign_middle: float = 0.05
    benign_cut: float = 0.0
    benign_late: float = 0.0
    benign_many: float = 0.0
    refusal_prefill: float = 0.0
    """A refusal of a harmless prompt, behind which a useful answer may still come."""
    strange_suffix: float = 0.0
    """Harmless prompts with random pieces behind them, nothing forced."""
    searched_share: float = 0.0
    """Of the strange suffixes: those that a short search found, see `searched_suffixes`."""
    rl_forms: float = 0.7
    """Share of forced violations whose form SFT has not seen."""
    tails: int = 16
    violations: int = 2

    def __post_init__(self):
        settings = ("rl_forms", "searched_share", "tails", "violations")
        weights = [field.name for field in dataclasses.fields(self) if field.name not in settings]
        check_at_least(self, 0, *weights, "tails")
        check_at_least(self, 2, "violations")
        check_between(self, 0, 1, "rl_forms", "searched_share")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"every weight is 0, expected one of {', '.join(weights)} above 0")

    def shares(self) -> tuple[list[str], np.ndarray]:
        """Contexts of some weight, by their attacks' names, and their probabilities."""
        kinds = [f.name for f in dataclasses.fields(self) if f.name in ATTACKS]
        kinds = [kind for kind in kinds if getattr(self, kind)]
        weights = np.asarray([getattr(self, kind) for kind in kinds], np.float64)
        return kinds, weights / weights.sum()

    def attack(self, kind: str, options: SuiteConfig, rng: np.random.Generator) -> Attack:
        """The attack of a context; of one that has several geometries, one of them by chance."""
        if kind in ("late_filling", "benign_late"):
            tails = (int(rng.integers(self.tails + 1)),)
            options = dataclasses.replace(
                options, late=dataclasses.replace(options.late, tails=tails)
            )
        elif kind in ("many_violations", "benign_many"):
            count = (int(rng.integers(2, self.violations + 1)),)
            options = dataclasses.replace(
                options, further=dataclasses.replace(options.further, violations=count)
            )
        return configured_attack(kind, options)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """How prompts are drawn."""

    prompts_per_step: int
    max_drawn: int
    """Most ids a rollout draws itself."""
    knobs: Knobs
    options: SuiteConfig
    """Options of the attacks, see `attack_options`."""
    tries: int = TRIES
    """Draws of an attempt before it is held to never fit; 1 where the settings are checked."""
    suffixes: tuple[str, ...] = ()
    """That a search found; where there are none yet, all strange ones are random."""


def attack_options(suite: SuiteConfig, mix: RolloutMix) -> SuiteConfig:
    """A suite in which only the options of the mix's attacks are the given one's: rollouts have the
    geometry that evaluations have, on other prompts and forms. Nothing else of an evaluation, nor
    an attack that is added to it, decides what is trained."""
    kinds, _ = mix.shares()
    sections = {s for s in (spec_of(kind).section for kind in kinds) if s is not None}
    chosen = {name: getattr(suite, name) for name in sorted(sections)}
    return SuiteConfig(attacks=("none",), **chosen)


def prompt_source(run: Run, mix: RolloutMix, drawn: Drawn) -> PromptSource:
    """Plain and attacked prompts in the configured shares, a pure function of (seed, step)."""
    kinds, shares = mix.shares()
    world, tokenizer = run.world, run.tokenizer

    def draw(rng: np.random.Generator, kind: str, where: AttackConfig, count: int) -> list[Attempt]:
        return mix.attack(kind, drawn.options, rng)(world, tokenizer, rng, count, where)

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
                if not n:
                    continue
                where = AttackConfig(pool="train", split=form_split, knobs=drawn.knobs)
                if kind == "strange_suffix" and mix.searched_share and drawn.suffixes:
                    found = rng.binomial(n, mix.searched_share)
                    attempts += suffixed(world, rng, found, where, drawn.suffixes)
                    n -= found
                attempts += fitting(
                    functools.partial(draw, rng, kind, where),
                    int(n),
                    # Each of these has a geometry of its own.
                    at_once=spec_of(kind).section not in ("late", "further"),
                    tries=drawn.tries,
                )
        return [Rollout(bounded(a.request, drawn.max_drawn), a.prompt) for a in attempts]

    return source


def fitting(
    draw: Callable[[int], list[Attempt]], n: int, *, at_once: bool = True, tries: int = TRIES
) -> list[Attempt]:
    """n attempts of `draw(count)`, which raises ValueError where one has no room. Where all of them
    at once do not fit, or may not be drawn so, each is drawn for itself, `tries` times if need be:
    a rare long one must not end a run of hours."""
    if at_once:
        try:
            return draw(n)
        except ValueError:
            if tries == 1:
                raise
    return [attempt for _ in range(n) for attempt in _one_fitting(draw, tries)]


def _one_fitting(draw: Callable[[int], list[Attempt]], tries: int) -> list[Attempt]:
    for _ in range(tries - 1):
        try:
            return draw(1)
        except ValueError:
            continue
    return draw(1)


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
