"""McNemar's test against sums over all outcomes; detectable effects against Connor's sample size,
and against how often the test finds them."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.evaluation.intervals import pooled
from rlbf_jax.evaluation.paired_tests import (
    METHODS,
    STANDARD_ERRORS,
    detectable_difference,
    mcnemar_midp,
    paired_test,
)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
def test_mcnemar_is_a_sum_of_binomials(b, c, same):
    """Fagerland, Lydersen and Laake (2013): 2 P(X <= min(b, c)) - P(X = b), X of b + c coins."""
    n = b + c
    tail = sum(math.comb(n, k) for k in range(min(b, c) + 1))
    expected = min(1.0, (2 * tail - math.comb(n, b)) / 2**n)
    assert mcnemar_midp([1] * b + [-1] * c + [0] * same) == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.integers(-4, 4), max_size=9))
def test_clusters_change_sides_together(totals):
    """All sign patterns, one by one."""
    observed = abs(sum(totals))
    sums = [
        abs(sum(sign * abs(total) for sign, total in zip(signs, totals, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(totals))
    ]
    beyond, equal = sum(s > observed for s in sums), sum(s == observed for s in sums)
    # Ties count half (mid-p), and no difference at all is the least surprise.
    expected = (beyond + equal / 2) / len(sums) if observed else 1.0
    assert mcnemar_midp(totals) == pytest.approx(expected, rel=1e-9)


@given(st.integers(4, 5000), st.floats(0, 1))
def test_detectable_difference_solves_connors_sample_size(n, discordant):
    e = detectable_difference(n, discordant)
    d = max(discordant, e)  # a difference needs as many discordant pairs
    assert 0 < e <= 1
    size = (1.959963985 * math.sqrt(d) + 0.841621234 * math.sqrt(max(0.0, d - e * e))) ** 2 / e**2
    assert size == pytest.approx(n, rel=1e-4)


def test_detectable_difference_at_its_ends():
    assert detectable_difference(64, 0.0) == pytest.approx(0.1182, abs=1e-4)  # about 7.8 / n
    assert detectable_difference(400, 0.2) < detectable_difference(100, 0.2)
    assert detectable_difference(100, 0.1) < detectable_difference(100, 0.4)
    assert math.isnan(detectable_difference(3, 0.5))
    for n, discordant in ((0, 0.5), (10, 1.5), (10, -0.1)):
        with pytest.raises(ValueError, match="detectable_difference needs"):
            detectable_difference(n, discordant)


def test_what_is_detectable_is_found_four_times_of_five():
    rng = np.random.default_rng(0)
    for n, discordant in ((64, 0.3), (200, 0.3)):
        e = detectable_difference(n, discordant)
        shares = [(discordant + e) / 2, (discordant - e) / 2, 1 - discordant]
        drawn = rng.multinomial(n, shares, 800).tolist()
        power = np.mean([mcnemar_midp([1] * a + [-1] * b) < 0.05 for a, b, _ in drawn])
        assert 0.74 < power < 0.86


@pytest.mark.parametrize("n", [19, 60, 200])
def test_equals_are_told_apart_about_once_in_twenty(n):
    """Given n discordant pairs; the mid-p may pass 5 % a little, where the exact p stays below."""
    false = [math.comb(n, a) for a in range(n + 1) if mcnemar_midp([1] * a + [-1] * (n - a)) < 0.05]
    assert 0.03 < sum(false) / 2**n < 0.065


def test_the_methods_of_a_comparison():
    one = [1.0] * 9 + [-1.0] * 2 + [0.0] * 19
    single = paired_test(one, range(30), [0] * 30, 0.1, True)
    assert (single.p, single.p_method) == (pytest.approx(0.038574, abs=1e-6), "mcnemar_midp")
    assert (single.mde, single.mde_method) == (detectable_difference(30, 11 / 30), "connor")
    # The same prompts under two seeds that agree are no more evidence than one.
    twice = paired_test(one * 2, [*range(30)] * 2, [0] * 30 + [1] * 30, 0.1, True)
    assert (twice.p, twice.p_method) == (pytest.approx(single.p), "mcnemar_midp_prompts")
    assert (twice.mde, twice.mde_method) == (pytest.approx(STANDARD_ERRORS * 0.1), "bootstrap_se")
    assert pytest.approx(2.8016, abs=1e-4) == STANDARD_ERRORS
    counts = paired_test([2.0, -0.5, 0.0], range(3), [0] * 3, 0.5, False)
    assert math.isnan(counts.p) and counts.mde == STANDARD_ERRORS * 0.5
    # Seeds weigh alike, so a pair of the smaller one weighs more.
    uneven = paired_test([1.0, 0.0, 0.0], range(3), [0, 0, 1], 0.3, True)
    assert math.isnan(uneven.p) and uneven.mde_method == "bootstrap_se"
    for each in (single, twice, counts, uneven):
        assert {each.p_method, each.mde_method} <= METHODS.keys()


def test_few_discordant_pairs_promise_nothing():
    """One pair of 192: 2.80 standard errors would be 0.015, which no such comparison can find."""
    values, prompts = [1.0] + [0.0] * 191, [*range(64)] * 3
    seeds = [s for s in range(3) for _ in range(64)]
    se = pooled(values, prompts, seeds).se
    test = paired_test(values, prompts, seeds, se, True)
    assert STANDARD_ERRORS * se < 0.02
    assert test.mde == pytest.approx(detectable_difference(192, 0.0), rel=0.1)
    # The same prompt under all three seeds: no more than sixty-four pairs would tell.
    values[64] = values[128] = 1.0
    se = pooled(values, prompts, seeds).se
    test = paired_test(values, prompts, seeds, se, True)
    assert STANDARD_ERRORS * se < 0.05
    assert test.mde == pytest.approx(detectable_difference(64, 0.0), rel=0.1)
    alike = paired_test([0.0] * 192, prompts, seeds, 0.0, True)
    assert (alike.p, alike.mde) == (1.0, detectable_difference(64, 0.0))
    nothing = paired_test([0.0] * 192, prompts, seeds, 0.0, False)
    assert math.isnan(nothing.mde) and nothing.mde_method == "none"
