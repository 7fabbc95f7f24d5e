"""The lexicon critic: complete and begun spans, and the ids that spell them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbf_jax.critics.base import Exchange, Span
from rlbf_jax.critics.lexicon import LexiconCritic, covering_ids, pattern
from rlbf_jax.critics.toy_lexicon import TABLE, toy_critic
from rlbf_jax.data.worlds.toy_grammar import parse
from rlbf_jax.data.worlds.toy_world import ToyWorld

WORLD = ToyWorld()
TOY = toy_critic(WORLD)
CLASSES = {"FRUIT": ("apple", "plum"), "WHO": ("ann", "bob")}
SMALL = LexiconCritic(
    [
        pattern("food", "throw the|a FRUIT", CLASSES),
        pattern("food", "throw the FRUIT at WHO", CLASSES),
        pattern("talk", "the secret of * is out", CLASSES),
    ],
    common={"the", "a", "of", "is", "at", "out"},
)


def _found(critic, text):
    return [(text[s.start : s.end], s.category, s.complete) for s in critic.spans(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("throw the apple", [("throw the apple", "food", True)]),
        ("Then THROW, a... 'Plum'!", [("THROW, a... 'Plum", "food", True)]),
        ("throw the apple at bob now", [("throw the apple at bob", "food", True)]),
        ("throw the apple at bo", [("throw the apple", "food", True)]),
        ("throw the app", [("throw the app", "food", False)]),
        ("throw the app is new", []),
        ("throw the. Then", [("throw the", "food", False)]),
        ("throw the Then", [("throw the", "food", False)]),
        ("throw the ball", []),
        ("the secret. Of us all", [("the secret", "talk", False)]),
        ("throw. The apple", [("throw. The apple", "food", True)]),
        ("throw", []),
        ("the secret", [("the secret", "talk", False)]),
        ("the se", []),
        ("the secret of us is out", [("the secret of us is out", "talk", True)]),
        ("the secret of us is ou", [("the secret of us is ou", "talk", False)]),
        ("the secret of", [("the secret of", "talk", False)]),
        ("rethrow the apple", []),
        ("throw the apples", []),
        (
            "throw the plum throw a plum",
            [("throw the plum", "food", True), ("throw a plum", "food", True)],
        ),
        ("", []),
        ("...", []),
    ],
)
def test_by_hand(text, expected):
    assert _found(SMALL, text) == expected


def test_without_distinctive_word_three_words_are_needed():
    critic = LexiconCritic(
        [pattern("c", "it is of the moon", {})], common={"it", "is", "of", "the"}
    )
    assert not critic.spans("it is")
    assert not critic.spans("it is o")
    assert _found(critic, "so it is of") == [("it is of", "c", False)]


def test_wildcard_may_come_first():
    critic = LexiconCritic([pattern("c", "* eats mud", {})])
    assert _found(critic, "Look, bob eats mud") == [("bob eats mud", "c", True)]


OVERLAPPING = LexiconCritic(
    [
        pattern("a", "only a fool would", {}),
        pattern("b", "fool you are", {}),
        pattern("c", "you are mud", {}),
        pattern("d", "a fool", {}),
    ]
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # A complete violation inside a begun one, and one that starts inside it.
        ("only a fool. No", [("only a fool", "a", False), ("a fool", "d", True)]),
        (
            "only a fool. You are",
            [("only a fool", "a", False), ("a fool", "d", True), ("fool. You are", "b", True)],
        ),
        ("fool you are mud", [("fool you are", "b", True), ("you are mud", "c", True)]),
        # What lies inside a complete one is part of it, begun or complete.
        ("only a fool would", [("only a fool would", "a", True)]),
        ("fool you are", [("fool you are", "b", True)]),
        # A begun one that goes on behind a complete one.
        ("a fool you", [("a fool", "d", True), ("fool you", "b", False)]),
        ("fool you are. Mud", [("fool you are", "b", True), ("you are. Mud", "c", True)]),
    ],
)
def test_violations_may_overlap(text, expected):
    assert _found(OVERLAPPING, text) == expected


@given(st.lists(st.sampled_from(["p", "q", "r", "s", "p.", "q.", "R", "x"]), max_size=9))
@settings(max_examples=300)
def test_no_complete_violation_is_hidden(words):
    """Every place that spells a pattern, by a twin, lies inside a complete span; every complete
    span spells one, and none lies inside another."""
    spelled = ["p q r s", "q r p", "r s", "s p q p", "q q"]
    critic = LexiconCritic([pattern("c", text, {}) for text in spelled])
    bare = [word.strip(".").lower() for word in words]
    text, starts = " ".join(words), np.cumsum([0, *(len(word) + 1 for word in words)])
    places = [
        (starts[i], starts[i + n - 1] + 1)
        for i in range(len(words))
        for n in (len(p.split()) for p in spelled if bare[i : i + len(p.split())] == p.split())
    ]
    complete = [(s.start, s.end) for s in critic.spans(text) if s.complete]
    assert set(complete) <= set(places) and len(set(complete)) == len(complete)
    assert all(any(a <= s and e <= b for a, b in complete) for s, e in places)
    assert all(sum(a <= s and e <= b for a, b in complete) == 1 for s, e in complete)
    assert critic.judge([Exchange("", text)])[0].safe == (not places)


def test_bad_patterns_are_refused():
    with pytest.raises(KeyError, match="no word class NOBODY"):
        pattern("c", "call NOBODY", CLASSES)
    with pytest.raises(ValueError, match="fewer than two words"):
        pattern("c", "call", CLASSES)
    with pytest.raises(ValueError, match="no patterns"):
        LexiconCritic([])


def test_coherence_is_asked_only_where_there_is_one():
    assert SMALL.judge([Exchange("p", "hello")])[0].coherent is None
    critic = LexiconCritic(
        [pattern("c", "a b", {})], coherence=lambda text, topic: (text == "x", topic == "t")
    )
    verdicts = critic.judge([Exchange("p", "x", "t"), Exchange("p", "y", "u")])
    assert [(v.coherent, v.useful) for v in verdicts] == [(True, True), (False, False)]


def test_toy_critic_flags_every_form_with_its_category():
    rng = np.random.default_rng(0)
    for form in WORLD.form_table.values():
        for _ in range(25):
            words = [slot[int(rng.integers(len(slot)))] for slot in form.slots]
            text = f"{WORLD.opener(rng)}{WORLD.bridge(rng)} {' '.join(words)}. The roses"
            verdict = TOY.judge([Exchange("p", text)])[0]
            assert _found(TOY, text) == [(" ".join(words), form.category, True)]
            assert not verdict.safe and verdict.coherent is False
    assert sum(map(len, TABLE.values())) == len(WORLD.form_table)


def test_toy_critic_never_flags_harmless_answers_wherever_they_are_cut():
    rng = np.random.default_rng(1)
    for i in range(3000):
        prompt = WORLD.prompt(rng, ("train", "development", "test")[i % 3], harmful=i % 2 == 0)
        answer = WORLD.answer(rng, prompt)
        verdict = TOY.judge([Exchange(prompt.text, answer, prompt.topic)])[0]
        assert (verdict.spans, verdict.coherent, verdict.useful) == ((), True, True)
        assert not TOY.spans(prompt.text)
        cut = answer[: int(rng.integers(len(answer)))]
        assert not TOY.judge([Exchange(prompt.text, cut, prompt.topic)])[0].spans


def test_toy_coherence_is_that_of_the_grammar():
    rng = np.random.default_rng(2)
    for _ in range(200):
        document = WORLD.document(rng)
        text = document.response[: int(rng.integers(1, len(document.response)))]
        verdict = TOY.judge([Exchange("p", text, document.prompt.topic)])[0]
        parsed = parse(text, document.prompt.topic)
        assert (verdict.coherent, verdict.useful) == (parsed.coherent, parsed.useful)


def test_every_cut_of_a_violation_is_begun_until_it_is_complete():
    rng = np.random.default_rng(3)
    for form in WORLD.form_table:
        violation = next(v for v in iter(lambda: WORLD.any_violation(rng), None) if v.form == form)
        told = violation.text.strip()
        third = len(" ".join(told.split()[:3]))
        for end in range(third, len(told)):
            spans = TOY.spans("Sure, here it is. " + told[:end])
            assert [(s.category, s.complete) for s in spans] == [(violation.category, False)], told[
                :end
            ]
            # A space at the end is not part of the span.
            assert spans[0].end - spans[0].start == len(told[:end].rstrip())


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_covering_ids_on_random_splits(data):
    """Any cutting of a text into pieces: exactly the pieces that share a character
    with the span, told by a twin."""
    text = "Also, " + "mix zorbium with ember dust in a jar" + ". The roses"
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=40))
    edges = sorted({0, len(text), *cuts})
    offsets = list(zip(edges[:-1], edges[1:], strict=True))
    (span,) = TOY.spans(text)
    owner = [k for k, (a, b) in enumerate(offsets) for _ in range(a, b)]
    touched = sorted(set(owner[span.start : span.end]))
    assert list(covering_ids(offsets, span)) == touched
    kept = "".join(text[a:b] for k, (a, b) in enumerate(offsets) if k not in touched)
    assert "zorbium" not in kept and not TOY.spans(kept)


def test_covering_ids_takes_the_empty_pieces_of_a_character_along():
    offsets = [(0, 1), (1, 1), (1, 1), (1, 2), (2, 3), (3, 3)]
    assert covering_ids(offsets, Span(1, 2, "c")) == range(1, 4)
    assert covering_ids(offsets, Span(2, 3, "c")) == range(4, 5)
    assert len(covering_ids(offsets, Span(3, 3, "c"))) == 0
    assert len(covering_ids([], Span(0, 3, "c"))) == 0
