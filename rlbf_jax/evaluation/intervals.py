"""Confidence intervals: Wilson for independent yes/no rows,
bootstrap over prompts for everything else.

Rows that share a prompt are not independent, so the bootstrap draws whole prompts (clusters). All
functions are numpy, vectorized over replicates, and deterministic given their seed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_CHUNK = 2_000_000
"""Most cluster draws held in memory at once."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its two-sided confidence interval. All NaN where there was no row."""

    value: float
    low: float
    high: float
    method: str
    """`wilson`, `wilson_prompts`, `bootstrap` or `none`."""
    n: int
    """Rows."""
    n_prompts: int
    """Distinct prompts."""


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial proportion (Wilson 1927; Brown, Cai and DasGupta 2001).

    Raises ValueError unless 0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(
            f"wilson needs 0 <= successes <= n and n >= 1, got successes = {successes}, n = {n}"
        )
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = successes / n
    center = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Rounding must not push the limits of 0 and n successes past the share itself.
    low = 0.0 if successes == 0 else max(0.0, (center - half) / scale)
    high = 1.0 if successes == n else min(1.0, (center + half) / scale)
    return low, high


def _cluster_sums(
    values: np.ndarray, clusters: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of the values of each cluster, in order of first appearance."""
    index: dict[Hashable, int] = {}
    member = np.array([index.setdefault(cluster, len(index)) for cluster in clusters], np.int64)
    return np.bincount(member, values, len(index)), np.bincount(
        member, minlength=len(index)
    ).astype(float)


def _replicates(
    sums: np.ndarray, counts: np.ndarray, n: int, rng: np.random.Generator
) -> np.ndarray:
    """[n] means of resamples of whole clusters."""
    size = len(sums)
    means = np.empty(n)
    step = max(1, _CHUNK // size)
    for start in range(0, n, step):
        drawn = rng.integers(0, size, (min(step, n - start), size))
        means[start : start + step] = sums[drawn].sum(1) / counts[drawn].sum(1)
    return means


def bootstrap(
    values: Sequence[float],
    prompts: Sequence[Hashable],
    *,
    level: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of the mean over rows, clustered by prompt.

    Args:
      values: one number a row, finite.
      prompts: the cluster of each row; resamples draw as many clusters
        as there are, with replacement.

    Raises ValueError for empty, unequal or non-finite input.
    """
    array = np.asarray(values, float)
    if len(array) == 0 or len(array) != len(prompts):
        raise ValueError(
            f"bootstrap needs one prompt a value and at least one: {len(array)} values, "
            f"{len(prompts)} prompts"
        )
    if not np.isfinite(array).all():
        raise ValueError(
            "bootstrap got a value that is not finite; leave rows out that have no value"
        )
    sums, counts = _cluster_sums(array, prompts)
    means = _replicates(sums, counts, replicates, np.random.default_rng(seed))
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def interval(
    values: Sequence[float],
    prompts: Sequence[Hashable],
    *,
    counts: bool = False,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The interval that DESIGN asks for: Wilson for one yes/no row a prompt,
    otherwise clustered bootstrap.

    A bootstrap of rows that are all 0 (or all 1) has width zero, which claims certainty that the
    rows do not give; there Wilson's interval for as many rows as there are prompts is used
    (`wilson_prompts`). `counts`: the values are counts, not shares, even where all of them happen
    to be 0 or 1; always bootstrap.
    """
    n, n_prompts = len(values), len(set(prompts))
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, "none", 0, 0)
    value = float(np.mean(values))
    binary = not counts and all(v in (0.0, 1.0) for v in values)
    if binary and n == n_prompts:
        return Interval(value, *wilson(round(sum(values)), n, level), "wilson", n, n_prompts)
    if binary and value in (0.0, 1.0):
        return Interval(
            value,
            *wilson(round(value * n_prompts), n_prompts, level),
            "wilson_prompts",
            n,
            n_prompts,
        )
    return Interval(
        value, *bootstrap(values, prompts, level=level, seed=seed), "bootstrap", n, n_prompts
    )


def clustered(
    statistic: Callable[[Sequence[T]], float],
    rows: Sequence[T],
    prompts: Sequence[Hashable],
    *,
    level: float = 0.95,
    replicates: int = 200,
    seed: int = 0,
) -> Interval:
    """Any number of all rows, with a percentile bootstrap over whole prompts.

    A resample holds some rows twice, so a statistic that counts repetitions (diversity of texts)
    is lower there; the interval is stretched to hold the value itself.

    Raises ValueError for no row, or not one prompt a row.
    """
    if not rows or len(rows) != len(prompts):
        raise ValueError(
            f"clustered needs one prompt a row and at least one: {len(rows)} rows, "
            f"{len(prompts)} prompts"
        )
    groups: dict[Hashable, list[T]] = {}
    for row, prompt in zip(rows, prompts, strict=True):
        groups.setdefault(prompt, []).append(row)
    members, rng = list(groups.values()), np.random.default_rng(seed)
    drawn = rng.integers(0, len(members), (replicates, len(members)))
    values = [statistic([row for g in draw for row in members[g]]) for draw in drawn.tolist()]
    value = float(statistic(rows))
    low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(
        value,
        min(float(low), value),
        max(float(high), value),
        "bootstrap",
        len(rows),
        len(members),
    )


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """Mean of `a - b` over seeds, with its interval and what each seed says."""

    value: float
    """Mean of the seeds' differences."""
    low: float
    high: float
    by_seed: dict[int, float]
    n_prompts: int
    """Prompts, summed over seeds."""


def paired_difference(
    values_a: Sequence[float],
    values_b: Sequence[float],
    prompts: Sequence[Hashable],
    seeds: Sequence[int],
    *,
    level: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """Compares two methods on the same rows: bootstrap over prompts within seeds, seeds held fixed.

    Row i of `a` and of `b` must be the same attempt (seed and prompt).
    Seeds are few, so they are not resampled; their spread is to be read from `by_seed`.
    Raises ValueError for unequal lengths or empty input.
    """
    lengths = {len(values_a), len(values_b), len(prompts), len(seeds)}
    if len(lengths) != 1 or not values_a:
        raise ValueError(
            "paired_difference needs four sequences of one length >= 1, got lengths "
            f"{sorted(lengths)}"
        )
    difference = np.asarray(values_a, float) - np.asarray(values_b, float)
    if not np.isfinite(difference).all():
        raise ValueError(
            "paired_difference got a value that is not finite; leave out pairs that lack one"
        )
    rng = np.random.default_rng(seed)
    owner = np.asarray(seeds)
    by_seed: dict[int, float] = {}
    total, n_prompts = np.zeros(replicates), 0
    for each in sorted({int(s) for s in seeds}):
        rows = np.flatnonzero(owner == each).tolist()
        sums, counts = _cluster_sums(difference[rows], [prompts[i] for i in rows])
        by_seed[each] = float(difference[rows].mean())
        total += _replicates(sums, counts, replicates, rng)
        n_prompts += len(sums)
    low, high = np.quantile(total / len(by_seed), [0.5 - level / 2, 0.5 + level / 2])
    return PairedDifference(
        float(np.mean(list(by_seed.values()))), float(low), float(high), by_seed, n_prompts
    )
