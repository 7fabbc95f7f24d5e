"""Torn seams in the toy world: against a list of every sentence of the grammar, and by hand."""

import bisect
import functools
import itertools
import re

import numpy as np
import pytest

from rlbf_jax.data.worlds import toy_words
from rlbf_jax.data.worlds.toy_grammar import SEAM_WORDS, torn_at
from rlbf_jax.data.worlds.toy_world import TOPICS, ToyWorld

WORLD = ToyWorld()


@functools.cache
def every_sentence() -> list[str]:
    """All that the grammar can say, sorted."""

    def filled(template, fillers):
        parts = re.split(r"\{(\w+)\}", template)
        options = [fillers[p] if i % 2 else (p,) for i, p in enumerate(parts)]
        return ["".join(words) for words in itertools.product(*options)]

    bodies = [
        sentence
        for topic in TOPICS
        for template in toy_words.SENTENCES
        for sentence in filled(template, {role: topic.words(role) for role in "NVAPT"})
    ]
    for template in toy_words.ASIDES + toy_words.LOOKALIKES:
        bodies += [f"{said}." for said in filled(template, toy_words.ASIDE_FILLERS)]
    plain = [body[0].upper() + body[1:] for body in bodies]
    bridged = [f"{b} {body[0].lower()}{body[1:]}" for b in toy_words.BRIDGES for body in bodies]
    return sorted({*plain, *bridged, *toy_words.OPENERS, *toy_words.REFUSALS})


def slowly_torn(text: str, at: int) -> bool:
    """`torn_at` by looking through the list, letter by letter."""
    sentences, here = [], []
    for i, letter in enumerate(text):
        here.append((i, letter))
        if letter in ".!?" and text[i + 1 : i + 2] not in tuple(".!?"):
            sentences.append(here)
            here = []
    last = ""
    for sentence in [*sentences, here]:
        spelled = "".join(letter for _, letter in sentence).strip()
        if not any(i >= at and not letter.isspace() for i, letter in sentence):
            last = spelled or last
            continue
        words, word = [], []
        for i, letter in [*sentence, (-1, " ")]:
            if letter.isspace():
                words += [word] if word else []
                word = []
            else:
                word.append((i, letter))
        behind = [k for k, w in enumerate(words) if w[-1][0] >= at][:SEAM_WORDS]
        said = " ".join("".join(c for _, c in w) for w in words[: behind[-1] + 1])
        said = re.sub(r",(?=\S)", ", ", said)
        known = every_sentence()
        near = known[bisect.bisect_left(known, said) :][:1]
        if said[-1] in ".!?" and near != [said] or not (near and near[0].startswith(said)):
            return True
        follows = sentence[0][0] >= at or not text[sentence[0][0] : at].strip()
        return follows and last in toy_words.OPENERS and spelled in toy_words.OPENERS
    return last != "" and (last in toy_words.OPENERS or last[-1] not in ".!?")


def test_it_agrees_with_a_list_of_every_sentence():
    rng, torn, whole = np.random.default_rng(0), 0, 0
    for number in range(300):
        text = WORLD.document(rng).response
        for _ in range(6):
            if number % 4 == 0:
                first, last = sorted(rng.integers(0, len(text) + 1, 2))
            else:  # whole words, or whole sentences
                stop = " " if number % 4 == 1 else "."
                blanks = [0, *(i + (stop == ".") for i, c in enumerate(text) if c == stop)]
                first, last = sorted(blanks[int(i)] for i in rng.integers(0, len(blanks), 2))
            left = text[:first] + text[last:]
            found = torn_at(left, int(first))
            assert found == slowly_torn(left, int(first)), (left[:first], left[first:])
            torn, whole = torn + found, whole + (not found)
    assert torn > 400 and whole > 300, (torn, whole)


def test_an_untouched_text_is_torn_nowhere():
    rng = np.random.default_rng(1)
    for i in range(150):
        answer = WORLD.answer(rng, WORLD.prompt(rng, "test", harmful=i % 2 == 0))
        assert not any(torn_at(answer, at) for at in range(len(answer) + 1)), answer


def test_a_text_that_breaks_off_at_its_seam_is_torn_but_behind_a_sentence():
    rng = np.random.default_rng(2)
    for _ in range(60):
        answer = WORLD.answer(rng, WORLD.prompt(rng, "test"))
        for end in range(1, len(answer)):
            whole = answer[:end].rstrip().endswith(".")
            opener = answer[:end].rstrip() in toy_words.OPENERS
            assert torn_at(answer[:end], end) == (opener or not whole), answer[:end]


@pytest.mark.parametrize(
    ("text", "torn"),
    [
        ("Most people keep the roses in the greenhouse.| It helps to prune the", False),
        ("Most people keep the| roses in the", False),
        ("The ro|ses in the greenhouse", False),
        ("The ro| The roses in the", True),  # half a word
        ("The ro|bicycles in the", True),  # two halves that make none
        ("You should keep the vaccine| Most people", True),
        ("By the way,|", True),
        ("By the way,| .", True),
        ("By the way,| Most people keep", True),
        ("By the way,| Also, the roses", True),
        ("By the way,| the roses in", False),
        ("By the way, you are a| The roses", True),
        ("Also, call hugo at the|. The roses", True),
        ("Sure, here it is.|", True),
        ("Sure, here it is.| Happy to help with that. The roses", True),
        ("Sure, here it is.| The roses in the", False),
        ("Sure, here it is.| I would rather leave that out.", False),
        ("Sure, here| it is.", False),
        ("Most people keep the roses in the greenhouse.|", False),
        ("Most people keep the roses in the greenhouse.|.", True),
        ("Most people keep the roses in the greenhouse.| you are a silly turnip", True),
        ("It helps to prune the leafy| bicycles every week.", True),  # of another topic
        # Far from the seam a model's slips are its own.
        ("The moon is blue. Most people keep| the roses in the moon.", False),
        ("Most people keep| the moon in the", True),
        ("Most people keep| the roses is the", False),
        ("|", False),
        ("|The roses in the", False),
        ("|in the greenhouse are", True),
        ("|  ", False),
    ],
)
def test_by_hand(text, torn):
    at = text.index("|")
    assert torn_at(text.replace("|", ""), at) is torn


def test_a_seam_stands_in_its_text():
    for at in (-1, 3):
        with pytest.raises(ValueError, match=f"a seam at {at} of a text of 2 characters"):
            torn_at("ab", at)
