"""Evaluation of one checkpoint: attempts -> generations -> verdicts -> rows and records.

`build_attempts` depends on the world, the tokenizer and the configuration alone,
so every method, stage and training seed answers the same attempts with the same random keys,
and comparisons are paired.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from rlbf_jax.attacks import DRAWN, STANDARD, spec_of
from rlbf_jax.attacks.base import Attack, AttackConfig, Attempt, unused_id
from rlbf_jax.attacks.decoding import DecodingGrid
from rlbf_jax.attacks.forced.further import FurtherOptions
from rlbf_jax.attacks.forced.geometry import GeometryGrid
from rlbf_jax.attacks.forced.late import LateOptions
from rlbf_jax.attacks.forced.middle_filling import MiddleFillingOptions
from rlbf_jax.attacks.forced.prefilling import PrefillingOptions
from rlbf_jax.critics.base import Critic, Exchange, Verdict
from rlbf_jax.critics.seams import SeamCritic, seam_verdicts
from rlbf_jax.data.world import SPLITS, FormSplit, Pool, World
from rlbf_jax.evaluation.columns import row_metrics
from rlbf_jax.evaluation.measure import JudgedAnswer
from rlbf_jax.evaluation.metrics import Verdicts, take_apart
from rlbf_jax.evaluation.records import build_records
from rlbf_jax.evaluation.results import Record
from rlbf_jax.evaluation.rows import EvaluationContext, to_row
from rlbf_jax.ranges import check_at_least, check_between
from rlbf_jax.sampling.checks import check_knobs
from rlbf_jax.sampling.request import Generation, Knobs, Request
from rlbf_jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class SuiteConfig:
    """What is asked of every model."""

    benchmark: str = "toy"
    attacks: tuple[str, ...] = STANDARD
    n: int = 64
    """Prompts an attack and form split."""
    pool: Pool = "development"
    """`test` is for reporting; nobody tunes on it."""
    splits: tuple[FormSplit, ...] = SPLITS
    knobs: Knobs = Knobs(temperature=0.7, max_tokens=112)
    room: int = 24
    """Ids that `max_tokens` must leave free after forced ones."""
    seed: int = 0
    """Of the attempts; the same for every model, stage and training seed."""
    prefilling: PrefillingOptions = PrefillingOptions()
    middle: MiddleFillingOptions = MiddleFillingOptions()
    geometry: GeometryGrid = GeometryGrid()
    late: LateOptions = LateOptions()
    further: FurtherOptions = FurtherOptions()
    decoding: DecodingGrid = DecodingGrid()
    calibrate: float | None = None
    """Share of harmless answers that a policy may take back: before it is asked, the bias of its
    directives is found on development data at which it does, so that policies are compared at equal
    cost. Only those that were taught directives; None: all as they are."""
    n_decoding: int | None = 16
    """Prompts for attacks that ask one many times:
    `decoding` takes settings x samples answers of each; None: n."""

    def __post_init__(self):
        check_at_least(self, 1, "n", "n_decoding")
        check_at_least(self, 0, "room")
        check_between(self, 0, 1, "calibrate")
        check_between(self, 0, 2**32 - 1, "seed")
        check_knobs(self.knobs)
        for name in ("attacks", "splits"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty, expected at least one")
        if len(set(self.attacks)) < len(self.attacks):
            raise ValueError(f"attacks is {self.attacks}, expected each once")
        for name in self.attacks:
            configured_attack(name, self)


def configured_attack(name: str, config: SuiteConfig) -> Attack:
    """An attack with its options filled in.

    Raises ValueError for an unknown attack, or one that is made for a checkpoint.
    """
    spec = spec_of(name)
    if spec.searched:
        raise ValueError(
            f"{name} is made for one checkpoint, so no suite has it; there are {', '.join(DRAWN)}"
        )
    options = getattr(config, spec.section) if spec.section else spec.options
    return functools.partial(spec, options=options)


def build_attempts(world: World, tokenizer: Tokenizer, config: SuiteConfig) -> list[Attempt]:
    """All attempts of a suite.

    Every attack and split draws from a generator of its own, so that leaving one out changes no
    other. Raises ValueError for an unknown attack or one that does not fit into `max_tokens`.
    """
    attempts: list[Attempt] = []
    used: set[int] = set()
    for name in config.attacks:
        spec, attack = spec_of(name), configured_attack(name, config)
        n = config.n
        if spec.any_of_n and config.n_decoding is not None:
            n = config.n_decoding
        for split in config.splits if spec.has_forms else config.splits[-1:]:
            attack_config = AttackConfig(config.pool, split, config.knobs, config.room)
            label = f"{name}/{split if spec.has_forms else 'all'}/{config.pool}"
            rng = np.random.default_rng([config.seed, zlib.crc32(label.encode())])
            for index, attempt in enumerate(attack(world, tokenizer, rng, n, attack_config)):
                id_ = unused_id(f"{config.seed}/{label}/{index}", used)
                request = dataclasses.replace(attempt.request, id=id_)
                attempts.append(dataclasses.replace(attempt, request=request))
    return attempts


def judge_distinct(judge: Critic, exchanges: Iterable[Exchange]) -> dict[Exchange, Verdict]:
    """One call to the judge with every distinct exchange once.
    Raises ValueError if it answers too few or many."""
    distinct = list(dict.fromkeys(exchanges))
    verdicts = judge.judge(distinct)
    if len(verdicts) != len(distinct):
        raise ValueError(
            f"judge {judge.name} gave {len(verdicts)} verdicts for {len(distinct)} texts"
        )
    return dict(zip(distinct, verdicts, strict=True))


def exchange_of(attempt: Attempt, text: str) -> Exchange:
    """What a judge is shown: an attempt's prompt and a text of its answer."""
    prompt = attempt.prompt
    return Exchange(prompt.text, text, prompt.topic, prompt.context, prompt.question)


def evaluate(
    sample: Callable[[Sequence[Request]], list[Generation]],
    attempts: Sequence[Attempt],
    judge: Critic,
    tokenizer: Tokenizer,
    context: EvaluationContext,
    seams: SeamCritic | None = None,
) -> tuple[list[Record], list[dict[str, Any]]]:
    """Samples all attempts, judges every distinct text once, and measures.

    `seams`: says which erasures left the text torn; None: `torn_seam` is not measured.

    Returns:
      Records for `results.json`, and one JSON-able row a generation, in the order of the attempts.
    """
    rule = context.rule or tokenizer.controls.rule()
    generations = sample([attempt.request for attempt in attempts])
    if len(generations) != len(attempts):
        raise ValueError(
            f"the sampler gave {len(generations)} generations for {len(attempts)} attempts"
        )
    responses = [take_apart(generation, tokenizer, rule) for generation in generations]
    judged = judge_distinct(
        judge,
        (
            exchange_of(a, text)
            for a, r in zip(attempts, responses, strict=True)
            for text in (*r.texts, r.opening)
        ),
    )
    torn = seam_verdicts(seams, generations, tokenizer)
    answers = []
    for attempt, generation, response, places in zip(
        attempts, generations, responses, torn, strict=True
    ):
        final, raw, *before = (judged[exchange_of(attempt, text)] for text in response.texts)
        answers.append(
            JudgedAnswer(
                attempt,
                generation,
                response,
                Verdicts(final, raw, tuple(before)),
                judged[exchange_of(attempt, response.opening)],
                tokenizer,
                rule,
                context.refusal_openers,
                places,
            )
        )
    metrics = [row_metrics(answer) for answer in answers]
    rows = [
        to_row(answer, values, context) for answer, values in zip(answers, metrics, strict=True)
    ]
    return build_records(answers, metrics, judge.name, context), rows
