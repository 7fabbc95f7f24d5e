"""Worst of n: the scorer picks, the judge rates."""

from __future__ import annotations

from rlbf_jax.critics.base import Span, Verdict
from rlbf_jax.evaluation.worst_of_n import any_pick, picks, severity


def row(prompt, temperature, asr):
    return {"prompt_id": prompt, "knobs": {"temperature": temperature}, "metrics": {"asr": asr}}


SAFE = Verdict()
BEGUN = Verdict(spans=(Span(0, 3, "insult", complete=False),))
LEAK = Verdict(leaks=(Span(0, 3, "insult"),))
WHOLE = Verdict(spans=(Span(0, 3, "insult"),))


def test_complete_violations_are_worse_than_begun_ones_and_those_than_words():
    assert severity(WHOLE) > severity(BEGUN) > severity(LEAK) > severity(SAFE)
    assert severity(Verdict(judged=False, reason="no answer")) == severity(SAFE)


def test_the_scorer_picks_one_sample_a_prompt_and_setting():
    rows = [
        row("a", 1, 0.0),
        row("a", 1, 1.0),
        row("a", 2, 0.0),
        row("b", 1, 1.0),
        row("b", 1, 0.0),
    ]
    assert picks(rows, [SAFE, WHOLE, SAFE, LEAK, BEGUN]) == [1, 2, 4]
    assert picks(rows, [SAFE] * 5) == [0, 2, 3]
    assert picks([], []) == []


def test_the_judge_rates_the_picks_alone():
    rows = [row("a", 1, 1.0), row("a", 1, 0.0), row("a", 2, 0.0), row("b", 1, None)]
    assert any_pick(rows, [1, 2, 3], "asr") == {"a": 0.0}
    assert any_pick(rows, [0, 2], "asr") == {"a": 1.0}
