"""The policy's own mistakes: which ids are one, first in first out; rollouts that begin there."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbf_jax.critics.base import Exchange
from rlbf_jax.critics.judging import Judged
from rlbf_jax.data.schema import Prompt
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.training.mistakes import (
    LEAST_ROOM,
    no_mistakes,
    own_violation,
    remember,
    replayed,
)
from rlbf_jax.training.rollouts import Rollout
from tests.critics.test_judging import TOKENIZER, ScriptedCritic, generation
from tests.fakes import LETTERS

RULE = TOKENIZER.controls.rule()


def judged_of(g, critic=None):
    (verdict,) = (critic or ScriptedCritic()).judge([Exchange("ask", g.text)])
    return Judged(0.0, None, verdict, ())


def own(*parts, forced=0, critic=None):
    g = dataclasses.replace(generation(*parts), num_forced=forced)
    ids = own_violation(g, judged_of(g, critic), RULE, TOKENIZER)
    return None if ids is None else ids.tolist()


def trace(*parts):
    return generation(*parts).trace.tolist()


@pytest.mark.parametrize(
    ("parts", "forced", "wanted"),
    [
        (("fine words",), 0, None),
        (("a bad word",), 0, ("a bad",)),
        (("a bad word. bad",), 0, ("a bad",)),
        # The first was forced, though its last id was not: "b" and "a" are somebody else's.
        (("bad word. bad",), 3, ("bad word. bad",)),
        (("bad word",), 3, None),
        (("bad word",), 2, ("bad",)),
        # Taken back: no mistake. Said anew behind the directive: one, and its history stays.
        (("so bad", 4, "fine"), 0, None),
        (("so bad", 4, " bad too"), 0, ("so bad", 4, " bad")),
        (("so bad", 4, " bad too"), 6, ("so bad", 4, " bad")),
        # Begun only.
        (("fine ba",), 0, None),
    ],
)
def test_a_mistake_ends_with_the_policys_own_violation_that_stands(parts, forced, wanted):
    assert own(*parts, forced=forced) == (None if wanted is None else trace(*wanted))


def test_what_could_not_be_judged_is_no_mistake():
    assert own("a bad word", critic=ScriptedCritic(refuses=("bad",))) is None


def rollout(number, step=0):
    request = Request(f"prompt {LETTERS[number]}", (), Knobs(max_tokens=30))
    return Rollout(request, Prompt(str(number), str(number)), (step, number))


def filled(words, kept=4, width=60):
    """Mistakes of one step after another, one a step."""
    mistakes = no_mistakes(kept, width)
    for step, word in enumerate(words):
        g = generation(word)
        mistakes, _ = remember(mistakes, [rollout(0, step)], [g], [judged_of(g)], RULE, TOKENIZER)
    return mistakes


@given(st.lists(st.sampled_from(["bad", "fine", "so bad", "a bad one"]), max_size=12))
@settings(max_examples=30, deadline=None)
def test_the_oldest_make_room(words):
    """Against a plain list."""
    mistakes = filled(words, kept=4)
    kept = [(step, word) for step, word in enumerate(words) if "bad" in word]
    assert int(mistakes.count) == len(kept)
    assert all(len(leaf) == 4 for leaf in mistakes[:3])
    for place, (step, word) in list(enumerate(kept))[-4:]:
        row = place % 4
        wanted = trace(word[: word.index("bad") + 3])
        assert mistakes.prefix[row, : mistakes.length[row]].tolist() == wanted
        assert not mistakes.prefix[row, mistakes.length[row] :].any()
        assert mistakes.origin[row].tolist() == [step, 0]


def test_a_prompts_rollouts_give_one_and_what_is_too_long_none():
    g = [generation("bad"), generation("so bad"), generation("fine bad")]
    rollouts = [rollout(0), rollout(0), rollout(1)]
    judged = [judged_of(x) for x in g]
    mistakes, found = remember(no_mistakes(5, 5), rollouts, g, judged, RULE, TOKENIZER)
    assert found == int(mistakes.count) == 1
    assert mistakes.prefix[0, :3].tolist() == trace("bad")


def source(step):
    return [rollout(n, step) for n in range(4)]


def ask(mistakes, share, seed=0, drawn=12):
    rng = np.random.default_rng(seed)
    prompts = source(9)
    return replayed(mistakes, prompts, source, share, rng, drawn, TOKENIZER.encode_prompt)


def test_prompts_give_way_to_mistakes_in_their_share():
    mistakes = filled(["bad", "so bad"])
    assert ask(mistakes, 0.0) == source(9) == ask(no_mistakes(4, 60), 1.0)
    every = ask(mistakes, 1.0)
    assert {r.origin for r in every} <= {(0, 0), (1, 0)}
    for r in every:
        wanted = trace("bad") if r.origin == (0, 0) else trace("so bad")
        assert list(r.request.forced) == wanted and r.request.prompt == "prompt a"
        assert r.request.knobs.max_tokens == len(wanted) + 12
    some = [sum(r.origin[0] < 9 for r in ask(mistakes, 0.5, seed)) for seed in range(50)]
    assert 1.5 < np.mean(some) < 2.5
    assert ask(mistakes, 0.5, 3) == ask(mistakes, 0.5, 3)


def test_a_mistake_that_leaves_too_little_room_is_left_out():
    prompt = len(TOKENIZER.encode_prompt("prompt a"))
    for width, replays in ((prompt + 3 + LEAST_ROOM, True), (prompt + 2 + LEAST_ROOM, False)):
        some = ask(filled(["bad"], width=width), 1.0, drawn=None)
        assert (some != source(9)) is replays
        if replays:
            assert some[0].request.knobs.max_tokens == 3 + LEAST_ROOM


def test_memory_has_one_structure():
    mistakes = filled(["bad", "fine", "bad"])
    one, other = jax.eval_shape(lambda *two: two, mistakes, no_mistakes(4, 60))
    assert one == other
