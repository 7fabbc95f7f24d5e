import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbf_jax.evaluation.intervals import bootstrap, interval, paired_difference, wilson


def test_wilson_known_values():
    # Brown, Cai and DasGupta (2001): roots of |p - k/n| = z sqrt(p (1 - p) / n).
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_limits_solve_the_score_equation(case):
    k, n = case
    z = 1.959963984540054
    for p in wilson(k, n):
        if 0 < p < 1:
            assert abs(p - k / n) == pytest.approx(z * math.sqrt(p * (1 - p) / n), rel=1e-6)
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1


def test_wilson_refuses_nonsense():
    for k, n in ((1, 0), (3, 2), (-1, 4)):
        with pytest.raises(ValueError, match="wilson"):
            wilson(k, n)


def test_bootstrap_equals_brute_force():
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.5, 0.25]
    prompts = ["a", "a", "b", "c", "c", "c", "d"]
    rng = np.random.default_rng(3)
    groups = [[0, 1], [2], [3, 4, 5], [6]]
    means = []
    for drawn in rng.integers(0, 4, (500, 4)):
        rows = [i for cluster in drawn for i in groups[cluster]]
        means.append(np.mean([values[i] for i in rows]))
    expected = np.quantile(means, [0.025, 0.975])
    assert bootstrap(values, prompts, replicates=500, seed=3) == pytest.approx(tuple(expected))


def test_bootstrap_widens_with_clusters():
    """Ten copies of every row are not ten times the evidence."""
    values = list(np.random.default_rng(0).normal(size=40))
    single = bootstrap(values, range(40), seed=1)
    copied = bootstrap(values * 10, list(range(40)) * 10, seed=1)
    naive = bootstrap(values * 10, range(400), seed=1)
    assert copied == pytest.approx(single)
    assert naive[1] - naive[0] < 0.5 * (copied[1] - copied[0])


def test_bootstrap_covers():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        rate = rng.normal(size=40).repeat(3)
        values = rate + 0.3 * rng.normal(size=120)
        low, high = bootstrap(values, np.arange(40).repeat(3).tolist(), replicates=300, seed=trial)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_interval_chooses_its_method():
    assert interval([1.0, 0.0, 1.0], ["a", "b", "c"]).method == "wilson"
    assert interval([1.0, 0.0, 1.0], ["a", "a", "c"]).method == "bootstrap"
    assert interval([0.5, 0.2], ["a", "b"]).method == "bootstrap"
    assert interval([1.0, 0.0, 1.0], ["a", "b", "c"], counts=True).method == "bootstrap"
    certain = interval([0.0] * 6, ["a", "b", "c"] * 2)
    assert certain.method == "wilson_prompts" and certain.high == pytest.approx(wilson(0, 3)[1])
    empty = interval([], [])
    assert empty.n == 0 and math.isnan(empty.value)


def test_bootstrap_refuses_nan_and_unequal_lengths():
    with pytest.raises(ValueError, match="not finite"):
        bootstrap([float("nan")], ["a"])
    with pytest.raises(ValueError, match="2 values, 1 prompts"):
        bootstrap([0.0, 1.0], ["a"])


def test_paired_difference_lists_seeds_and_uses_pairing():
    rng = np.random.default_rng(0)
    prompts, seeds = [f"p{i}" for i in range(60)] * 2, [0] * 60 + [1] * 60
    b = rng.normal(size=120) * 5
    a = b + 0.1 + np.repeat([0.0, 0.2], 60) + 0.01 * rng.normal(size=120)
    found = paired_difference(a.tolist(), b.tolist(), prompts, seeds)
    assert found.by_seed == pytest.approx({0: np.mean((a - b)[:60]), 1: np.mean((a - b)[60:])})
    assert found.value == pytest.approx(0.2, abs=0.01)
    # Unpaired, a spread of 5 over 120 rows would hide a difference of 0.2.
    assert 0.19 < found.low <= found.value <= found.high < 0.21
    assert found.n_prompts == 120


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.integers(0, 5)), min_size=1, max_size=30))
def test_bootstrap_is_seeded_and_within_the_data(rows):
    values, prompts = [v for v, _ in rows], [p for _, p in rows]
    low, high = bootstrap(values, prompts, replicates=200, seed=7)
    assert (low, high) == bootstrap(values, prompts, replicates=200, seed=7)
    assert min(values) <= low <= high <= max(values)
