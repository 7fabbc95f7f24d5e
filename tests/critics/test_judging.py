"""The reward table row by row, and how verdicts are read into its terms."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from rlbf_jax.critics.base import Span, Verdict
from rlbf_jax.critics.judging import judge_generations, sentence_start
from rlbf_jax.directives import render
from rlbf_jax.objectives.trajectory_reward import Outcome, RewardConfig, trajectory_reward
from rlbf_jax.sampling.request import Generation, Request
from tests.fakes import LetterTokenizer

# Values unlike each other and unlike the defaults, so that no row can pass by another row's value.
VALUES = RewardConfig(violation=-3.0, clean=2.0, unneeded=-0.7, recovered=1.3, failed=-0.4)


def outcome(
    has_directive=True, retracted_bad=True, final_safe=True, coherent=True, useful=True, **counts
) -> Outcome:
    return Outcome(has_directive, retracted_bad, final_safe, coherent, useful, **counts)


# The table --------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers_values():
    c = RewardConfig()
    assert (c.violation, c.clean, c.unneeded, c.recovered, c.failed) == (-1.0, 1.0, -0.5, 1.0, -0.2)


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=5)))
def test_every_row_of_the_table(flags):
    has_directive, retracted_bad, final_safe, coherent, useful = flags
    if not has_directive:
        wanted = 2.0 if final_safe else -3.0
    elif not retracted_bad:
        wanted = -0.7
    else:
        wanted = 1.3 if final_safe and coherent and useful else -0.4
    assert trajectory_reward(Outcome(*flags), VALUES) == wanted


@pytest.mark.parametrize(
    ("coherent", "useful", "wanted"), [(True, True, 2.0), (False, True, -0.1), (True, False, -0.1)]
)
def test_poor_clean_text_has_a_value_of_its_own_if_asked_for(coherent, useful, wanted):
    config = dataclasses.replace(VALUES, poor=-0.1)
    plain = dict(has_directive=False, retracted_bad=False, coherent=coherent, useful=useful)
    assert trajectory_reward(outcome(**plain), config) == wanted
    assert trajectory_reward(outcome(**plain), VALUES) == 2.0
    assert trajectory_reward(outcome(**plain, final_safe=False), config) == -3.0


def test_prices_are_taken_off_per_retracted_and_per_extra_id():
    config = dataclasses.replace(
        VALUES, price_per_retracted=0.01, price_per_extra=0.1, most_extra=3
    )
    assert trajectory_reward(outcome(retracted=10, extra=2), config) == pytest.approx(
        1.3 - 0.2 - 0.1
    )
    assert trajectory_reward(outcome(retracted=10, extra=9), config) == pytest.approx(
        1.3 - 0.3 - 0.1
    )
    # Overlap shaping speaks of good recoveries only;
    # the price of retracted ids of every response that has them.
    assert trajectory_reward(
        outcome(final_safe=False, retracted=10, extra=9), config
    ) == pytest.approx(-0.4 - 0.1)
    assert trajectory_reward(outcome(retracted_bad=False, retracted=10), config) == pytest.approx(
        -0.7 - 0.1
    )
    assert trajectory_reward(outcome(has_directive=False, retracted_bad=False), config) == 2.0


# From verdicts ----------------------------------------------------------------------------------


class OffsetTokenizer(LetterTokenizer):
    def offsets(self, ids):
        return list(
            itertools.pairwise(
                itertools.accumulate((len(self.decode([i])) for i in ids), initial=0)
            )
        )


TOKENIZER = OffsetTokenizer(x_max=40)


class ScriptedCritic:
    """Finds the word `bad` (and `ba` at the end as begun), says what it is told of the rest."""

    name = "scripted"

    def __init__(self, coherent=True, useful=True, refuses=()):
        self.coherent, self.useful, self.refuses, self.calls = coherent, useful, refuses, []

    def judge(self, exchanges):
        self.calls.append(list(exchanges))
        return [self._judge(e.text) for e in exchanges]

    def _judge(self, text):
        if any(word in text for word in self.refuses):
            return Verdict(judged=False, reason="timed out")
        found = [Span(i, i + 3, "one") for i in range(len(text)) if text.startswith("bad", i)]
        if text.endswith("ba"):
            found.append(Span(len(text) - 2, len(text), "one", complete=False))
        return Verdict(tuple(found), self.coherent, self.useful)


def generation(*parts: str | int, prompt="ask") -> Generation:
    """A response of words and retractions
    (an int X: category and backtrack); -1 is a lone category."""
    rule, trace = TOKENIZER.controls.rule(), []
    for part in parts:
        if isinstance(part, str):
            trace += TOKENIZER.encode(part)
        else:
            trace += [rule.category_id("one"), *([rule.backtrack_id(part)] if part > 0 else [])]
    rendered = render(rule, trace)
    return Generation(
        text=TOKENIZER.decode(rendered.visible),
        trace=np.asarray(trace, np.int32),
        edits=rendered.edits,
        logprobs=np.zeros(len(trace), np.float32),
        visible=rendered.visible,
        prompt_ids=np.asarray(TOKENIZER.encode_prompt(prompt), np.int32),
        num_forced=0,
        finished=False,
        malformed=rendered.malformed,
        request=Request(prompt),
    )


def judged(*parts, critic=None, config=VALUES):
    return judge_generations(
        critic or ScriptedCritic(), [generation(*parts)], ["topic"], TOKENIZER, config
    )[0]


@pytest.mark.parametrize(
    ("parts", "reward"),
    [
        (("good words",), 2.0),
        (("a bad word",), -3.0),
        (("fine. bad", 3, "good"), 1.3),
        (
            ("fine. bad", 1, "good"),
            1.3,
        ),  # the erased id was part of the violation, and what is left is none
        (("fine. bad", 3, "bad"), -0.4),
        (("fine. good", 4, "good"), -0.7),
        (("fine. ba", 2, "good"), 1.3),
        (("bad x", 1, "y"), -0.7),
        (("bad x", 2, "y"), -0.7),
        (("bad", 3, "ok bad", 3, "fine"), 1.3),
        (("bad", 3, "ok good", 4, "fine"), -0.7),
        (("good", 4, "bad", 3, "bad"), -0.7),
        (("fine", -1, "fine"), -0.7),
        (("bad", 40, "fine"), 1.3),
        ((3, "fine"), -0.7),
    ],
)
def test_rewards_of_whole_responses(parts, reward):
    assert judged(*parts).reward == reward


def test_a_begun_violation_left_behind_counts_only_if_asked_to():
    assert judged("fine ba").reward == 2.0
    strict = dataclasses.replace(VALUES, residue_is_unsafe=True)
    assert judged("fine ba", config=strict).reward == -3.0
    assert judged("fine. bad", 1, config=strict).reward == -0.4


@pytest.mark.parametrize(
    ("coherent", "useful", "reward"), [(False, True, -0.4), (True, False, -0.4), (None, None, 1.3)]
)
def test_a_recovery_must_be_coherent_and_useful_unless_the_critic_does_not_say(
    coherent, useful, reward
):
    assert judged("bad", 3, "good", critic=ScriptedCritic(coherent, useful)).reward == reward


@pytest.mark.parametrize(
    ("parts", "wrong", "harmless", "wanted"),
    [
        (("bad", 3, "good"), 0, False, 1.3),
        (("good", 4, "good"), 0, True, -0.7 - 0.25),
        (("fine. good", 4, "bad"), 0, False, -0.7),
        (("good words",), 0, True, 2.0 - 0.0),
        (("bad words",), 0, False, -3.0),
    ],
)
def test_false_backtracks_on_what_never_held_a_violation_cost_more(parts, wrong, harmless, wanted):
    config = dataclasses.replace(VALUES, price_on_harmless=0.25, price_wrong_category=0.5)
    got = judged(*parts, config=config)
    assert (got.outcome.wrong_categories, got.outcome.harmless) == (wrong, harmless)
    assert got.reward == pytest.approx(wanted)


class Two(ScriptedCritic):
    """What it finds is of category `two`, or of none that it names."""

    def __init__(self, category):
        super().__init__()
        self.category = category

    def _judge(self, text):
        found = super()._judge(text)
        spans = tuple(dataclasses.replace(s, category=self.category) for s in found.spans)
        return dataclasses.replace(found, spans=spans)


def test_a_directive_of_another_category_costs_its_price():
    config = dataclasses.replace(VALUES, price_wrong_category=0.5)
    parts = ("bad", 3, "ok bad", 3, "fine")
    assert judged(*parts, config=config).reward == 1.3
    got = judged(*parts, config=config, critic=Two("two"))
    assert got.outcome.wrong_categories == 2 and got.reward == pytest.approx(1.3 - 1.0)
    assert judged(*parts, critic=Two("two")).reward == 1.3
    assert judged(*parts, config=config, critic=Two("")).reward == 1.3  # it names none


def test_extra_ids_are_those_erased_before_the_violating_sentence():
    got = judged("one. two. so bad", 11, "good").outcome
    # Erased were " two. so bad": " so bad" is the violating sentence,
    # a bridge in it included, " two." is extra.
    assert (got.retracted, got.extra) == (11, 4)
    assert judged("one. two. so bad", 7, "good").outcome.extra == 0


def test_the_critic_is_asked_once_about_every_final_text_and_every_text_before_a_directive():
    critic = ScriptedCritic()
    generations = [
        generation("bad", 3, "so ba", 2, "good", prompt="first"),
        generation("fine", prompt="second"),
    ]
    got = judge_generations(critic, generations, ["t", "u"], TOKENIZER, VALUES)
    (call,) = critic.calls
    assert [(e.prompt, e.text, e.topic) for e in call] == [
        ("first", "so good", "t"),
        ("first", "bad", "t"),
        ("first", "so ba", "t"),
        ("second", "fine", "u"),
    ]
    assert [len(j.at_directives) for j in got] == [2, 0]
    assert [j.reward for j in got] == [1.3, 2.0]


@pytest.mark.parametrize("parts", [("zzz",), ("zzz bad", 7, "good"), ("bad", 3, "zzz")])
def test_what_could_not_be_judged_has_no_reward_and_no_outcome(parts):
    got = judged(*parts, critic=ScriptedCritic(refuses=["zzz"]))
    assert math.isnan(got.reward) and got.outcome is None
    assert any(not v.judged and v.reason == "timed out" for v in [got.final, *got.at_directives])


def test_a_sentence_starts_after_the_last_mark_before_its_span():
    text = "one. two! so bad"
    assert text[sentence_start(text, Span(13, 16, "one")) :] == " so bad"
    assert sentence_start("so bad", Span(3, 6, "one")) == 0


def test_a_violation_written_again_costs_its_price_and_only_then():
    config = dataclasses.replace(VALUES, price_regenerated=0.3)
    again = judged("fine. bad", 3, "bad", config=config)
    assert again.outcome.regenerated and again.reward == pytest.approx(-0.4 - 0.3)
    twice = judged("fine. bad", 3, "bad", 3, "good", config=config)
    assert twice.outcome.regenerated and twice.reward == pytest.approx(1.3 - 0.3)
    once = judged("fine. bad", 3, "good", config=config)
    assert not once.outcome.regenerated and once.reward == 1.3
