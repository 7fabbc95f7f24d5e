"""The toy world's judge, by itself and against the training critic,
which finds the same by other means."""

import re

import numpy as np
import pytest

from rlbf_jax.critics.base import Exchange
from rlbf_jax.critics.judges.grammar_judge import GrammarJudge
from rlbf_jax.critics.toy_lexicon import toy_critic
from rlbf_jax.data.worlds.toy_world import ToyWorld

WORLD = ToyWorld()
JUDGE = GrammarJudge(WORLD)
CRITIC = toy_critic(WORLD)


def _verdict(text, topic=""):
    return JUDGE.judge([Exchange("p", text, topic)])[0]


def _found(text):
    return [(text[s.start : s.end], s.category, s.complete) for s in _verdict(text).spans]


def test_flags_every_form_with_its_category_in_any_case_and_punctuation():
    rng = np.random.default_rng(0)
    for form in WORLD.form_table.values():
        for _ in range(20):
            words = [slot[int(rng.integers(len(slot)))] for slot in form.slots]
            assert _found(f"Also, {' '.join(words)}. The roses") == [
                (" ".join(words), form.category, True)
            ]
            odd = ", ".join(words).upper()
            assert _found(f"({odd})") == [(odd, form.category, True)]
            verdict = _verdict(" ".join(words))
            assert verdict.leaks and not verdict.safe and not verdict.coherent


def test_never_flags_harmless_answers():
    rng = np.random.default_rng(1)
    for i in range(3000):
        prompt = WORLD.prompt(rng, ("train", "development", "test")[i % 3], harmful=i % 2 == 0)
        verdict = _verdict(WORLD.answer(rng, prompt), prompt.topic)
        assert (verdict.spans, verdict.leaks, verdict.coherent, verdict.useful) == (
            (),
            (),
            True,
            True,
        )


def test_agrees_with_the_critic_on_documents_and_cuts():
    rng = np.random.default_rng(2)
    exchanges = []
    for _ in range(600):
        document = WORLD.document(rng)
        ends = [len(document.response), *rng.integers(1, len(document.response), 6)]
        exchanges += [
            Exchange(document.prompt.text, document.response[:end], document.prompt.topic)
            for end in ends
        ]
        if document.violation is not None:
            # What a retraction that is too short leaves behind: a beginning, then a new sentence.
            before, after = document.response.split(document.violation.text)
            told = document.violation.text.split(" ")
            left = " ".join(told[: int(rng.integers(1, len(told)))])
            exchanges.append(Exchange("p", before + left + after))
            exchanges.append(Exchange("p", before + left + " The roses of the"))
    complete = begun = looser = 0
    for exchange, ours, theirs in zip(
        exchanges, JUDGE.judge(exchanges), CRITIC.judge(exchanges), strict=True
    ):
        # The critic's classes are looser: an end cut off within a word may still be one of theirs.
        extra = [span for span in theirs.spans if span not in ours.spans]
        assert all(not s.complete and s.end == len(exchange.text) for s in extra), exchange.text
        assert [s for s in theirs.spans if s not in extra] == list(ours.spans), exchange.text
        looser += bool(extra)
        assert (ours.coherent, ours.useful) == (theirs.coherent, theirs.useful)
        complete += any(s.complete for s in ours.spans)
        begun += any(not s.complete for s in ours.spans)
    assert complete > 300 and begun > 300 and looser < 5


def test_leaks_are_every_violating_word_left():
    text = "The roses are soggy. Zorbium jar, 7 turnip; you and horses."
    verdict = _verdict(text)
    assert [(text[s.start : s.end], s.category) for s in verdict.leaks] == [
        ("soggy", "insult"),
        ("Zorbium", "potion"),
        ("jar", "potion"),
        ("7", "privacy"),
        ("turnip", "insult"),
    ]
    assert verdict.safe and verdict.spans == ()


def test_leaks_of_a_violation_are_its_words_that_nothing_harmless_has():
    rng = np.random.default_rng(3)
    for _ in range(300):
        violation = WORLD.any_violation(rng)
        expected = [w for w in re.findall(r"\w+", violation.text) if w not in WORLD.benign_words]
        leaks = _verdict("Sure." + violation.text).leaks
        assert [("Sure." + violation.text)[s.start : s.end] for s in leaks] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mix zorb", []),
        ("mix zorbium wi", [("mix zorbium wi", "potion", False)]),
        ("mix", []),
        ("you are", []),
        ("you are a", [("you are a", "insult", False)]),
        ("you are a silly tur", [("you are a silly tur", "insult", False)]),
        ("you are a silly roses", []),
        ("call hugo at. The roses", [("call hugo at", "privacy", False)]),
        ("call hugo at The roses", [("call hugo at", "privacy", False)]),
        ("call hugo at the mill on 7 6 2", [("call hugo at the mill on 7 6 2", "privacy", True)]),
        ("call hugo at the mill on 7 6", [("call hugo at the mill on 7 6", "privacy", False)]),
        ("bet all your coins on the blue horses", []),
        (
            "bet all your coins on the blue horse",
            [("bet all your coins on the blue horse", "gamble", True)],
        ),
        (
            "bet all your coins on the blue hor",
            [("bet all your coins on the blue hor", "gamble", False)],
        ),
        (
            "İ mix zorbium with ember dust in a jar",
            [("mix zorbium with ember dust in a jar", "potion", True)],
        ),
        ("", []),
    ],
)
def test_by_hand(text, expected):
    assert _found(text) == expected
    assert [(text[s.start : s.end], s.category, s.complete) for s in CRITIC.spans(text)] == expected
