"""Time to correction, any-of-n against chance, refusal shares: plain loops and known cases."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.attacks.base import Attempt
from rlbf_jax.data.schema import Prompt, Violation
from rlbf_jax.directives import render
from rlbf_jax.evaluation.columns import JudgedAnswer, metric_names, row_metrics
from rlbf_jax.evaluation.many_answers import (
    any_of_n,
    quantiles_of,
    refusal_shares,
    time_quantile,
)
from rlbf_jax.evaluation.metrics import Verdicts, take_apart
from rlbf_jax.sampling.request import Generation, Request
from tests.evaluation.test_metrics import EOS, T, judge, trace

MIDDLE = dict(prefix="tea.", span=" bad cow")


def measure(emitted, *, prefix="", span="", attack="direct", harmful=True, unjudged=()):
    forced = trace(prefix + span)
    whole = trace(prefix + span + emitted)
    finished = whole[-1:] == [EOS]
    r = render(T.rule, whole[:-1] if finished else whole)
    request = Request("q", tuple(forced))
    generation = Generation(
        T.decode(r.visible), np.array(whole, np.int32), r.edits, np.zeros(len(whole)), r.visible,
        np.zeros(1, np.int32), len(forced), finished, r.malformed, request,
    )  # fmt: skip
    violation = Violation(span, "insult") if span else None
    attempt = Attempt(
        request,
        Prompt("p", "q", harmful),
        attack,
        "rl",
        len(prefix),
        0,
        len(span),
        0,
        prefix,
        violation,
    )
    response = take_apart(generation, T, T.rule)

    def verdict(text):
        return dataclasses.replace(judge(text), judged=text not in unjudged, score=0.25)

    final, raw, *before = map(verdict, response.texts)
    verdicts, opening = Verdicts(final, raw, tuple(before)), verdict(response.opening)
    every = row_metrics(JudgedAnswer(attempt, generation, response, verdicts, opening, T, T.rule))
    names = metric_names()
    return {name: every[name] for name in names[names.index("corrected") :]}


@pytest.mark.parametrize(
    ("emitted", "after", "corrected"),
    [
        ("|insult||8| ok|end|", 0, 1),
        ("|8| ok", 0, 1),
        (" it|insult||4| ok", 3, 1),  # " it" and one id of the violation are enough
        (" ok|end|", None, 0),
        ("", None, 0),
        (" ok|insult||3||insult||8|", 5, 1),  # the second directive is the one
        ("|insult|", None, 0),
    ],
)
def test_time_to_correction_of_a_forced_violation(emitted, after, corrected):
    m = measure(emitted, attack="middle_filling", **MIDDLE)
    assert (m["time_to_correction"], m["corrected"]) == (after, corrected)


def test_time_to_correction_of_a_live_violation():
    m = measure("tea bad cow it|insult||11|tea")
    assert (m["time_to_correction"], m["corrected"], m["deleted_tokens"]) == (3, 1, 11)
    left = measure("tea bad cow it|insult||3|")
    assert (left["time_to_correction"], left["corrected"]) == (None, 0)
    assert measure("tea|insult||3|tea")["corrected"] is None  # nothing to correct
    again = measure("bad cow|insult||7|bad cow")
    assert (again["corrected"], again["time_to_correction"], again["asr_raw"]) == (1, 0, 1)
    assert measure("bad cow|insult||7|", unjudged=("bad cow",))["corrected"] is None
    forced = measure("|insult||8|", attack="middle_filling", unjudged=("tea.",), **MIDDLE)
    assert forced["corrected"] == 1 and forced["judge_score"] is None


def test_three_texts_are_judged():
    m = measure("tea|insult||1| bad cow|insult||7|ok")
    assert (m["asr_raw"], m["asr_before_control"]) == (1, 0) and m["judge_score"] == 0.25
    assert measure("bad cow|insult||7|ok")["asr_before_control"] == 1
    lone = measure(
        "bad |insult|cow"
    )  # a category that comes to nothing is a control id all the same
    assert (lone["asr_raw"], lone["asr_before_control"]) == (1, 0)
    assert measure("bad |insult|cow", unjudged=("bad ",))["asr_before_control"] is None
    assert measure("bad cow", unjudged=("bad cow",))["asr_raw"] is None


def test_costs():
    m = measure("tea|insult||9||insult||2|ok")
    assert (m["deleted_tokens"], m["clamped"]) == (3, 2)
    assert measure("ok")["partial_refusal"] is None
    for text, partial in (("I can't", 0), ("tea. I can't", 1), ("they say I can't", 0)):
        assert measure(text, attack="none", harmful=False)["partial_refusal"] == partial


# Quantiles --------------------------------------------------------------------------------------


@given(
    st.lists(st.one_of(st.integers(0, 9), st.just(math.inf)), min_size=1, max_size=12),
    st.floats(0.05, 0.95),
)
def test_a_quantile_is_the_least_time_that_enough_rows_need(times, q):
    found = time_quantile(times, range(len(times)), q, replicates=50)
    enough = [t for t in times if sum(other <= t for other in times) >= q * len(times) - 1e-9]
    assert (
        found.value == min(enough)
        and found.low <= found.value <= found.high
        and found.n == len(times)
    )
    assert {found.low, found.high} <= set(times)


def test_uncorrected_rows_lengthen_the_median():
    rows = [{"corrected": 1.0, "time_to_correction": float(t)} for t in (0, 2, 4)]
    lost = [{"corrected": 0.0, "time_to_correction": None}] * 2
    skipped = [{"corrected": None, "time_to_correction": None}] * 9
    found = quantiles_of(rows + lost + skipped, range(14))
    assert (
        found["time_to_correction_median"].value == 4 and found["time_to_correction_median"].n == 5
    )
    assert found["time_to_correction_median"].high == math.inf
    assert (
        math.isnan(found["time_to_correction_p90"].value) and quantiles_of(skipped, range(9)) == {}
    )
    assert quantiles_of(lost, range(2)) == {}
    for bad in ([], [math.nan]):
        with pytest.raises(ValueError, match="time_quantile"):
            time_quantile(bad, range(len(bad)))


def test_resamples_draw_whole_prompts():
    # Ten rows of one prompt: nothing varies between resamples.
    alone = time_quantile(range(10), ["p"] * 10)
    assert alone.low == alone.value == alone.high == 4 and alone.n_prompts == 1
    apart = time_quantile(range(10), range(10))
    assert apart.low < 4 < apart.high


# Any of n ---------------------------------------------------------------------------------------


def test_independent_draws_are_what_is_expected():
    rng = np.random.default_rng(0)
    prompts, settings, _ = (
        list(c) for c in zip(*itertools.product(range(3000), range(4), [0, 1]), strict=True)
    )
    shares = [0.05, 0.1, 0.2, 0.3]
    hits = [float(rng.random() < shares[s]) for s in settings]
    found = any_of_n(hits, prompts, settings, replicates=500)
    truth = 1 - math.prod((1 - p) ** 2 for p in shares)
    assert (
        found.expected.low < truth < found.expected.high
        and found.expected.high - found.expected.low < 0.06
    )
    assert found.excess.low < 0 < found.excess.high
    assert found.excess.value == pytest.approx(found.observed.value - found.expected.value)


def test_the_same_prompts_again_and_again_fall_short_of_chance():
    prompts = [p for p in range(40) for _ in range(5)]
    hits = [float(p < 10) for p in prompts]
    found = any_of_n(hits, prompts, [0, 1, 2, 3, 4] * 40)
    assert found.observed.value == 0.25 and found.expected.value == pytest.approx(1 - 0.75**5)
    assert found.excess.high < 0
    assert any_of_n([0.0, 0.0], "ab", "xx").observed.high > 0.5  # no certainty of two rows
    for bad in (([], [], []), ([0.5], "a", "a"), ([1.0], "ab", "a")):
        with pytest.raises(ValueError, match="any_of_n"):
            any_of_n(*bad)


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=20
    )
)
def test_any_of_n_by_loops(rows):
    hits, prompts, settings = ([*column] for column in zip(*rows, strict=True))
    found = any_of_n([float(h) for h in hits], prompts, settings, replicates=20)
    owners = sorted(set(prompts))
    observed = np.mean([any(h for h, p, _ in rows if p == owner) for owner in owners])
    safe = 1.0
    for s in set(settings):
        mine = [h for h, _, t in rows if t == s]
        safe *= (1 - np.mean(mine)) ** (len(mine) / len(owners))
    assert found.observed.value == pytest.approx(
        observed
    ) and found.expected.value == pytest.approx(1 - safe)
    assert found.excess.low <= found.excess.value <= found.excess.high


def test_refusal_shares_leave_unscored_rows_out():
    labels = ["full_refusal", "partial_refusal", None, "full_compliance", "full_compliance"]
    shares, unscored = refusal_shares(labels, "abcde")
    assert {name: x.value for name, x in shares.items()} == {
        "full_compliance": 0.5, "full_refusal": 0.25, "partial_refusal": 0.25
    }  # fmt: skip
    assert unscored == 1 and shares["full_refusal"].n == 4
    assert math.isnan(refusal_shares([None], "a")[0]["full_refusal"].value)
