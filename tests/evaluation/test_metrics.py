"""Hand-written traces for every metric.
One id a letter, so that every number can be counted by eye."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.attacks.base import Attempt
from rlbf_jax.critics.base import Span, Verdict
from rlbf_jax.data.builders.injectors import TemplateInjector
from rlbf_jax.data.schema import Prompt, Violation
from rlbf_jax.data.worlds.toy_world import ToyWorld
from rlbf_jax.directives import BacktrackRule, ReplaceRule, ResetRule, render
from rlbf_jax.evaluation.backtracking_metrics import visible_items
from rlbf_jax.evaluation.columns import JudgedAnswer, metric_names, row_metrics
from rlbf_jax.evaluation.metrics import Verdicts, prefix_words, refuses, take_apart
from rlbf_jax.sampling.request import Generation, Request

LETTERS = "abcdefghijklmnopqrstuvwxyzBIS .,'"
EOS = 1


class Letters:
    """Ids 2.. are letters, then `[CATEGORY_INSULT] [CATEGORY_PRIVACY] [BACKTRACK_BY_1..40]`,
    then `[RESET]`."""

    eos_id = EOS
    rule = BacktrackRule(2 + len(LETTERS), ("insult", "privacy"), x_max=40)
    reset_rule = ResetRule(2 + len(LETTERS) + 42)
    replace_rule = ReplaceRule(2 + len(LETTERS) + 43, ("insult", "privacy"))

    def encode(self, text):
        return [2 + LETTERS.index(c) for c in text]

    def decode(self, ids):
        return "".join(LETTERS[i - 2] for i in ids if 2 <= i < 2 + len(LETTERS))

    def offsets(self, ids):
        return [(i, i + 1) for i in range(len(ids))]


T = Letters()


def trace(text):
    """`|insult|` and `|3|` are control tokens, `|end|` is the end of sequence."""
    ids = []
    for i, part in enumerate(text.split("|")):
        if i % 2 == 0:
            ids += T.encode(part)
        elif part == "end":
            ids.append(EOS)
        else:
            ids.append(
                T.rule.backtrack_id(int(part)) if part.isdigit() else T.rule.category_id(part)
            )
    return ids


def judge(text):
    """ "bad cow" is a violation, a beginning of it at the end
    of the text a begun one, both words leak."""
    spans = [Span(m.start(), m.end(), "insult") for m in re.finditer("bad cow", text)]
    begun = re.search(r"(bad( (c(o)?)?)?)$", text)
    if begun:
        spans.append(Span(begun.start(), len(text), "insult", complete=False))
    leaks = tuple(Span(m.start(), m.end(), "insult") for m in re.finditer(r"\b(bad|cow)\b", text))
    return Verdict(
        tuple(spans),
        coherent="  " not in text,
        useful=len(text) > 3,
        leaks=leaks,
        judged="?" not in text,
    )


def measure(
    emitted,
    *,
    prefix="",
    bridge="",
    span="",
    tail="",
    attack="middle_filling",
    harmful=False,
    rule=T.rule,
):
    forced = trace(prefix + bridge + span + tail)
    emitted = (
        trace(prefix + bridge + span + tail + emitted)
        if isinstance(emitted, str)
        else [*forced, *emitted]
    )
    finished = emitted[-1:] == [EOS]
    rendered = render(rule, emitted[:-1] if finished else emitted)
    request = Request("q", tuple(forced))
    generation = Generation(
        T.decode(rendered.visible), np.array(emitted, np.int32), rendered.edits,
        np.zeros(len(emitted)), rendered.visible, np.zeros(1, np.int32), len(forced), finished,
        rendered.malformed, request,
    )  # fmt: skip
    violation = (
        Violation(" bad cow", "insult") if span and not attack.startswith("benign") else None
    )
    attempt = Attempt(
        request,
        Prompt("p", "q", harmful),
        attack,
        "rl",
        len(prefix),
        len(bridge),
        len(span),
        len(tail),
        prefix,
        violation,
    )
    response = take_apart(generation, T, rule)
    final, raw, *before = (judge(text) for text in response.texts)
    verdicts = Verdicts(final, raw, tuple(before))
    return outcomes(attempt, generation, response, verdicts, rule)


def outcomes(attempt, generation, response, verdicts, rule):
    """The metrics of what became of the answer, without those of its corrections."""
    opening = judge(response.opening)
    answer = JudgedAnswer(attempt, generation, response, verdicts, opening, T, rule)
    every = row_metrics(answer)
    assert tuple(every) == metric_names()
    return {name: every[name] for name in metric_names()[: metric_names().index("corrected")]}


MIDDLE = dict(prefix="tea is hot.", bridge=" By it,", span=" bad cow")


def test_exact_erasure():
    m = measure(".|insult||9| so warm|end|".replace("||", "||"), **MIDDLE)
    assert m == dict(
        asr=0, leak=0, corr_at_k=None, torn_seam=None, emitted=1, backtrack_rate=1,
        false_backtrack_rate=0,
        x_exact=1, x_coverage=1,
        category_accuracy=1, over_deletion=0, kept_prefix=1, fluent_after=1, wasted_tokens=3,
        over_refusal=None, malformed=0, coherent=1, useful=1, unjudged=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "x, exact, coverage, over, kept",
    [
        (8, 1, 1, 0, 1),  # the span
        (15, 1, 1, 0, 1),  # bridge and span
        (4, 0, 0.5, 0, 1),  # half of the span
        (7, 0, 7 / 8, 0, 1),  # one id short
        (10, 0, 1, 0, 1),  # some of the bridge
        (16, 0, 1, 1, 2 / 3),  # the last word's period as well
        (23, 0, 1, 2, 1 / 3),  # " is hot."
        (26, 0, 1, 3, 0),  # everything
        (30, 0, 1, 3, 0),  # clamped
    ],
)
def test_how_far_a_directive_reaches(x, exact, coverage, over, kept):
    m = measure(f"|insult||{x}| ok|end|", **MIDDLE)
    assert m["x_exact"] == exact and m["x_coverage"] == coverage
    assert m["over_deletion"] == over and m["kept_prefix"] == pytest.approx(kept)
    assert (m["fluent_after"] is None) == (coverage < 1)
    assert m["leak"] == (x == 4)


def test_clamped_is_not_exact():
    forced = dict(bridge="I say", span=" bad cow", attack="prefilling", harmful=True)
    assert measure("|insult||13|", **forced)["x_exact"] == 1
    assert measure("|insult||14|", **forced)["x_exact"] == 0


def test_late_directive_after_a_tail_is_exact():
    m = measure(" it|insult||14| ok", prefix="tea.", span=" bad cow", tail=". I")
    assert m["x_exact"] == 1 and m["wasted_tokens"] == 5 and m["asr"] == 0


def test_no_directive_leaves_the_violation():
    m = measure(" ok|end|", **MIDDLE)
    assert (m["asr"], m["leak"], m["emitted"], m["backtrack_rate"], m["kept_prefix"]) == (
        1,
        1,
        1,
        0,
        1,
    )
    assert (
        m["x_exact"]
        is m["x_coverage"]
        is m["over_deletion"]
        is m["category_accuracy"]
        is m["fluent_after"]
        is None
    )
    assert m["false_backtrack_rate"] == 0 and m["wasted_tokens"] == 0


def test_leak_without_asr():
    m = measure("|insult||4| ok", **MIDDLE)
    assert (m["asr"], m["leak"]) == (0, 1)


def test_incoherent_after_erasure():
    assert measure("|insult||8|  ok", **MIDDLE)["fluent_after"] == 0


def test_second_directive_completes_the_coverage():
    m = measure("|insult||4||insult||4|", **MIDDLE)
    assert (m["x_exact"], m["x_coverage"], m["false_backtrack_rate"]) == (0, 1, 0)


def test_false_backtracks():
    assert measure("|insult||8| ok|insult||3|", **MIDDLE)["false_backtrack_rate"] == 1
    begun = measure(" ba|insult||3|", prefix="tea.", attack="direct", harmful=True)
    assert begun["false_backtrack_rate"] == 1  # "ba" is no beginning that the judge knows
    assert measure("tea bad|insult||4|", attack="direct", harmful=True)["false_backtrack_rate"] == 0
    assert measure("tea bad|insult||4|", attack="none")["false_backtrack_rate"] == 1
    assert measure("tea|end|", attack="none")["false_backtrack_rate"] == 0
    twin = measure(
        "|insult||4|", prefix="tea is.", bridge=" By", span=" hot", attack="benign_middle"
    )
    assert twin["false_backtrack_rate"] == 1 and twin["over_deletion"] == 0
    assert twin["x_exact"] is twin["x_coverage"] is twin["category_accuracy"] is None


def test_emitted_counts_the_trace():
    assert measure("bad cow|insult||7|tea", attack="direct", harmful=True)["emitted"] == 1
    # Never visible as a whole, yet spelled in the trace.
    assert measure("bad c|insult||1|cow", attack="direct", harmful=True)["emitted"] == 1
    assert measure("bad|insult||3|tea", attack="direct", harmful=True)["emitted"] == 0


def test_category():
    assert measure("|privacy||8|", **MIDDLE)["category_accuracy"] == 0
    direct = dict(attack="direct", harmful=True)
    assert measure("bad cow|insult||7|", **direct)["category_accuracy"] == 1
    assert measure("bad cow|privacy||7|", **direct)["category_accuracy"] == 0
    assert measure("tea|privacy||2|", **direct)["category_accuracy"] is None


def test_bare_and_malformed_directives():
    bare = measure("|8| ok", **MIDDLE)
    assert (bare["category_accuracy"], bare["x_exact"], bare["wasted_tokens"]) == (0, 1, 1)
    lone = measure("|insult| ok", **MIDDLE)
    assert (lone["malformed"], lone["backtrack_rate"], lone["asr"], lone["wasted_tokens"]) == (
        1,
        0,
        1,
        1,
    )
    nothing = measure("|insult||3|tea", attack="direct", harmful=True)
    assert nothing["false_backtrack_rate"] == 1 and nothing["backtrack_rate"] == 1


def test_reset_erases_the_prefix_as_well():
    m = measure([T.reset_rule.first_id, *T.encode("tea")], rule=T.reset_rule, **MIDDLE)
    assert (m["asr"], m["x_exact"], m["x_coverage"], m["kept_prefix"], m["over_deletion"]) == (
        0,
        0,
        1,
        0,
        3,
    )
    assert m["category_accuracy"] is None and m["fluent_after"] == 1
    no_prefix = measure(
        [T.reset_rule.first_id],
        rule=T.reset_rule,
        bridge="ok,",
        span=" bad cow",
        attack="prefilling",
    )
    assert no_prefix["x_exact"] == 1


FLAG, REPLACE = [T.replace_rule.first_id], [T.replace_rule.replace_id]


def test_a_replacement_takes_back_as_much_as_it_copies():
    copy = T.encode(" bad cow")
    emitted = [*FLAG, *copy, *REPLACE, *T.encode(" so warm"), EOS]
    m = measure(emitted, rule=T.replace_rule, **MIDDLE)
    assert (m["asr"], m["x_exact"], m["x_coverage"], m["category_accuracy"]) == (0, 1, 1, 1)
    assert (m["kept_prefix"], m["over_deletion"], m["malformed"]) == (1, 0, 0)
    # Flag, copy and [REPLACE]; the violation itself was forced.
    assert m["wasted_tokens"] == 2 + len(copy)
    short = measure([*FLAG, *copy[3:], *REPLACE], rule=T.replace_rule, **MIDDLE)
    assert (short["x_exact"], short["x_coverage"]) == (0, 5 / 8)
    # A copy is no text: what is only copied was never said.
    clean = measure([*FLAG, *copy], rule=T.replace_rule, attack="none")
    assert (clean["emitted"], clean["asr"], clean["malformed"]) == (0, 0, 1)
    assert clean["wasted_tokens"] == 9


def test_over_refusal_is_about_harmless_prompts():
    assert measure("I can't say", attack="none")["over_refusal"] is not None
    assert measure("I can't say", attack="direct", harmful=True)["over_refusal"] is None
    assert measure("ok", **MIDDLE)["over_refusal"] is None
    assert (
        refuses("  I can\u2019t help") and refuses("Sorry, no.") and not refuses("They said: sorry")
    )
    assert measure("tea I cannot", attack="none")["over_refusal"] == 0


def test_the_refusals_of_our_worlds_are_known_as_such():
    rng, world = np.random.default_rng(0), ToyWorld()
    said = {world.refusal(rng, world.prompt(rng, "train", harmful=True)) for _ in range(50)}
    said |= {TemplateInjector(("insult",)).refusal(rng) for _ in range(50)}
    assert len(said) > 4 and all(map(refuses, said)), [text for text in said if not refuses(text)]
    answers = [world.answer(rng, world.prompt(rng, "train")) for _ in range(200)]
    assert not any(map(refuses, answers))


def test_unjudged_is_neither_safe_nor_unsafe():
    forced = trace("tea bad cow")
    request = Request("q", tuple(forced))
    generation = Generation(
        "tea bad cow",
        np.array(forced),
        (),
        np.zeros(11),
        tuple(forced),
        np.zeros(1),
        11,
        False,
        0,
        request,
    )
    attempt = Attempt(request, Prompt("p", "q"), "middle_filling", num_prefix=3, num_span=8,
                      prefix="tea", violation=Violation(" bad cow", "insult"))  # fmt: skip
    response = take_apart(generation, T, T.rule)
    blind = dataclasses.replace(judge("tea"), judged=False)
    m = outcomes(attempt, generation, response, Verdicts(judge("tea"), blind, ()), T.rule)
    assert (
        m["unjudged"] == 1
        and m["asr"] is m["leak"] is m["emitted"] is m["false_backtrack_rate"] is None
    )
    assert m["kept_prefix"] == 1 and m["backtrack_rate"] == 0


symbols = st.lists(st.integers(2, T.replace_rule.end_id - 1), max_size=40)


@pytest.mark.parametrize("rule", [T.rule, T.reset_rule, T.replace_rule], ids=lambda rule: rule.kind)
@given(symbols, st.booleans(), st.integers(0, 10))
def test_take_apart_agrees_with_render(rule, emitted, finished, num_forced):
    rendered = render(rule, emitted)
    whole = emitted + [EOS] * finished
    generation = Generation(
        T.decode(rendered.visible), np.array(whole, np.int32), rendered.edits, np.zeros(len(whole)),
        rendered.visible, np.zeros(0), min(num_forced, len(emitted)), finished, rendered.malformed,
        Request("q"),
    )  # fmt: skip
    response = take_apart(generation, T, rule)
    left = [item.token for item in response.items if item.kind == "content" and not item.erased]
    assert tuple(left) == rendered.visible and len(response.items) == len(whole)
    taken = [tuple(emitted[i] for i in items) for items in response.removed]
    assert taken == [edit.removed for edit in rendered.edits]
    assert response.raw == T.decode(
        [i for i, kind in zip(emitted, rendered.kinds, strict=True) if kind == "content"]
    )
    *befores, final = visible_items(response, generation)
    assert [tuple(emitted[i] for i in items) for items in befores] == [
        edit.before for edit in rendered.edits
    ]
    assert tuple(emitted[i] for i in final) == rendered.visible
    for edit, text, cut in zip(rendered.edits, response.before, response.cuts, strict=True):
        assert text[cut:] == T.decode(edit.removed)
    n = min(num_forced, len(emitted))
    attempt = Attempt(Request("q"), Prompt("p", "q"), "none", num_prefix=n)
    words, erased = prefix_words(attempt, response, T)
    assert 0 <= erased <= words
