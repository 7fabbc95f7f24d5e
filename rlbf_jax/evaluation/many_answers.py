"""What is measured of many rows at once: quantiles of times to correction, the worst of n answers
against chance, shares of refusals. Intervals are bootstraps over prompts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from rlbf_jax.critics.judges.refusal import LABELS, Label
from rlbf_jax.evaluation.intervals import Interval, interval

QUANTILES = {"time_to_correction_median": 0.5, "time_to_correction_p90": 0.9}
"""Records of `time_to_correction`: quantiles over all rows with a violation, those never corrected
counted as infinite, so that a model cannot shorten its times by correcting the easy ones only."""


def _resampled(
    prompts: Sequence[Hashable], replicates: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(cluster of each row [N], how often each replicate draws each cluster [R, P]),
    clusters being prompts."""
    index: dict[Hashable, int] = {}
    member = np.array([index.setdefault(prompt, len(index)) for prompt in prompts], np.int64)
    size = len(index)
    return member, np.random.default_rng(seed).multinomial(
        size, np.full(size, 1 / size), replicates
    )


def _quantile(times: np.ndarray, weights: np.ndarray, q: float) -> np.ndarray:
    """[R] smallest time within which a share q of the weight lies. times [N], weights [R, N]."""
    order = np.argsort(times, kind="stable")
    reached = np.cumsum(weights[:, order], 1)
    enough = reached >= q * reached[:, -1:] - 1e-9
    return times[order][enough.argmax(1)]


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    # No interpolation: it would make a NaN of two infinities.
    low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2], method="inverted_cdf")
    return float(low), float(high)


def time_quantile(
    times: Sequence[float],
    prompts: Sequence[Hashable],
    q: float = 0.5,
    *,
    level: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> Interval:
    """Quantile of times to correction, with a bootstrap interval clustered by prompt.

    A response that is over can no longer be corrected, so an uncorrected violation counts as
    infinite, and not as a survival time that was merely cut off: the quantile is the time within
    which a share q of *all* violations is corrected.

    Args:
        times: ids, one a row with a violation; `math.inf`: never corrected.
        prompts: each row's prompt.

    Returns:
        Value and limits are infinite where fewer rows than q are corrected.

    Raises ValueError for unequal lengths, no row, a NaN, or q outside 0..1.
    """
    array = np.asarray(times, float)
    if len(array) == 0 or len(array) != len(prompts) or np.isnan(array).any() or not 0 < q < 1:
        raise ValueError(
            "time_quantile needs one prompt a time, at least one time, no NaN, and 0 < q < 1"
        )
    member, drawn = _resampled(prompts, replicates, seed)
    value = float(_quantile(array, np.ones((1, len(array))), q)[0])
    low, high = _percentiles(_quantile(array, drawn[:, member], q), level)
    return Interval(
        value, min(low, value), max(high, value), "bootstrap", len(array), drawn.shape[1]
    )


@dataclasses.dataclass(frozen=True)
class AnyOfN:
    """Worst of n beside what chance would give."""

    observed: Interval
    """Share of prompts with a hit among their answers."""
    expected: Interval
    """1 - prod over settings s of (1 - p_s)^k_s: p_s the setting's mean over prompts,
    k_s its answers a prompt."""
    excess: Interval
    """observed - expected. Below 0: the same few prompts are hit under every setting."""


def any_of_n(
    hits: Sequence[float],
    prompts: Sequence[Hashable],
    settings: Sequence[Hashable],
    *,
    level: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
) -> AnyOfN:
    """Any-of-n against independent draws; intervals by bootstrap over prompts,
    all three from the same resamples.

    Args:
        hits: 0 or 1, one a row.
        prompts, settings: each row's.

    Raises ValueError for unequal lengths, no row, or a hit that is neither 0 nor 1.
    """
    if not hits or not len(hits) == len(prompts) == len(settings) or set(hits) - {0, 1}:
        raise ValueError(
            "any_of_n needs one prompt and one setting a hit, at least one hit, and hits of 0 or 1"
        )
    member, drawn = _resampled(prompts, replicates, seed)
    columns: dict[Hashable, int] = {}
    setting = np.array([columns.setdefault(s, len(columns)) for s in settings], np.int64)
    sums, counts = np.zeros((2, drawn.shape[1], len(columns)))
    np.add.at(sums, (member, setting), np.asarray(hits, float))
    np.add.at(counts, (member, setting), 1.0)
    worst, draws = sums.any(1).astype(float), counts.sum(0) / drawn.shape[1]

    def measured(weights: np.ndarray) -> np.ndarray:
        """[3, R]: observed, expected, excess."""
        total = weights @ counts
        means = (weights @ sums) / np.where(total > 0, total, 1)
        expected = 1 - np.prod((1 - means) ** draws, 1)
        observed = weights @ worst / weights.sum(1)
        return np.stack([observed, expected, observed - expected])

    values = measured(np.ones((1, drawn.shape[1])))[:, 0]
    intervals = []
    for value, replicated in zip(values.tolist(), measured(drawn), strict=True):
        low, high = _percentiles(replicated, level)
        # Resampling biases a product of means downwards;
        # the estimate itself always belongs to its interval.
        intervals.append(
            Interval(
                value, min(low, value), max(high, value), "bootstrap", len(hits), drawn.shape[1]
            )
        )
    return AnyOfN(interval(worst.tolist(), range(len(worst)), level=level), *intervals[1:])


def refusal_shares(
    labels: Sequence[Label | None], prompts: Sequence[Hashable]
) -> tuple[dict[Label, Interval], int]:
    """(share of each of XSTest's classes, unscored rows). Over-refusal is full and partial refusal
    of safe prompts, shown apart; a row without a label is in no share."""
    scored = [
        (label, prompt) for label, prompt in zip(labels, prompts, strict=True) if label is not None
    ]
    owners = [prompt for _, prompt in scored]
    shares = {
        name: interval([float(label == name) for label, _ in scored], owners) for name in LABELS
    }
    return shares, len(labels) - len(scored)


def quantiles_of(
    metrics: Sequence[Mapping[str, float | None]],
    prompts: Sequence[Hashable],
    quantiles: Mapping[str, float] = QUANTILES,
) -> dict[str, Interval]:
    """The quantiles of `time_to_correction` over rows with a violation; NaN where too few are
    corrected, and none where no row is."""
    rows = [
        (math.inf if m["time_to_correction"] is None else m["time_to_correction"], prompt)
        for m, prompt in zip(metrics, prompts, strict=True)
        if m["corrected"] is not None
    ]
    if all(time == math.inf for time, _ in rows):
        return {}
    times, owners = zip(*rows, strict=True)
    intervals = {name: time_quantile(times, owners, q) for name, q in quantiles.items()}
    return {
        name: dataclasses.replace(x, value=x.value if math.isfinite(x.value) else math.nan)
        for name, x in intervals.items()
    }
