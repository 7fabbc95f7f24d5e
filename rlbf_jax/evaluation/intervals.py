"""Confidence intervals: Wilson for independent yes/no rows,
bootstrap over prompts for everything else.

Rows that share a prompt are not independent, also where they are of several training seeds, so the
bootstrap draws whole prompts (clusters), once for all seeds. All functions are numpy, vectorized
over replicates, and deterministic given their seed. Every interval names its method, see `METHODS`.
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
METHODS = {
    "wilson": "Wilson's score interval of one yes/no row a prompt",
    "wilson_prompts": "Wilson's for as many rows as there are prompts, where all rows are alike",
    "bootstrap": "bootstrap over prompts, each with all of its rows",
    "joint_bootstrap": "bootstrap over prompts, drawn once for all training seeds, which are fixed",
    "span": "from the lowest to the highest limit of the seeds' own intervals",
    "none": "no interval",
}
"""Every method that an interval may name, and what it is."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its two-sided confidence interval. All NaN where there was no row."""

    value: float
    low: float
    high: float
    method: str
    """`wilson`, `wilson_prompts`, `bootstrap` or `none`, see `METHODS`."""
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
    values: np.ndarray, clusters: Sequence[Hashable], seeds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Two [S, P] arrays: sum and count of the values of each seed's (in rising order) part of each
    cluster (in order of first appearance)."""
    index: dict[Hashable, int] = {}
    member = np.array([index.setdefault(cluster, len(index)) for cluster in clusters], np.int64)
    names, owner = np.unique(seeds, return_inverse=True)
    shape = len(names), len(index)
    place, size = owner * len(index) + member, len(names) * len(index)
    counts = np.bincount(place, minlength=size).astype(float)
    return np.bincount(place, values, size).reshape(shape), counts.reshape(shape)


def resampled_means(
    sums: np.ndarray, counts: np.ndarray, n: int, rng: np.random.Generator
) -> np.ndarray:
    """Resamples of whole clusters, drawn once for all seeds.

    All seeds answer the same prompts, so what a draw leaves out is missing from all of them;
    draws of each seed's own would take the seeds for independent, and intervals come out too short.

    Args:
      sums, counts: [S, P] floats, sum and number of the values of each seed's rows of each cluster;
        0 and 0 where a seed has none of a cluster, and at least one row a seed.
      n: resamples.

    Returns:
      [n]: of each, the mean over seeds of each seed's mean over rows. A draw in which no row of a
      seed occurs says nothing of that seed, which then stands there with the mean of all its rows.
    """
    size = sums.shape[1]
    means, own = np.zeros(n), sums.sum(1) / counts.sum(1)
    step = max(1, _CHUNK // size)
    for start in range(0, n, step):
        drawn = rng.integers(0, size, (min(step, n - start), size))
        for total, count, mean in zip(sums, counts, own, strict=True):
            rows = count[drawn].sum(1)
            there = total[drawn].sum(1) / np.maximum(rows, 1)
            means[start : start + step] += np.where(rows > 0, there, mean)
    return means / len(sums)


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
    sums, counts = _cluster_sums(array, prompts, np.zeros(len(array), int))
    means = resampled_means(sums, counts, replicates, np.random.default_rng(seed))
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
class Pooled:
    """The mean over seeds of each seed's mean over rows, with its interval
    and what each seed says."""

    value: float
    low: float
    high: float
    method: str
    """`joint_bootstrap`, or `bootstrap` of one seed."""
    by_seed: dict[int, float]
    n_prompts: int
    """Distinct prompts: a prompt's rows of all seeds are drawn together."""
    se: float
    """Standard error: the standard deviation over resamples."""


def pooled(
    values: Sequence[float],
    prompts: Sequence[Hashable],
    seeds: Sequence[int],
    *,
    level: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> Pooled:
    """Percentile bootstrap over prompts, drawn jointly for all seeds, which are held fixed.

    Seeds are few, so they are not resampled; their spread is to be read from `by_seed`. They may
    have other prompts, or other numbers of rows a prompt; each weighs alike.

    Args:
      values: one finite number a row.
      prompts: what the row answers; equal ones in two seeds are one prompt.
      seeds: the training seed of each row.

    Raises ValueError for unequal lengths, no row, or a value that is not finite.
    """
    array = np.asarray(values, float)
    lengths = {len(array), len(prompts), len(seeds)}
    if len(lengths) != 1 or not len(array):
        raise ValueError(
            "pooled needs three sequences of one length >= 1, got lengths "
            f"{[len(array), len(prompts), len(seeds)]}"
        )
    if not np.isfinite(array).all():
        raise ValueError("pooled got a value that is not finite; leave out rows that have none")
    owner = np.asarray(seeds)
    by_seed = {int(each): float(array[owner == each].mean()) for each in np.unique(owner)}
    sums, counts = _cluster_sums(array, prompts, owner)
    means = resampled_means(sums, counts, replicates, np.random.default_rng(seed))
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return Pooled(
        value=float(np.mean(list(by_seed.values()))),
        low=float(low),
        high=float(high),
        method="bootstrap" if len(by_seed) == 1 else "joint_bootstrap",
        by_seed=by_seed,
        n_prompts=sums.shape[1],
        se=float(means.std(ddof=1)) if replicates > 1 else math.nan,
    )


def paired_difference(
    values_a: Sequence[float],
    values_b: Sequence[float],
    prompts: Sequence[Hashable],
    seeds: Sequence[int],
    *,
    level: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> Pooled:
    """Compares two methods on the same rows: `pooled` of a - b.

    Row i of `a` and of `b` must be the same attempt (seed and prompt).
    Raises ValueError for unequal lengths, empty input, or a value that is not finite.
    """
    if len(values_a) != len(values_b):
        raise ValueError(
            f"paired_difference needs pairs, got {len(values_a)} and {len(values_b)} values"
        )
    difference = np.asarray(values_a, float) - np.asarray(values_b, float)
    return pooled(
        difference.tolist(), prompts, seeds, level=level, replicates=replicates, seed=seed
    )
