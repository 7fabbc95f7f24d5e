"""Surprise against the grammar: in the toy world both can be asked about the same seams."""

import collections
import math

import numpy as np
import pytest

from rlbf_jax.critics.judges.surprisal_seams import SeamConfig, torn_by_surprisal, window_bounds
from rlbf_jax.data.worlds import toy_words
from rlbf_jax.data.worlds.toy_grammar import torn_at
from rlbf_jax.data.worlds.toy_world import ToyWorld

WORLD, ORDER = ToyWorld(), 4


def words_of(text):
    return text.replace(".", " .").replace(",", " ,").split()


def text_of(words):
    return " ".join(words).replace(" .", ".").replace(" ,", ",")


class Grams:
    """The reference model: words by the three before them, every order mixed into the next."""

    def __init__(self, texts):
        self.counts = collections.Counter()
        for text in texts:
            words = ["<s>"] * (ORDER - 1) + [*words_of(text), "</s>"]
            for i in range(ORDER - 1, len(words)):
                for n in range(ORDER):
                    self.counts[tuple(words[i - n : i + 1])] += 1
        self.contexts = collections.Counter()
        for gram, count in self.counts.items():
            self.contexts[gram[:-1]] += count
        self.size = sum(len(gram) == 1 for gram in self.counts)

    def surprisal(self, words):
        line, found = ["<s>"] * (ORDER - 1) + [*words, "</s>"], []
        for i in range(ORDER - 1, len(line)):
            chance = 1 / self.size
            for n in range(ORDER):
                seen = self.contexts[tuple(line[i - n : i])]
                here = self.counts[tuple(line[i - n : i + 1])]
                chance = (here + chance) / (seen + 1)
            found.append(-math.log(chance))
        return np.asarray(found)


def cases(rng, count):
    """(words kept, words behind): a violation with its bridge taken back, or up to four words more
    or less."""
    made = []
    while len(made) < count:
        document = WORLD.document(rng)
        if document.violation is None:
            continue
        before, after = document.response.split(document.violation.text, 1)
        kept, behind = words_of(before), words_of(after[1:])
        full = kept + words_of(document.violation.text)
        bridges = [words_of(b) for b in toy_words.BRIDGES]
        right = len(kept) - next((len(b) for b in bridges if kept[-len(b) :] == b), 0)
        off = int(rng.integers(-4, 5)) if rng.random() < 0.6 else 0
        made.append((full[: max(0, right + off)], behind))
    return made


@pytest.fixture(scope="module")
def seams():
    """(untouched texts' surprisals, [(surprisal, index)], torn by the grammar) of 600 seams."""
    rng = np.random.default_rng(0)
    model = Grams([WORLD.document(rng).response for _ in range(8000)])
    held_out = [
        model.surprisal(words_of(WORLD.answer(rng, WORLD.prompt(rng, "development"))))
        for _ in range(200)
    ]
    drawn = cases(rng, 600)
    read = [(model.surprisal(kept + behind), len(kept)) for kept, behind in drawn]
    torn = [torn_at(text_of(kept + behind), len(text_of(kept))) for kept, behind in drawn]
    return held_out, read, np.asarray(torn)


@pytest.mark.parametrize(("window", "found", "false"), [(4, 0.75, 0.03), (8, 0.7, 0.04)])
def test_surprise_finds_most_of_what_the_grammar_calls_torn(seams, window, found, false):
    held_out, read, torn = seams
    bounds = window_bounds(held_out, SeamConfig(window))
    told = np.asarray([torn_by_surprisal(nats, index, bounds) for nats, index in read])
    assert 0.3 < torn.mean() < 0.9
    recall, wrongly = told[torn].mean(), told[~torn].mean()
    assert recall > found and wrongly < false, (recall, wrongly)
