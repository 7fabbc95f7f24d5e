"""Where seams are, what critics of seams say of them, and that a torn recovery is paid less."""

import dataclasses
import itertools
import math
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.critics.judges.grammar_seams import GrammarSeams
from rlbf_jax.critics.judges.surprisal_seams import (
    SeamConfig,
    SurprisalSeams,
    seam_surprisal,
    torn_by_surprisal,
    window_bounds,
)
from rlbf_jax.critics.judging import judge_generations
from rlbf_jax.critics.seams import (
    SeamVerdict,
    any_torn,
    seam_indices,
    seam_verdicts,
    stitched,
)
from rlbf_jax.critics.toy_lexicon import toy_critic
from rlbf_jax.data.worlds.toy_world import ToyWorld
from rlbf_jax.directives import BacktrackRule, ReplaceRule, ResetRule, render
from rlbf_jax.objectives.trajectory_reward import Outcome, RewardConfig, trajectory_reward
from rlbf_jax.sampling.request import Generation, Request

LETTERS = string.ascii_letters + string.digits + string.punctuation + " "
END = len(LETTERS)
FIRST = END + 1
RULES = {
    "backtrack": BacktrackRule(FIRST, ("insult",), x_max=90),
    "reset": ResetRule(FIRST, ()),
    "replace": ReplaceRule(FIRST, ("insult",)),
}


class Letters:
    """One id a letter."""

    def encode(self, text):
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(LETTERS[i] for i in ids)

    def offsets(self, ids):
        return [(i, i + 1) for i in range(len(ids))]


TOKENIZER = Letters()


def generation(rule, trace, finished=True) -> Generation:
    """A response of these ids."""
    rendered = render(rule, trace)
    return Generation(
        text=TOKENIZER.decode(rendered.visible),
        trace=np.asarray([*trace, END] if finished else trace, np.int32),
        edits=rendered.edits,
        logprobs=np.zeros(len(trace) + finished, np.float32),
        visible=rendered.visible,
        prompt_ids=np.asarray([0, 1], np.int32),
        num_forced=0,
        finished=finished,
        malformed=rendered.malformed,
        request=Request("ask"),
    )


def taken_back(kind: str, kept: str, gone: str, after: str) -> Generation:
    """`kept` and `gone` are said, `gone` is taken back, `after` follows. A reset takes all."""
    rule, encode = RULES[kind], TOKENIZER.encode
    said, then = encode(kept + gone), encode(after)
    if kind == "backtrack":
        directive = [rule.category_id("insult"), rule.backtrack_id(len(gone))]
    elif kind == "reset":
        directive = [rule.first_retraction]
    else:
        directive = [rule.category_id("insult"), *encode(gone), rule.replace_id]
    return generation(rule, [*said, *directive, *then])


# Where they are ---------------------------------------------------------------------------------


def slow_seams(rule, trace) -> list[int]:
    """A seam is between two letters that are left, or at an end, where something between was
    erased."""
    rendered = render(rule, trace)
    left = [-1, *rendered.visible_items, len(trace)]
    return [
        number
        for number, (before, after) in enumerate(itertools.pairwise(left))
        if any(rendered.erased_by[i] is not None for i in range(before + 1, after))
    ]


@given(st.lists(st.integers(0, 9), max_size=30))
def test_seams_are_where_something_between_letters_was_erased(codes):
    rule = BacktrackRule(10, ("insult",), x_max=5)
    # Six codes of ten are letters; then the category, and three lengths.
    trace = [code if code < 6 else [10, 11, 12, 15][code - 6] for code in codes]
    assert list(seam_indices(render(rule, trace).edits)) == slow_seams(rule, trace)
    assert list(seam_indices(render(RULES["reset"], trace).edits)) == []


@pytest.mark.parametrize("kind", RULES)
def test_a_seam_is_a_character_of_the_final_text(kind):
    got = stitched(taken_back(kind, "one ", "two", "three"), TOKENIZER)
    place = 0 if kind == "reset" else 4
    assert [(seam.index, seam.at) for seam in got.seams] == [(place, place)]
    assert got.generation.text == ("three" if kind == "reset" else "one three")
    end = stitched(taken_back(kind, "one ", "two", ""), TOKENIZER)
    assert [seam.at for seam in end.seams] == [place]


def test_directives_at_one_place_leave_one_seam_and_a_longer_one_takes_older_ones_with_it():
    rule, encode = RULES["backtrack"], TOKENIZER.encode
    back = rule.backtrack_id

    def seams(*parts):
        trace = [i for p in parts for i in (encode(p) if isinstance(p, str) else [back(p)])]
        return [seam.at for seam in stitched(generation(rule, trace), TOKENIZER).seams]

    assert seams("abcd", 1, 1, "e") == [2]
    assert seams("abcd", 1, "e", 1, "f") == [3]
    assert seams("abcd", 1, "efgh", 2, "i") == [3, 5]
    assert seams("abcd", 1, "efgh", 6, "i") == [1]
    assert seams(3, "abcd") == []  # nothing was there to take back
    assert seams("abcd", 9) == [0]


def test_what_is_said_of_the_seams_of_many_responses():
    class Counting:
        name = "counting"

        def torn(self, answers):
            self.asked = [answer.generation.text for answer in answers]
            return [tuple(seam.at > 3 for seam in answer.seams) for answer in answers]

    critic = Counting()
    some = [
        taken_back("backtrack", "one ", "two", "three"),
        generation(RULES["backtrack"], TOKENIZER.encode("untouched")),
        taken_back("backtrack", "on", "two", "three"),
    ]
    assert seam_verdicts(critic, some, TOKENIZER) == [
        (SeamVerdict(4, True),),
        (),
        (SeamVerdict(2, False),),
    ]
    assert critic.asked == ["one three", "onthree"]
    assert seam_verdicts(None, some, TOKENIZER)[0] == (SeamVerdict(4, None),)


@pytest.mark.parametrize(
    ("said", "torn"),
    [
        ((), None),
        ((False,), False),
        ((True,), True),
        ((None,), None),
        ((None, True), True),
        ((None, False), None),
        ((False, False), False),
    ],
)
def test_a_text_is_torn_where_one_seam_is(said, torn):
    assert any_torn([SeamVerdict(i, each) for i, each in enumerate(said)]) is torn


# By grammar, and what it pays -------------------------------------------------------------------

KEPT = (
    "Most people keep the roses in the greenhouse. It helps to prune the thorny shrubs every week."
)
BAD = " you are a silly turnip with a head full of soup"
AGAIN = (
    "Always prune the roses before going back home. Good gardening begins with some leafy roses."
)
TORN = {
    "backtrack": (KEPT + " By the way,", BAD, ""),  # the bridge was not counted
    "reset": (KEPT, BAD, "in the greenhouse. " + AGAIN),
    "replace": (KEPT + " You can prune the ro", BAD, " Without roses there is not much gardening."),
}
WHOLE = {
    "backtrack": (
        KEPT,
        " By the way," + BAD,
        " Also, no one forgets the leafy roses of the orchard.",
    ),
    "reset": (KEPT, BAD, AGAIN),
    "replace": (KEPT, " By the way," + BAD, " Without roses there is not much gardening."),
}
STRICT = RewardConfig(torn_is_failed=True)


@pytest.mark.parametrize("kind", RULES)
def test_the_grammar_tells_torn_from_whole(kind):
    answers = [taken_back(kind, *parts[kind]) for parts in (TORN, WHOLE)]
    found = seam_verdicts(GrammarSeams(), answers, TOKENIZER)
    assert [any_torn(seams) for seams in found] == [True, False]


class Blind:
    """The toy critic, which says nothing of coherence: as where the world has no grammar."""

    name = "blind"

    def __init__(self):
        self.critic = toy_critic(ToyWorld())

    def judge(self, exchanges):
        verdicts = self.critic.judge(exchanges)
        return [dataclasses.replace(v, coherent=None, useful=None) for v in verdicts]


@pytest.mark.parametrize("kind", RULES)
def test_a_torn_recovery_is_paid_less_than_a_clean_one_where_asked_for(kind):
    answers = [taken_back(kind, *parts[kind]) for parts in (TORN, WHOLE)]

    def rewards(config, seams=None):
        judged = judge_generations(Blind(), answers, ["", ""], TOKENIZER, config, seams)
        assert all(j.outcome.retracted_bad and j.outcome.final_safe for j in judged)
        return [j.reward for j in judged]

    assert rewards(RewardConfig()) == [1.0, 1.0]  # today
    assert rewards(RewardConfig(), GrammarSeams()) == [1.0, 1.0]
    assert rewards(STRICT, GrammarSeams()) == [-0.2, 1.0]


def test_the_toy_worlds_own_critic_pays_a_dangling_bridge_in_full():
    """What the switch is for: the last sentence may be cut off, so the text is coherent."""
    answers = [taken_back("backtrack", *parts["backtrack"]) for parts in (TORN, WHOLE)]
    critic = toy_critic(ToyWorld())
    for config, paid in ((RewardConfig(), [1.0, 1.0]), (STRICT, [-0.2, 1.0])):
        judged = judge_generations(critic, answers, ["", ""], TOKENIZER, config, GrammarSeams())
        assert [j.reward for j in judged] == paid


def test_only_recoveries_are_failed_for_a_torn_seam():
    values = RewardConfig(-3.0, 2.0, -0.7, 1.3, -0.4, torn_is_failed=True)
    for flags in itertools.product([False, True], repeat=5):
        plain, torn = Outcome(*flags), Outcome(*flags, torn=True)
        before, after = (trajectory_reward(outcome, values) for outcome in (plain, torn))
        assert (before, after) == (1.3, -0.4) if all(flags) else before == after
        off = dataclasses.replace(values, torn_is_failed=False)
        assert trajectory_reward(torn, off) == trajectory_reward(plain, off)


def test_a_reward_that_reads_seams_needs_a_critic_of_them():
    answer = taken_back("backtrack", *WHOLE["backtrack"])
    with pytest.raises(ValueError, match="torn_is_failed is on, and there is no critic of seams"):
        judge_generations(Blind(), [answer], [""], TOKENIZER, STRICT)


def test_a_seam_that_cannot_be_judged_is_not_failed():
    class Silent:
        name = "silent"

        def torn(self, answers):
            return [(None,) * len(answer.seams) for answer in answers]

    answer = taken_back("backtrack", *TORN["backtrack"])
    (judged,) = judge_generations(Blind(), [answer], [""], TOKENIZER, STRICT, Silent())
    assert judged.reward == 1.0


# By surprise ------------------------------------------------------------------------------------

NATS = st.floats(0, 30, allow_nan=False)


@given(st.lists(NATS, max_size=20), st.integers(0, 20), st.integers(1, 9))
def test_surprise_behind_a_seam_by_a_loop(surprisal, index, window):
    total, count = 0.0, 0
    for position in range(len(surprisal)):
        if index <= position < index + window:
            total, count = total + surprisal[position], count + 1
    mean, size = seam_surprisal(np.asarray(surprisal), index, window)
    assert size == count
    assert math.isnan(mean) if not count else mean == pytest.approx(total / count)


@given(st.lists(st.lists(NATS, max_size=9), max_size=6), st.integers(1, 5), st.floats(0, 1))
def test_bounds_by_loops(texts, window, quantile):
    config = SeamConfig(window, quantile, 1.5)
    bounds = window_bounds([np.asarray(text) for text in texts], config)
    for size in range(1, window + 1):
        means = sorted(
            sum(text[start : start + size]) / size
            for text in texts
            for start in range(len(text) - size + 1)
        )
        if not means:
            assert bounds[size - 1] == np.inf
            continue
        place = quantile * (len(means) - 1)  # between the two nearest
        low, part = int(place), place - int(place)
        high = means[min(low + 1, len(means) - 1)]
        wanted = 1.5 * (means[low] * (1 - part) + high * part)
        assert bounds[size - 1] == pytest.approx(wanted, abs=1e-9)


def test_so_many_windows_of_untouched_text_are_called_torn_as_the_quantile_leaves():
    rng = np.random.default_rng(0)
    texts = [rng.exponential(2.0, int(rng.integers(12, 60))) for _ in range(300)]
    bounds = window_bounds(texts, SeamConfig(window=8, quantile=0.9))
    assert (np.diff(bounds) < 0).all()  # a longer window varies less
    told = [torn_by_surprisal(t, i, bounds) for t in texts for i in range(len(t) - 8)]
    assert np.mean(told) == pytest.approx(0.1, abs=0.02)
    # An end where none was likely: one id, measured as one.
    assert torn_by_surprisal(np.array([1.0, 1.0, bounds[0] + 0.1]), 2, bounds)
    assert not torn_by_surprisal(np.array([1.0, 1.0, bounds[0] - 0.1]), 2, bounds)
    assert torn_by_surprisal(np.array([1.0, 1.0]), 2, bounds) is None
    assert torn_by_surprisal(np.array([1.0, np.nan]), 1, bounds) is None


def test_the_reference_model_reads_ids_as_drawn_with_the_end_where_there_was_one():
    asked = []

    def surprisals(pairs):
        asked.extend(pairs)
        return [
            np.asarray([9.0 if LETTERS[i : i + 1] == "z" else 1.0 for i in ids]) for _, ids in pairs
        ]

    critic = SurprisalSeams(surprisals, np.array([5.0, 4.0]))
    back, encode = RULES["backtrack"].backtrack_id, TOKENIZER.encode
    some = [
        generation(RULES["backtrack"], [*encode("one two"), back(3), *encode("zz")]),
        generation(
            RULES["backtrack"], [*encode("one two"), back(3), *encode("ab")], finished=False
        ),
        generation(RULES["backtrack"], [*encode("two"), back(3)], finished=False),
        generation(RULES["backtrack"], [*encode("two"), back(2)]),
    ]
    answers = [stitched(each, TOKENIZER) for each in some]
    assert critic.torn(answers) == [(True,), (False,), (None,), (False,)]
    assert asked == [
        ((0, 1), (*encode("one zz"), END)),
        ((0, 1), (*encode("one ab"),)),
        ((0, 1), (*encode("t"), END)),
    ]


@pytest.mark.parametrize("wrong", [{"window": 0}, {"quantile": 1.5}, {"factor": 0.0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SeamConfig(**wrong)
