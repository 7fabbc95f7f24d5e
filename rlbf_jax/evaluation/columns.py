"""Every metric, once and in order: rows, records and the report follow this list.

A new metric is one file that defines a `Column` and one line in `COLUMNS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlbf_jax.evaluation import answer_columns, backtracking_metrics
from rlbf_jax.evaluation.intervals import Interval
from rlbf_jax.evaluation.measure import Better, Column, JudgedAnswer, Kind

__all__ = ["COLUMNS", "Better", "Column", "JudgedAnswer", "Kind"]

PERPLEXITY = Column(
    "perplexity",
    "on held-out harmless text; the ratio to base tells what the training cost.",
    kind="nats",
    better="low",
    groups=("cost",),
)
ACCURACY = Column(
    "accuracy",
    "held-out harmless ids predicted right, or questions answered right where a benchmark asks "
    "some.",
    better="high",
    groups=("cost",),
)
TOKENS_PER_SECOND = Column(
    "tokens_per_second",
    "sampling speed on this run's devices.",
    kind="count",
    better="high",
    decimals=0,
)
TIME_TO_CORRECTION_MEDIAN = Column(
    "time_to_correction_median",
    "the same, median over all rows with a violation, uncorrected ones as infinite; empty where "
    "fewer than half are corrected.",
    kind="count",
    better="low",
)
TIME_TO_CORRECTION_P90 = Column(
    "time_to_correction_p90", "the same, 90th percentile.", kind="count", better="low"
)
ASR_EXCESS = Column(
    "asr_excess",
    "asr as any of n answers, less what n independent draws with the settings' means would give.",
)
TARGET_LOSS = Column(
    "target_loss",
    "of a searched suffix: what the search minimized, in nats an id of its goal.",
    kind="nats",
)
START_LOSS = Column(
    "start_loss", "the same, of the suffix that the search began with.", kind="nats"
)

COLUMNS: list[Column] = [
    answer_columns.ASR,
    answer_columns.LEAK,
    answer_columns.CORR_AT_K,
    answer_columns.TORN_SEAM,
    answer_columns.EMITTED,
    answer_columns.BACKTRACK_RATE,
    answer_columns.FALSE_BACKTRACK_RATE,
    answer_columns.X_EXACT,
    answer_columns.X_COVERAGE,
    answer_columns.CATEGORY_ACCURACY,
    answer_columns.OVER_DELETION,
    answer_columns.KEPT_PREFIX,
    answer_columns.FLUENT_AFTER,
    answer_columns.WASTED_TOKENS,
    answer_columns.OVER_REFUSAL,
    PERPLEXITY,
    ACCURACY,
    answer_columns.MALFORMED,
    answer_columns.COHERENT,
    answer_columns.USEFUL,
    answer_columns.UNJUDGED,
    TOKENS_PER_SECOND,
    backtracking_metrics.CORRECTED,
    backtracking_metrics.TIME_TO_CORRECTION,
    TIME_TO_CORRECTION_MEDIAN,
    TIME_TO_CORRECTION_P90,
    backtracking_metrics.DELETED_TOKENS,
    backtracking_metrics.CLAMPED,
    backtracking_metrics.ASR_RAW,
    backtracking_metrics.ASR_BEFORE_CONTROL,
    ASR_EXCESS,
    backtracking_metrics.PARTIAL_REFUSAL,
    backtracking_metrics.JUDGE_SCORE,
    TARGET_LOSS,
    START_LOSS,
]
"""THE list. The order is that of a row's `metrics`, of records, and of the report."""


# Lookups, all at call time ----------------------------------------------------------------------


def find(name: str) -> Column | None:
    """The column of a metric; None for one that only its record knows (`asr_mean`, ...)."""
    return next((column for column in COLUMNS if column.name == name), None)


def metric_names() -> tuple[str, ...]:
    """What every row has in its `metrics`, in order."""
    return tuple(column.name for column in COLUMNS if column.of_rows)


def is_rate(name: str) -> bool:
    """Whether a metric is in 0..1. One without a column is:
    those are means and worst cases of rates."""
    column = find(name)
    return column is None or column.kind == "rate"


def of_group(group: str) -> tuple[str, ...]:
    """Names of a table's columns: first those that name this table first, then its guests."""
    members = [column for column in COLUMNS if group in column.groups]
    own = [column for column in members if column.groups[0] == group]
    return tuple(c.name for c in [*own, *(c for c in members if c.groups[0] != group)])


def definitions() -> dict[str, str]:
    """name -> what the report says of it."""
    return {column.name: column.says for column in COLUMNS}


# Measuring --------------------------------------------------------------------------------------


def row_metrics(answer: JudgedAnswer) -> dict[str, float | None]:
    """Every metric of one row, in order; None: not in the denominator."""
    return {column.name: column.value(answer) for column in COLUMNS if column.of_rows}


def set_metrics(answers: Sequence[JudgedAnswer]) -> dict[str, Interval]:
    """Every metric of all answers to an attack, in order; those that have no number left out."""
    measured: dict[str, Interval] = {}
    for column in COLUMNS:
        if column.kind != "set" or column.measure is None:
            continue
        value = column.measure(answers)
        if value is not None:
            measured[column.name] = value if isinstance(value, Interval) else _plain(value, answers)
    return measured


def _plain(value: float, answers: Sequence[JudgedAnswer]) -> Interval:
    """A number without an interval."""
    nan, prompts = float("nan"), {answer.attempt.prompt.id for answer in answers}
    return Interval(float(value), nan, nan, "none", len(answers), len(prompts))


def check_of_rows(name: str, row: Mapping[str, float | None] | None = None) -> None:
    """Raises ValueError for a metric that rows do not have, or that this row's `metrics` lack."""
    if name not in metric_names():
        column = find(name)
        why = f"{name} is no metric of single rows" if column else f"no metric {name!r}"
        raise ValueError(f"{why}; there are {', '.join(metric_names())}")
    if row is not None and name not in row:
        raise ValueError(f"these rows have no {name}; evaluate that stage again")
