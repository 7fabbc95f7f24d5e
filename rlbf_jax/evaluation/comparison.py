"""Several seeds of one method, and two methods against each other, from the rows of
`evaluation/STAGE.jsonl`.

Every stage, method and training seed answers the same attempts, so a comparison is paired by
(training seed, attempt); its interval is a bootstrap over prompts, drawn once for all seeds (which
are held fixed, and answer the same prompts), and each seed's difference is listed.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlbf_jax.attacks import HAS_FORMS, WORST_OF_N
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.columns import check_of_rows, is_rate
from rlbf_jax.evaluation.intervals import Pooled, pooled, resampled_means, wilson
from rlbf_jax.evaluation.paired_tests import STANDARD_ERRORS, PairedTest, paired_test
from rlbf_jax.evaluation.records import ANY_OF_N

Row = Mapping[str, Any]
"""A line of `evaluation/STAGE.jsonl`."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compared: one method, with its rows for each training seed."""

    name: str
    rows: Mapping[int, Sequence[Row]]
    texts: Mapping[int, Sequence[Row]] = dataclasses.field(default_factory=dict)
    """Lines of `evaluation/clean_text/STAGE.jsonl`: nll, correct and count of each held-out answer.
    """


@dataclasses.dataclass(frozen=True)
class Slice:
    """Which rows of an arm: an attack, all its form splits and cells unless some are named."""

    attack: str
    split: str | None = None
    long_prefix: bool = False
    """Only rows with a long benign prefix."""
    cell: tuple[tuple[str, int], ...] = ()
    """Only rows whose cells have these numbers, as (("b", 8),)."""
    among: tuple[str, ...] = ()
    """Rows of all these attacks; `attack` is then what the slice is called."""

    @property
    def label(self) -> str:
        words = [self.attack.replace("_", " ")]
        words += [f"{name} = {value}" for name, value in self.cell]
        words += ["long prefix"] if self.long_prefix else []
        words += [f"{self.split or 'all'} forms"] if self.attack in HAS_FORMS else []
        return ", ".join(words)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds, or a difference of two,
    with its 95 % interval. NaN where no row has the metric."""

    value: float
    """Mean of the seeds' values, each a mean over rows."""
    low: float
    high: float
    by_seed: Mapping[int, float]
    n: int
    """Rows, or pairs of rows, over all seeds."""
    n_prompts: int
    """Distinct prompts: all seeds answer the same."""
    left_out: int = 0
    """Differences only: attempts at which one side has no such number
    (say, no directive), over all seeds."""
    method: str = "none"
    """Of the interval, see `intervals.METHODS`."""
    test: PairedTest | None = None
    """Differences only: p and minimum detectable effect; of `perplexity_ratio` the latter alone, as
    the smallest ratio above 1 that would be found."""

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def half_width(self) -> float:
        """Half the interval's width: how far from the value this many rows leave the truth open."""
        return (self.high - self.low) / 2


NOTHING = Estimate(math.nan, math.nan, math.nan, {}, 0, 0)


def load_arm(name: str, folders: Mapping[int, Path], stage: str) -> Arm:
    """Reads a stage's rows of several runs, one a training seed; also from files that were packed
    since (`STAGE.jsonl.gz`).

    Raises UserError for a missing or damaged file, a line that is not JSON,
    or a run whose seed is another than stated.
    """
    rows, texts = {}, {}
    for seed, folder in folders.items():
        path = folder / "evaluation" / f"{stage}.jsonl"
        rows[seed] = _read(path)
        others = {row.get("seed") for row in rows[seed]} - {seed}
        if others:
            raise UserError(
                f"{path}: rows of seed {others.pop()}, expected seed {seed}; name the run of that "
                "seed"
            )
        extra = folder / "evaluation" / "clean_text" / f"{stage}.jsonl"
        texts[seed] = _read(extra) if extra.exists() or _packed(extra).exists() else []
    return Arm(name, rows, texts)


def _packed(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")


def _read(path: Path) -> list[Row]:
    rows, lines = [], _text(path).split("\n")  # splitlines() would split texts at other marks
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error}); evaluate that stage again"
            ) from None
    return rows


def _text(path: Path) -> str:
    if path.exists():
        return path.read_text(encoding="utf-8")
    if not _packed(path).exists():
        raise UserError(f"{path}: no such file; evaluate that stage first")
    try:
        return gzip.decompress(_packed(path).read_bytes()).decode()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{_packed(path)}: damaged ({error}); pack that file again") from None


def column(rows: Sequence[Row], where: Slice, metric: str) -> dict[Any, tuple[str, float]]:
    """attempt -> (prompt, value) of the rows of a slice that have the metric.

    `decoding` asks a prompt n times; there asr, leak and emitted are "any of n", one value a
    prompt, as in results.json.

    Raises ValueError for a metric that rows do not have.
    """
    check_of_rows(metric, rows[0]["metrics"] if rows else None)
    any_of_n = where.attack in WORST_OF_N and metric in ANY_OF_N
    values: dict[Any, tuple[str, float]] = {}
    for row in rows:
        value = row["metrics"][metric]
        if value is None or not within(row, where):
            continue
        key = row["prompt_id"] if any_of_n else row["request_id"]
        before = values[key][1] if key in values else -math.inf
        values[key] = (row["prompt_id"], max(value, before) if any_of_n else value)
    return values


def within(row: Row, where: Slice) -> bool:
    """Whether a row is of a slice."""
    if row["attack"] not in (where.among or (where.attack,)):
        return False
    if where.long_prefix and not row["long_prefix"]:
        return False
    if where.cell and not dict(where.cell).items() <= (row.get("cell") or {}).items():
        return False
    return where.split is None or row["split"] == where.split


def mean_over_seeds(arm: Arm, where: Slice, metric: str) -> Estimate:
    """The mean of the seeds' means, with an interval over prompts, drawn once for all seeds.

    Where every row is 0, or every row is 1, a bootstrap has no spread to show; there the interval
    is Wilson's for as many rows as one seed has prompts, because all seeds ask the same prompts.
    """
    columns = {seed: column(rows, where, metric) for seed, rows in arm.rows.items()}
    values, prompts, seeds = _flat(columns)
    if not values:
        return NOTHING
    estimate = _estimate(pooled(values, prompts, seeds), len(values))
    if is_rate(metric) and set(values) in ({0.0}, {1.0}):
        n = _fewest_prompts(columns)
        low, high = wilson(n * values[0], n)
        estimate = dataclasses.replace(estimate, low=low, high=high, method="wilson_prompts")
    return estimate


def difference(a: Arm, b: Arm, where: Slice, metric: str) -> Estimate:
    """a minus b, paired by seed and attempt, over the attempts at which both have a number.

    Where all pairs differ alike (by -1, 0 or 1), the interval allows for as many other pairs as
    Wilson's interval does after none was seen among one seed's prompts. Raises ValueError if the
    arms have other seeds or other attempts.
    """
    if set(a.rows) != set(b.rows):
        raise ValueError(
            f"{a.name} has seeds {sorted(a.rows)}, {b.name} has {sorted(b.rows)}; compare the "
            "same seeds"
        )
    columns: dict[int, dict[Any, tuple[str, float]]] = {}
    left_out = 0
    for seed in a.rows:
        attempts = [
            {row["request_id"] for row in arm.rows[seed] if within(row, where)} for arm in (a, b)
        ]
        if attempts[0] != attempts[1]:
            raise ValueError(
                f"{a.name} and {b.name}, seed {seed}, {where.label}: other attempts; evaluate "
                "both alike"
            )
        one, other = column(a.rows[seed], where, metric), column(b.rows[seed], where, metric)
        both = [key for key in one if key in other]
        left_out += len(one.keys() | other.keys()) - len(both)
        columns[seed] = {key: (one[key][0], one[key][1] - other[key][1]) for key in both}
    values, prompts, seeds = _flat(columns)
    if not values:
        return dataclasses.replace(NOTHING, left_out=left_out)
    mean = pooled(values, prompts, seeds)
    yes_no = is_rate(metric) and set(values) <= {-1.0, 0.0, 1.0}
    estimate = dataclasses.replace(
        _estimate(mean, len(values)),
        left_out=left_out,
        test=paired_test(values, prompts, seeds, mean.se, yes_no),
    )
    if yes_no and len(set(values)) == 1:
        n = _fewest_prompts(columns)
        doubt = wilson(0, n)[1] * (1 if values[0] == 0 else 2)
        low, high = max(-1.0, values[0] - doubt), min(1.0, values[0] + doubt)
        estimate = dataclasses.replace(estimate, low=low, high=high, method="wilson_prompts")
    return estimate


def _estimate(mean: Pooled, n: int) -> Estimate:
    return Estimate(
        mean.value, mean.low, mean.high, mean.by_seed, n, mean.n_prompts, method=mean.method
    )


def _flat(
    columns: Mapping[int, Mapping[Any, tuple[str, float]]],
) -> tuple[list[float], list[str], list[int]]:
    """Values, prompts and seeds of all rows."""
    rows = [
        (value, prompt, seed)
        for seed, column in columns.items()
        for prompt, value in column.values()
    ]
    return [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]


def _fewest_prompts(columns: Mapping[int, Mapping[Any, tuple[str, float]]]) -> int:
    return min(
        len({prompt for prompt, _ in column.values()}) for column in columns.values() if column
    )


# Perplexity -------------------------------------------------------------------------------------


def perplexity_ratio(a: Arm, b: Arm, *, replicates: int = 2000, seed: int = 0) -> Estimate:
    """Perplexity of held-out clean answers, a divided by b: geometric mean over seeds, bootstrap
    over answers, drawn once for all seeds (both arms and all seeds read the same answers, in one
    order). `by_seed` holds the seeds' ratios; an interval without 1 is a difference.

    Raises ValueError if the arms were read on other answers.
    """
    gaps: dict[int, tuple[list[float], list[float]]] = {}
    for each in sorted(set(a.texts) & set(b.texts)):
        counts = [float(row["count"]) for row in a.texts[each]]
        if counts != [row["count"] for row in b.texts[each]]:
            raise ValueError(
                f"{a.name} and {b.name}, seed {each}: perplexity of other answers; evaluate both "
                "alike"
            )
        pairs = zip(a.texts[each], b.texts[each], strict=True)
        if counts:
            gaps[each] = [one["nll"] - other["nll"] for one, other in pairs], counts
    if not gaps:
        return NOTHING
    longest = max(len(counts) for _, counts in gaps.values())
    sums, ids = np.zeros((2, len(gaps), longest))
    for place, (gap, counts) in enumerate(gaps.values()):
        sums[place, : len(gap)], ids[place, : len(counts)] = gap, counts
    logs = (sums.sum(1) / ids.sum(1)).tolist()
    drawn = resampled_means(sums, ids, replicates, np.random.default_rng(seed))
    low, high = np.exp(np.quantile(drawn, [0.025, 0.975]))
    return Estimate(
        value=math.exp(sum(logs) / len(logs)),
        low=float(low),
        high=float(high),
        by_seed=dict(zip(gaps, map(math.exp, logs), strict=True)),
        n=sum(len(counts) for _, counts in gaps.values()),
        n_prompts=longest,
        method="bootstrap" if len(gaps) == 1 else "joint_bootstrap",
        test=_detectable_ratio(float(drawn.std(ddof=1))),
    )


def _detectable_ratio(se: float) -> PairedTest:
    """`se`: of the ratio's logarithm."""
    if not se > 0:
        return PairedTest(math.nan, "none", math.nan, "none")
    return PairedTest(math.nan, "none", math.exp(STANDARD_ERRORS * se), "bootstrap_se")
