"""How well scores tell two classes apart and how honest they are as probabilities;
numpy, with bootstrap intervals.

Every metric takes weights with leading axes, so that a bootstrap is one call: replicate r gives row
i the weight (number of times that its cluster was drawn).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from rlbf_jax.evaluation.intervals import Interval

BINS = 15
"""Of the calibration error, with equal numbers of rows."""

Metric = Callable[[np.ndarray], np.ndarray]
"""Weights [..., n] -> values [...]; NaN where the weights leave it undefined."""


def auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve: how often a positive row outscores a negative one,
    ties counting half.

    Args:
      scores: [n], finite.
      labels: bool [n].
      weights: [..., n]; None: all 1.

    Returns:
      float64 [...]; NaN without a positive or without a negative row.
    """
    positive, negative = _by_score(scores, labels, weights)
    below = np.cumsum(negative, -1) - negative
    won = (positive * (below + 0.5 * negative)).sum(-1)
    return _ratio(won, positive.sum(-1) * negative.sum(-1))


def average_precision(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Mean precision at the score of each positive row, rows with equal scores retrieved together.

    Arguments and result as for `auc`; NaN without a positive row.
    """
    positive, negative = (part[..., ::-1] for part in _by_score(scores, labels, weights))
    hits = np.cumsum(positive, -1)
    precision = _ratio(hits, hits + np.cumsum(negative, -1))
    return _ratio((positive * np.where(positive > 0, precision, 0)).sum(-1), positive.sum(-1))


def brier(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Mean squared difference of probability and label. Arguments and result as for `auc`."""
    w = _weights(labels, weights)
    return _ratio((w * (probabilities - labels) ** 2).sum(-1), w.sum(-1))


def calibration_error(
    probabilities: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray | None = None,
    bins: int = BINS,
) -> np.ndarray:
    """Expected calibration error:
    mean over bins of |share of positives - mean probability|, weighted by rows.

    Bins have equal numbers of rows (+- 1), in the order of the probabilities. They are those of the
    unweighted rows. It is above 0 for a perfectly calibrated classifier too (`calibration_floor`).
    Arguments and result as for `auc`.
    """
    w = _weights(labels, weights)
    off = [
        np.abs((w[..., b] * (labels[b] - probabilities[b])).sum(-1))
        for b in _bins(probabilities, bins)
    ]
    return _ratio(np.sum(off, 0), w.sum(-1))


def calibration_floor(
    probabilities: np.ndarray, bins: int = BINS, replicates: int = 500, seed: int = 0
) -> float:
    """Mean calibration error of labels that are drawn from the probabilities: what perfect
    calibration would show."""
    rng = np.random.default_rng(seed)
    drawn = [rng.random(len(probabilities)) < probabilities for _ in range(replicates)]
    return float(np.mean([calibration_error(probabilities, labels, bins=bins) for labels in drawn]))


def reliability(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS
) -> list[dict[str, float]]:
    """The table behind `calibration_error`: rows, mean probability and share
    of positives of each bin."""
    parts = _bins(probabilities, bins)
    return [
        {
            "n": len(b),
            "mean_probability": float(probabilities[b].mean()),
            "share_positive": float(labels[b].mean()),
        }
        for b in parts
    ]


def bootstrap_metric(
    metric: Metric,
    clusters: Sequence[Hashable],
    *,
    strata: Sequence[Hashable] | None = None,
    level: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
) -> Interval:
    """A metric of all rows with its percentile bootstrap interval over clusters.

    Args:
      metric: of weights [..., n].
      clusters: the cluster of each row; rows with the same text, say.
      strata: of each row; clusters are drawn within strata, whose sizes stay. None: one stratum.
      replicates: those in which the metric is undefined are left out.
    """
    index: dict[Hashable, int] = {}
    keys = list(clusters) if strata is None else list(zip(strata, clusters, strict=True))
    member = np.array([index.setdefault(key, len(index)) for key in keys], np.int64)
    n = len(member)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, "none", 0, 0)
    value = float(metric(np.ones(n)))
    labels: Sequence[Any] = list(index)
    owners = [0] * len(labels) if strata is None else [label[0] for label in labels]
    groups: dict[Hashable, list[int]] = {}
    for cluster, owner in enumerate(owners):
        groups.setdefault(owner, []).append(cluster)
    rng = np.random.default_rng(seed)
    counts = np.zeros((replicates, len(index)))
    for group in groups.values():
        counts[:, group] = rng.multinomial(
            len(group), np.full(len(group), 1 / len(group)), size=replicates
        )
    found = np.concatenate(
        [np.atleast_1d(metric(part[:, member])) for part in np.array_split(counts, 20)]
    )
    found = found[np.isfinite(found)]
    if math.isnan(value) or not len(found):
        return Interval(value, math.nan, math.nan, "none", n, len(index))
    low, high = np.quantile(found, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(value, float(low), float(high), "bootstrap", n, len(index))


def _weights(labels: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    return np.ones(len(labels)) if weights is None else weights


def _by_score(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of positive and negative rows at each distinct score, ascending:
    two arrays [..., distinct]."""
    w = _weights(labels, weights)
    if not len(scores):
        return np.zeros((*w.shape[:-1], 0)), np.zeros((*w.shape[:-1], 0))
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    w, positive = w[..., order], labels[order]
    return np.add.reduceat(w * positive, starts, -1), np.add.reduceat(w * ~positive, starts, -1)


def _bins(probabilities: np.ndarray, bins: int) -> list[np.ndarray]:
    order = np.argsort(probabilities, kind="stable")
    return [part for part in np.array_split(order, bins) if len(part)]


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), np.nan)
