"""Evaluation of one checkpoint: attempts -> generations -> verdicts -> rows and records.

`build_attempts` depends on the world, the tokenizer and the configuration alone, so every method,
stage and training seed answers the same attempts with the same random keys, and comparisons are
paired.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlbf_jax.attacks import ATTACKS, HAS_FORMS, STANDARD
from rlbf_jax.attacks.base import Attempt, unused_id
from rlbf_jax.attacks.decoding import DecodingGrid
from rlbf_jax.attacks.direct import Attack, AttackConfig
from rlbf_jax.attacks.forced.further import FurtherOptions
from rlbf_jax.attacks.forced.geometry import GeometryGrid
from rlbf_jax.attacks.forced.middle_filling import MiddleFillingOptions
from rlbf_jax.attacks.forced.prefilling import PrefillingOptions
from rlbf_jax.critics.base import Critic, Exchange, Verdict
from rlbf_jax.data.world import SPLITS, FormSplit, Pool, World
from rlbf_jax.evaluation.backtracking_metrics import (
    BACKTRACKING_COUNTS,
    BACKTRACKING_METRICS,
    any_of_n,
    backtracking_row_metrics,
    quantiles_of,
)
from rlbf_jax.evaluation.intervals import Interval, interval
from rlbf_jax.evaluation.metrics import COUNTS, METRICS, Verdicts, row_metrics, take_apart
from rlbf_jax.evaluation.results import Record
from rlbf_jax.evaluation.rows import LONG_PREFIX_WORDS, EvaluationContext, knobs_to_json, to_row
from rlbf_jax.ranges import check_at_least, check_between
from rlbf_jax.sampling.request import Generation, Knobs, Request
from rlbf_jax.sampling.sampler import check_knobs
from rlbf_jax.tokenizers import Tokenizer

ALL_METRICS = METRICS + BACKTRACKING_METRICS
ANY_OF_N = ("asr", "leak", "emitted")
"""Metrics that `decoding` reads as: any of a prompt's n answers."""


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
    further: FurtherOptions = FurtherOptions()
    decoding: DecodingGrid = DecodingGrid()
    n_decoding: int | None = 16
    """Prompts for `decoding`, which takes settings x samples answers of each; None: n."""

    def __post_init__(self):
        check_at_least(self, 1, "n", "n_decoding")
        check_at_least(self, 0, "room")
        check_between(self, 0, 2**32 - 1, "seed")
        check_knobs(self.knobs)
        for name in ("attacks", "splits"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty, expected at least one")
        if len(set(self.attacks)) < len(self.attacks):
            raise ValueError(f"attacks is {self.attacks}, expected each once")
        if unknown := [name for name in self.attacks if name not in ATTACKS]:
            raise ValueError(f"unknown attack {unknown[0]!r}; there are {', '.join(ATTACKS)}")


def configured_attack(name: str, config: SuiteConfig) -> Attack:
    """An attack with its options filled in."""
    if name not in ATTACKS:
        raise ValueError(f"unknown attack {name!r}; this build has {', '.join(ATTACKS)}")
    options: dict[str, Any] = {
        "prefilling": config.prefilling,
        "deep_prefilling": config.prefilling,
        "benign_prefill": config.prefilling,
        "middle_filling": config.middle,
        "benign_middle": config.middle,
        "decoding": config.decoding,
    }
    options |= dict.fromkeys(("prefilling_depth", "middle_grid", "benign_grid"), config.geometry)
    options |= dict.fromkeys(
        ("many_violations", "reprogram", "respelled", "critic_note"), config.further
    )
    attack: Callable[..., list[Attempt]] = ATTACKS[name]
    return functools.partial(attack, options=options[name]) if name in options else attack


def build_attempts(world: World, tokenizer: Tokenizer, config: SuiteConfig) -> list[Attempt]:
    """All attempts of a suite. Every attack and split draws from a generator of its own, so that
    leaving one out changes no other. Raises ValueError for an unknown attack or one that does not
    fit into `max_tokens`."""
    attempts: list[Attempt] = []
    used: set[int] = set()
    for name in config.attacks:
        attack = configured_attack(name, config)
        n = config.n_decoding if name == "decoding" and config.n_decoding is not None else config.n
        for split in config.splits if name in HAS_FORMS else config.splits[-1:]:
            told = AttackConfig(config.pool, split, config.knobs, config.room)
            label = f"{name}/{split if name in HAS_FORMS else 'all'}/{config.pool}"
            rng = np.random.default_rng([config.seed, zlib.crc32(label.encode())])
            for index, attempt in enumerate(attack(world, tokenizer, rng, n, told)):
                id_ = unused_id(f"{config.seed}/{label}/{index}", used)
                attempts.append(
                    dataclasses.replace(
                        attempt, request=dataclasses.replace(attempt.request, id=id_)
                    )
                )
    return attempts


def judge_distinct(judge: Critic, exchanges: Iterable[Exchange]) -> dict[Exchange, Verdict]:
    """One call to the judge with every distinct exchange once. Raises ValueError if it answers too
    few or many."""
    distinct = list(dict.fromkeys(exchanges))
    verdicts = judge.judge(distinct)
    if len(verdicts) != len(distinct):
        raise ValueError(
            f"judge {judge.name} gave {len(verdicts)} verdicts for {len(distinct)} texts"
        )
    return dict(zip(distinct, verdicts, strict=True))


def exchange_of(attempt: Attempt, text: str) -> Exchange:
    """What a judge is shown: an attempt's prompt and a text of its answer."""
    asked = attempt.prompt
    return Exchange(asked.text, text, asked.topic, asked.context, asked.question)


def evaluate(
    sample: Callable[[Sequence[Request]], list[Generation]],
    attempts: Sequence[Attempt],
    judge: Critic,
    tokenizer: Tokenizer,
    context: EvaluationContext,
) -> tuple[list[Record], list[dict[str, Any]]]:
    """Samples all attempts, judges every distinct text once, and measures.

    Returns:
      Records for `results.json`, and one JSON-able row a generation, in the order of the attempts.
    """
    rule = context.rule or tokenizer.rule
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
    rows, metrics = [], []
    for attempt, generation, response in zip(attempts, generations, responses, strict=True):
        final, raw, *before = (judged[exchange_of(attempt, text)] for text in response.texts)
        verdicts = Verdicts(final, raw, tuple(before))
        opening, openers = judged[exchange_of(attempt, response.opening)], context.refusal_openers
        values = row_metrics(attempt, generation, response, verdicts, tokenizer, rule, openers)
        values |= backtracking_row_metrics(
            attempt, generation, response, verdicts, opening, tokenizer, openers
        )
        metrics.append(values)
        rows.append(
            to_row(
                attempt, generation, response, verdicts, values, tokenizer, rule, context, opening
            )
        )
    return build_records(attempts, metrics, judge.name, context), rows


# Records ----------------------------------------------------------------------------------------


def build_records(
    attempts: Sequence[Attempt],
    metrics: Sequence[Mapping[str, float | None]],
    judge: str,
    context: EvaluationContext,
) -> list[Record]:
    """Means and intervals by attack and split, and again over the rows with a long prefix."""
    groups: dict[tuple[str, str, str, tuple], list[int]] = defaultdict(list)
    for index, attempt in enumerate(attempts):
        groups[context.benchmark, attempt.attack, attempt.split, attempt.cell].append(index)
        if len(attempt.prefix.split()) >= LONG_PREFIX_WORDS and not attempt.cell:
            groups[f"{context.benchmark}_long_prefix", attempt.attack, attempt.split, ()].append(
                index
            )
    records = []
    for (benchmark, attack, split, _), indices in groups.items():
        record = functools.partial(_record, context, judge, benchmark, attack, split)
        chosen = [attempts[i] for i in indices]
        values = [metrics[i] for i in indices]
        build = _decoding_records if attack == "decoding" else _plain_records
        records += build(record, chosen, values)
    return records


def _record(
    context: EvaluationContext,
    judge: str,
    benchmark: str,
    attack: str,
    split: str,
    metric: str,
    values: Sequence[float],
    prompts: Sequence[str],
    knobs: Mapping[str, Any],
    found: Interval | None = None,
) -> Record:
    """The mean of some values; or `found`, where something else was measured."""
    found = found or interval(values, prompts, counts=metric in COUNTS | BACKTRACKING_COUNTS)
    return Record(
        context.method,
        context.stage,
        benchmark,
        attack,
        split,
        context.data,
        metric,
        found.value,
        found.n_prompts,
        found.n,
        found.low,
        found.high,
        found.method,
        context.seed,
        context.semantics.value,
        judge,
        context.critic,
        knobs,
    )


def _column(
    attempts: Sequence[Attempt], metrics: Sequence[Mapping[str, float | None]], name: str
) -> tuple[list[float], list[str]]:
    """The values of a metric and their prompts, rows outside its denominator left out."""
    pairs = [(m[name], a.prompt.id) for a, m in zip(attempts, metrics, strict=True)]
    kept = [(value, prompt) for value, prompt in pairs if value is not None]
    return [value for value, _ in kept], [prompt for _, prompt in kept]


def _plain_records(
    record, attempts: Sequence[Attempt], metrics: Sequence[Mapping[str, float | None]]
) -> list[Record]:
    """One record a metric that has a row."""
    knobs = knobs_to_json(attempts[0].request.knobs) | dict(attempts[0].cell)
    columns = {name: _column(attempts, metrics, name) for name in ALL_METRICS}
    records = [
        record(name, values, prompts, knobs)
        for name, (values, prompts) in columns.items()
        if values
    ]
    quantiles = quantiles_of(metrics, [attempt.prompt.id for attempt in attempts])
    return records + [record(name, (), (), knobs, found) for name, found in quantiles.items()]


def _decoding_records(
    record, attempts: Sequence[Attempt], metrics: Sequence[Mapping[str, float | None]]
) -> list[Record]:
    """Any-of-n over the grid, the mean of every setting, and the any-of-n that independent draws
    would give."""
    by_setting: dict[str, list[int]] = defaultdict(list)
    for i, attempt in enumerate(attempts):
        by_setting[repr(knobs_to_json(attempt.request.knobs))].append(i)
    settings = [
        (
            knobs_to_json(attempts[indices[0]].request.knobs),
            [attempts[i] for i in indices],
            [metrics[i] for i in indices],
        )
        for indices in by_setting.values()
    ]
    n_prompts = len({attempt.prompt.id for attempt in attempts})
    grid = {"settings": len(settings), "any_of": len(attempts) // n_prompts}
    records = []
    for name in ALL_METRICS:
        values, prompts = _column(attempts, metrics, name)
        if not values:
            continue
        if name not in ANY_OF_N:
            records.append(record(name, values, prompts, grid))
            continue
        worst: dict[str, float] = {}
        for value, prompt in zip(values, prompts, strict=True):
            worst[prompt] = max(value, worst.get(prompt, 0.0))
        records.append(record(name, list(worst.values()), list(worst), grid))
        records.append(record(f"{name}_mean", values, prompts, grid))
        safe = 1.0
        for knobs, chosen, measured in settings:
            column, owners = _column(chosen, measured, name)
            if column:
                records.append(record(f"{name}_mean", column, owners, knobs))
                safe *= (1 - float(np.mean(column))) ** (len(chosen) / n_prompts)
        expected = dataclasses.replace(
            records[-1], metric=f"{name}_independent", value=1 - safe, knobs=grid
        )
        nan = float("nan")
        records.append(
            dataclasses.replace(
                expected,
                ci_low=nan,
                ci_high=nan,
                ci_method="none",
                n=len(values),
                n_prompts=len(worst),
            )
        )
        records.append(record(f"{name}_excess", (), (), grid, _excess(name, attempts, metrics)))
    return records


def _excess(
    name: str, attempts: Sequence[Attempt], metrics: Sequence[Mapping[str, float | None]]
) -> Interval:
    rows = [(v, a) for a, m in zip(attempts, metrics, strict=True) if (v := m[name]) is not None]
    hits, owners = [v for v, _ in rows], [a for _, a in rows]
    settings = [repr(knobs_to_json(a.request.knobs)) for a in owners]
    return any_of_n(hits, [a.prompt.id for a in owners], settings).excess
