"""Ranking and calibration against twins that count pairs and bins one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbf_jax.evaluation import binary_metrics as metrics

ROWS = st.lists(
    st.tuples(st.integers(0, 6), st.booleans(), st.integers(0, 3)), min_size=1, max_size=25
)


def arrays(rows):
    scores, labels, weights = (np.array(part) for part in zip(*rows, strict=True))
    return scores / 6, labels.astype(bool), weights.astype(float)


def slow_auc(scores, labels, weights):
    won = total = 0.0
    for s, y, w in zip(scores, labels, weights, strict=True):
        for t, z, v in zip(scores, labels, weights, strict=True):
            if y and not z:
                won += w * v * ((s > t) + 0.5 * (s == t))
                total += w * v
    return won / total if total else math.nan


def slow_average_precision(scores, labels, weights):
    top = bottom = 0.0
    for s, y, w in zip(scores, labels, weights, strict=True):
        if y and w:
            kept = weights * (scores >= s)
            top += w * (kept * labels).sum() / kept.sum()
            bottom += w
    return top / bottom if bottom else math.nan


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_ranking_is_that_of_the_twins(rows):
    scores, labels, weights = arrays(rows)
    for w in (weights, np.ones(len(rows))):
        np.testing.assert_allclose(
            metrics.auc(scores, labels, w), slow_auc(scores, labels, w), equal_nan=True
        )
        np.testing.assert_allclose(
            metrics.average_precision(scores, labels, w),
            slow_average_precision(scores, labels, w),
            equal_nan=True,
        )


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_auc_knows_only_the_order_and_turns_over(rows):
    scores, labels, weights = arrays(rows)
    value = metrics.auc(scores, labels, weights)
    np.testing.assert_allclose(
        metrics.auc(np.exp(3 * scores), labels, weights), value, equal_nan=True
    )
    np.testing.assert_allclose(metrics.auc(-scores, labels, weights), 1 - value, equal_nan=True)
    np.testing.assert_allclose(metrics.auc(scores, ~labels, weights), 1 - value, equal_nan=True)


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_weights_are_repetitions_and_lead(rows):
    scores, labels, weights = arrays(rows)
    again = np.repeat(np.arange(len(rows)), weights.astype(int))
    for metric in (metrics.auc, metrics.average_precision, metrics.brier):
        value = metric(scores, labels, weights)
        if len(again):
            np.testing.assert_allclose(value, metric(scores[again], labels[again]), equal_nan=True)
        stacked = metric(scores, labels, np.stack([weights, np.ones(len(rows))])[None])
        assert stacked.shape == (1, 2)
        np.testing.assert_allclose(stacked[0, 0], value, equal_nan=True)


def test_calibration_error_of_known_bins():
    p = np.array([0.1, 0.1, 0.1, 0.1, 0.8, 0.8, 0.8, 0.8])
    labels = np.array([0, 0, 1, 0, 1, 1, 1, 1], bool)
    assert metrics.calibration_error(p, labels, bins=2) == pytest.approx(0.5 * 0.15 + 0.5 * 0.2)
    assert metrics.calibration_error(
        p, labels, np.array([1, 1, 0, 1, 1, 1, 1, 1.0]), bins=2
    ) == pytest.approx((3 * 0.1 + 4 * 0.2) / 7)
    table = metrics.reliability(p, labels, bins=2)
    assert [row["share_positive"] for row in table] == [0.25, 1.0] and [
        row["n"] for row in table
    ] == [4, 4]
    assert metrics.calibration_error(p[:3], labels[:3], bins=15) == pytest.approx(
        (0.1 + 0.1 + 0.9) / 3
    )


def test_the_floor_is_what_calibrated_labels_show():
    rng = np.random.default_rng(1)
    p = rng.random(600)
    floor = metrics.calibration_floor(p)
    honest = np.mean([metrics.calibration_error(p, rng.random(600) < p) for _ in range(100)])
    assert floor == pytest.approx(honest, rel=0.1) and floor > 0.01
    assert metrics.calibration_error(p, rng.random(600) < p**2) > 2 * floor


def test_bootstrap_covers_the_truth():
    """Two normal classes one standard deviation apart have an AUC of Phi(1 / sqrt 2) = 0.7602."""
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        labels = rng.random(150) < 0.4
        scores = rng.normal(labels.astype(float))
        found = metrics.bootstrap_metric(
            lambda w, s=scores, y=labels: metrics.auc(s, y, w),
            range(150),
            replicates=300,
            seed=seed,
        )
        assert found.low <= found.value <= found.high
        covered += found.low <= 0.7602 <= found.high
    assert covered >= 52


def test_clusters_strata_and_seeds():
    scores, labels = np.arange(12.0), np.arange(12) % 3 == 0
    of = lambda w: metrics.auc(scores, labels, w)  # noqa: E731
    plain = metrics.bootstrap_metric(of, range(12))
    assert metrics.bootstrap_metric(of, range(12)) == plain
    assert metrics.bootstrap_metric(of, range(12), seed=1) != plain
    assert metrics.bootstrap_metric(of, [i // 4 for i in range(12)]).n_prompts == 3
    seen = []
    metrics.bootstrap_metric(
        lambda w: seen.append(w) or w.sum(-1), range(12), strata=[0] * 3 + [1] * 9, replicates=40
    )
    drawn = np.concatenate(seen[1:])
    assert (
        (drawn[:, :3].sum(1) == 3).all()
        and (drawn[:, 3:].sum(1) == 9).all()
        and drawn[:, :3].std() > 0
    )


def test_what_is_undefined_has_no_interval():
    scores = np.array([0.2, 0.4])
    found = metrics.bootstrap_metric(
        lambda w: metrics.auc(scores, np.array([True, True]), w), range(2)
    )
    assert math.isnan(found.value) and math.isnan(found.low) and found.method == "none"
    assert metrics.bootstrap_metric(lambda w: w.sum(-1), []).n == 0
    # Replicates without a positive row are left out.
    found = metrics.bootstrap_metric(
        lambda w: metrics.auc(scores, np.array([False, True]), w), range(2)
    )
    assert (found.low, found.high) == (1.0, 1.0)
