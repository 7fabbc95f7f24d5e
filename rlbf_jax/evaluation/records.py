"""From measured answers to the records of `results.json`: means and intervals by attack and split,
and again over the rows with a long prefix."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlbf_jax.attacks import WORST_OF_N
from rlbf_jax.attacks.base import Attempt
from rlbf_jax.evaluation.columns import is_rate, metric_names, set_metrics
from rlbf_jax.evaluation.intervals import Interval, interval
from rlbf_jax.evaluation.many_answers import any_of_n, quantiles_of
from rlbf_jax.evaluation.measure import JudgedAnswer
from rlbf_jax.evaluation.results import Record
from rlbf_jax.evaluation.rows import LONG_PREFIX_WORDS, EvaluationContext, knobs_to_json

ANY_OF_N = ("asr", "leak", "emitted")
"""Metrics that an attack with many answers a prompt (`AttackSpec.any_of_n`) reads as: any of them.
"""
Metrics = Mapping[str, float | None]
"""A row's `metrics`."""


@dataclasses.dataclass(frozen=True)
class _Group:
    """The answers that become one set of records, and what these say of themselves."""

    context: EvaluationContext
    judge: str
    benchmark: str
    answers: Sequence[JudgedAnswer]
    metrics: Sequence[Metrics]

    @property
    def attempts(self) -> list[Attempt]:
        return [answer.attempt for answer in self.answers]

    @property
    def prompts(self) -> list[str]:
        return [answer.attempt.prompt.id for answer in self.answers]

    def column(self, name: str) -> tuple[list[float], list[str]]:
        """The values of a metric and their prompts, rows outside its denominator left out."""
        pairs = zip((m[name] for m in self.metrics), self.prompts, strict=True)
        kept = [(value, prompt) for value, prompt in pairs if value is not None]
        return [value for value, _ in kept], [prompt for _, prompt in kept]

    def some(self, indices: Sequence[int]) -> _Group:
        """Only these of the answers."""
        return dataclasses.replace(
            self,
            answers=[self.answers[i] for i in indices],
            metrics=[self.metrics[i] for i in indices],
        )

    def record(self, metric: str, estimate: Interval, knobs: Mapping[str, Any]) -> Record:
        context, attempt = self.context, self.answers[0].attempt
        return Record(
            context.method,
            context.stage,
            self.benchmark,
            attempt.attack,
            attempt.split,
            context.data,
            metric,
            estimate.value,
            estimate.n_prompts,
            estimate.n,
            estimate.low,
            estimate.high,
            estimate.method,
            context.seed,
            context.semantics.value,
            self.judge,
            context.critic,
            knobs,
        )

    def mean(
        self,
        metric: str,
        values: Sequence[float],
        prompts: Sequence[str],
        knobs: Mapping[str, Any],
    ) -> Record:
        """The mean of some values of a metric."""
        estimate = interval(values, prompts, counts=not is_rate(metric))
        return self.record(metric, estimate, knobs)


def build_records(
    answers: Sequence[JudgedAnswer],
    metrics: Sequence[Metrics],
    judge: str,
    context: EvaluationContext,
) -> list[Record]:
    """Every number of some answers.

    Args:
      answers: in the order of their attempts.
      metrics: of each, as `columns.row_metrics` gives them.
      judge: its name.
    """
    groups: dict[tuple[str, str, str, tuple], list[int]] = defaultdict(list)
    for index, answer in enumerate(answers):
        attempt = answer.attempt
        groups[context.benchmark, attempt.attack, attempt.split, attempt.cell].append(index)
        if len(attempt.prefix.split()) >= LONG_PREFIX_WORDS and not attempt.cell:
            long = f"{context.benchmark}_long_prefix"
            groups[long, attempt.attack, attempt.split, ()].append(index)
    records = []
    for (benchmark, attack, _, _), indices in groups.items():
        group = _Group(context, judge, benchmark, answers, metrics).some(indices)
        build = _any_of_n_records if attack in WORST_OF_N else _plain_records
        records += build(group)
    return records


def _plain_records(group: _Group) -> list[Record]:
    """One record a metric that has a row, then those of all rows together."""
    first = group.answers[0].attempt
    knobs = knobs_to_json(first.request.knobs) | dict(first.cell)
    columns = {name: group.column(name) for name in metric_names()}
    records = [
        group.mean(name, values, prompts, knobs)
        for name, (values, prompts) in columns.items()
        if values
    ]
    whole = quantiles_of(group.metrics, group.prompts) | set_metrics(group.answers)
    return records + [group.record(name, estimate, knobs) for name, estimate in whole.items()]


def _by_setting(group: _Group) -> list[tuple[dict[str, Any], _Group]]:
    """(knobs, answers under them) of every setting, in order of first appearance."""
    indices: dict[str, list[int]] = defaultdict(list)
    for i, attempt in enumerate(group.attempts):
        indices[repr(knobs_to_json(attempt.request.knobs))].append(i)
    parts = [group.some(chosen) for chosen in indices.values()]
    return [(knobs_to_json(part.answers[0].attempt.request.knobs), part) for part in parts]


def _any_of_n_records(group: _Group) -> list[Record]:
    """Any-of-n over the grid, the mean of every setting, and the any-of-n
    that independent draws would give."""
    settings = _by_setting(group)
    n_prompts = len(set(group.prompts))
    grid = {"settings": len(settings), "any_of": len(group.answers) // n_prompts}
    records = []
    for name in metric_names():
        values, prompts = group.column(name)
        if values and name in ANY_OF_N:
            records += _worst_records(group, name, settings, grid)
        elif values:
            records.append(group.mean(name, values, prompts, grid))
    whole = set_metrics(group.answers)
    return records + [group.record(name, estimate, grid) for name, estimate in whole.items()]


def _worst_records(
    group: _Group,
    name: str,
    settings: Sequence[tuple[Mapping[str, Any], _Group]],
    grid: Mapping[str, Any],
) -> list[Record]:
    """`name`: any of n. `name_mean`: of all answers and of each setting's. `name_independent`: any
    of n of independent draws with the settings' means, as if all n were judged. `name_excess`: the
    first less the last, both over judged answers."""
    values, prompts = group.column(name)
    n_prompts = len(set(group.prompts))
    worst: dict[str, float] = {}
    for value, prompt in zip(values, prompts, strict=True):
        worst[prompt] = max(value, worst.get(prompt, 0.0))
    records = [group.mean(name, list(worst.values()), list(worst), grid)]
    records.append(group.mean(f"{name}_mean", values, prompts, grid))
    safe = 1.0
    for knobs, part in settings:
        column, owners = part.column(name)
        if column:
            records.append(group.mean(f"{name}_mean", column, owners, knobs))
            safe *= (1 - float(np.mean(column))) ** (len(part.answers) / n_prompts)
    nan = float("nan")
    independent = Interval(1 - safe, nan, nan, "none", len(values), len(worst))
    records.append(group.record(f"{name}_independent", independent, grid))
    records.append(group.record(f"{name}_excess", _excess(name, group), grid))
    return records


def _excess(name: str, group: _Group) -> Interval:
    rows = zip(group.attempts, (m[name] for m in group.metrics), strict=True)
    judged = [(value, attempt) for attempt, value in rows if value is not None]
    hits, owners = [v for v, _ in judged], [a for _, a in judged]
    settings = [repr(knobs_to_json(a.request.knobs)) for a in owners]
    return any_of_n(hits, [a.prompt.id for a in owners], settings).excess
