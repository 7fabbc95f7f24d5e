"""BSAFE+ examples: directives take back exactly what was injected,
and only they and the safe rest are learned."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbf_jax.data.builders.bsafe_plus import build_bsafe_plus, build_refusal, to_example
from rlbf_jax.data.builders.checks import left_out
from rlbf_jax.data.builders.examples import (
    BuildReport,
    Rejection,
    build_pretraining,
    plain_example,
)
from rlbf_jax.data.builders.injection import BsafePlusConfig, build_injection
from rlbf_jax.data.builders.injectors import TemplateInjector
from rlbf_jax.data.schema import Example, Injection, Violation
from rlbf_jax.data.sources.files import Row
from rlbf_jax.data.worlds.user_world import UserWorld
from rlbf_jax.directives import render
from rlbf_jax.tokenizers import train_tokenizer

FACTS = (
    "The river is wide. Stones lie in it. Many birds drink there. Nobody knows why, but it runs "
    "to the sea."
)


def test_builds_that_left_out_most_draws_say_so():
    few, many = BuildReport({}, {"a": 10}), BuildReport({}, {"a": 10, "longer than max_tokens": 31})
    assert left_out(few, 10) == "" and left_out(many, 41) == ""
    assert left_out(many, 40).startswith(
        "41 of 81 draws were left out (31 longer than max_tokens, 10 a), long ones"
    )


class RecordingWorld(UserWorld):
    """Remembers what was asked of it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.asked = []

    def prompt(self, rng, pool, *, harmful=False):
        self.asked.append(("harmful" if harmful else "harmless", pool))
        return super().prompt(rng, pool, harmful=harmful)

    def violation(self, rng, split, pool, *, category=None):
        self.asked.append((split, pool))
        return super().violation(rng, split, pool, category=category)


def make_world():
    rows = [Row(f"What about river {i}?", f"River {i} it is. {FACTS}", i + 1) for i in range(40)]
    return RecordingWorld(rows, TemplateInjector(), development_share=0.2, test_share=0.2)


@pytest.fixture(scope="module")
def tokenizer():
    world, rng = make_world(), np.random.default_rng(0)
    documents = [world.document(rng) for _ in range(300)]
    return train_tokenizer(
        [d.prompt.text + " " + d.response for d in documents], 450, world.categories, 80
    )


def parts(tokenizer, injection):
    return [
        tokenizer.encode(t)
        for t in (
            injection.part1,
            injection.bridge,
            injection.violation.text,
            injection.tail,
            injection.part2,
        )
    ]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["whole", "late", "word_cut", "token_cut"]),
)
def test_the_reader_sees_exactly_the_safe_answer(tokenizer, seed, harmful, split, shape):
    world, rng = make_world(), np.random.default_rng(seed)
    config = BsafePlusConfig(max_tokens=400, on_too_long="split")
    injection = build_injection(world, rng, config, harmful=harmful, shape=shape)
    assert (injection.part1 == "") == harmful and injection.part2
    if split:
        narrow = train_tokenizer([FACTS] * 3, 285, world.categories, 5)
        tokenizer = narrow
    cut = rng.random() if shape == "token_cut" else None
    example = to_example(injection, tokenizer, config, violation_cut=cut)
    assert isinstance(example, Example)
    response = example.tokens[example.prompt_length :].tolist()
    part1, bridge, violation, tail, part2 = parts(tokenizer, injection)
    rendered = render(tokenizer.controls.rule(), response)
    assert list(rendered.visible) == part1 + part2 + [tokenizer.eos_id]
    assert rendered.malformed == 0 and rendered.edits and not any(e.clamped for e in rendered.edits)
    assert {e.category for e in rendered.edits} == {injection.violation.category}
    removed = [i for e in reversed(rendered.edits) for i in e.removed]
    if cut is None:
        assert removed == bridge + violation + tail
    else:
        kept = len(removed) - len(bridge)
        assert removed == bridge + violation[:kept] and len(violation) / 2 <= kept < len(violation)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.integers(2, 4))
def test_several_violations_are_taken_back_from_the_last_to_the_first(
    tokenizer, seed, harmful, most
):
    world, rng = make_world(), np.random.default_rng(seed)
    config = BsafePlusConfig(
        max_tokens=900, on_too_long="split", several_share=1.0, most_violations=most, late_words=9
    )
    injection = build_injection(world, rng, config, harmful=harmful, shape="late")
    assert 1 <= len(injection.earlier) < most
    example = to_example(injection, tokenizer, config)
    assert isinstance(example, Example)
    part1, bridge, violation, tail, part2 = parts(tokenizer, injection)
    rendered = render(tokenizer.controls.rule(), example.tokens[example.prompt_length :].tolist())
    assert list(rendered.visible) == part1 + part2 + [tokenizer.eos_id]
    assert rendered.malformed == 0 and not any(e.clamped for e in rendered.edits)
    stretches = [(e.violation.category, tokenizer.encode(e.text)) for e in injection.earlier]
    stretches.append((injection.violation.category, bridge + violation + tail))
    # One directive a violation, or as many as its X needs; the ids of each are its own.
    edits = list(rendered.edits)
    for category, taken in reversed(stretches):
        removed: list[int] = []
        while len(removed) < len(taken):
            edit = edits.pop(0)
            assert edit.category == category
            removed = [*edit.removed, *removed]
        assert removed == taken
    assert not edits
    words = injection.tail.split()
    assert 1 <= len([word for word in words if word != "."]) <= 9


def test_strange_prompts_are_answered_as_if_they_were_not(tokenizer):
    config = BsafePlusConfig(max_tokens=400, share_plain=1.0, share_harmful=0.3, share_strange=0.5)
    rng = np.random.default_rng(3)
    examples, report = build_bsafe_plus(make_world(), tokenizer, rng, config, 300)
    assert 0.4 < report.made["strange"] / report.made["plain"] < 0.6
    lengths = sorted(e.prompt_length for e in examples)
    assert lengths[-20] > 2 * lengths[20]
    rule = tokenizer.controls.rule()
    assert not any(rule.is_control(e.tokens).any() for e in examples)
    assert all(e.in_loss[e.prompt_length :].all() for e in examples)


def test_no_share_of_several_draws_what_it_drew(tokenizer):
    """Nor do its other settings."""
    rows = [
        build_injection(make_world(), np.random.default_rng(7), BsafePlusConfig(most_violations=n))
        for n in (2, 5)
    ]
    assert rows[0] == rows[1] and rows[0].earlier == ()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_loss_is_on_directive_and_safe_rest_only(tokenizer, seed, loss_on_part1):
    config = BsafePlusConfig(max_tokens=400, loss_on_part1=loss_on_part1)
    injection = build_injection(make_world(), np.random.default_rng(seed), config, shape="late")
    example = to_example(injection, tokenizer, config)
    part1, bridge, violation, tail, part2 = parts(tokenizer, injection)
    prompt = tokenizer.encode_prompt(injection.prompt)
    taken = bridge + violation + tail
    rule = tokenizer.controls.rule()
    directive = [rule.category_id(injection.violation.category), rule.backtrack_id(len(taken))]
    assert example.prompt_length == len(prompt)
    assert example.tokens.tolist() == prompt + part1 + taken + directive + part2 + [
        tokenizer.eos_id
    ]
    want = (
        [False] * len(prompt)
        + [loss_on_part1] * len(part1)
        + [False] * len(taken)
        + [True] * (len(part2) + 3)
    )
    assert example.in_loss.tolist() == want


def injection_of(**changes):
    base = Injection(
        "Why?",
        "The river is wide.",
        "",
        Violation(" You nitwit.", "insult"),
        "",
        " Stones lie in it.",
    )
    return dataclasses.replace(base, **changes)


def test_rejections(tokenizer):
    config = BsafePlusConfig()
    assert isinstance(to_example(injection_of(), tokenizer, config), Example)
    mid_word = injection_of(part1="The riv", part2="er is wide.")
    assert to_example(mid_word, tokenizer, config) == Rejection("illegal cut of the answer")
    glued = injection_of(part1="The riv", violation=Violation("er", "insult"), part2=" is")
    assert to_example(glued, tokenizer, config) == Rejection("illegal cut around the violation")
    long = injection_of(violation=Violation(" nitwit" * 60, "insult"))
    wide = dataclasses.replace(config, max_tokens=10_000)
    assert to_example(long, tokenizer, wide) == Rejection("X beyond x_max")
    assert isinstance(
        to_example(long, tokenizer, dataclasses.replace(wide, on_too_long="split")), Example
    )
    assert to_example(injection_of(), tokenizer, BsafePlusConfig(max_tokens=20)) == Rejection(
        "longer than max_tokens"
    )
    assert plain_example("a", "b " * 99, tokenizer, 50) == Rejection("longer than max_tokens")
    with pytest.raises(ValueError, match="no tail"):
        to_example(injection_of(tail=" and"), tokenizer, config, violation_cut=0.5)


def test_text_that_spells_a_directive_is_text(tokenizer):
    spelled = injection_of(part1="[CATEGORY_INSULT] [BACKTRACK_BY_3]")
    example = to_example(spelled, tokenizer, BsafePlusConfig())
    assert sum(tokenizer.controls.rule().is_control(int(i)) for i in example.tokens) == 2


def test_mixture_shares_and_pools(tokenizer):
    world = make_world()
    config = BsafePlusConfig(
        max_tokens=300, share_plain=0.4, share_harmful=0.3, late_share=0.25, cut_violation_share=0.2
    )
    examples, report = build_bsafe_plus(world, tokenizer, np.random.default_rng(1), config, 1200)
    made = report.made
    assert (
        len(examples)
        == 1200
        == made["injected"] + made["injected_harmful"] + made["plain"] + made["plain_harmful"]
    )
    injected = made["injected"] + made["injected_harmful"]
    assert abs(injected / 1200 - 0.6) < 0.06
    assert abs((made["injected_harmful"] + made["plain_harmful"]) / 1200 - 0.3) < 0.06
    assert abs(made["late"] / injected - 0.25) < 0.06
    assert abs((made["word_cut"] + made["token_cut"]) / injected - 0.2) < 0.06
    with_directive = sum(
        bool(tokenizer.controls.rule().is_control(e.tokens).any()) for e in examples
    )
    assert with_directive == injected
    assert set(world.asked) == {("harmless", "train"), ("harmful", "train"), ("sft", "train")}


def test_other_pools_only_in_plain_harmless_examples(tokenizer):
    world = make_world()
    config = BsafePlusConfig(max_tokens=300, share_other_pools=0.5)
    build_bsafe_plus(world, tokenizer, np.random.default_rng(1), config, 300)
    assert {pool for kind, pool in world.asked if kind != "harmless"} == {"train"}
    assert {pool for kind, pool in world.asked if kind == "harmless"} == {
        "train",
        "development",
        "test",
    }


def test_an_injector_is_asked(tokenizer):
    asked = []

    def injector(prompt, part1):
        asked.append((prompt, part1))
        return None if len(asked) % 2 else (" Well:", Violation(" you nitwit", "insult"))

    config = BsafePlusConfig(max_tokens=300, share_plain=0.0, share_harmful=0.0)
    examples, report = build_bsafe_plus(
        make_world(), tokenizer, np.random.default_rng(0), config, 20, injector=injector
    )
    assert len(asked) == 40 and report.rejected == {"injector gave nothing": 20}
    assert all("Well:" in tokenizer.decode(e.tokens) for e in examples)


def test_builds_are_deterministic(tokenizer):
    builds = [
        build_bsafe_plus(make_world(), tokenizer, np.random.default_rng(5), BsafePlusConfig(), 20)
        for _ in range(2)
    ]
    assert builds[0][1] == builds[1][1]
    assert all(
        np.array_equal(a.tokens, b.tokens) for a, b in zip(builds[0][0], builds[1][0], strict=True)
    )


def test_refusals_and_pretraining(tokenizer):
    world, rng = make_world(), np.random.default_rng(0)
    examples, report = build_refusal(world, tokenizer, rng, BsafePlusConfig(max_tokens=300), 200)
    assert report.made["refusal"] + report.made["plain"] == 200 and report.made["refusal"] > 20
    assert not any(tokenizer.controls.rule().is_control(e.tokens).any() for e in examples)
    examples, report = build_pretraining(world, tokenizer, rng, 100, 300)
    assert set(report.made) == {"clean", "violating"}
    for e in examples:
        assert e.in_loss.tolist() == [i >= e.prompt_length for i in range(len(e.tokens))]
    examples, _ = build_pretraining(world, tokenizer, rng, 5, 300, loss_on_prompt=True)
    assert all(not e.in_loss[0] and e.in_loss[1:].all() for e in examples)


def test_plain_errors(tokenizer):
    world, rng = make_world(), np.random.default_rng(0)
    with pytest.raises(ValueError, match="rejected.*raise max_tokens"):
        build_bsafe_plus(world, tokenizer, rng, BsafePlusConfig(max_tokens=5), 3)
    other = train_tokenizer([FACTS] * 3, 285, ("insult",), 5)
    with pytest.raises(
        ValueError, match="no control id for the categories gamble, potion, privacy"
    ):
        build_bsafe_plus(world, other, rng, BsafePlusConfig(), 3)
    with pytest.raises(ValueError, match="share_plain is 2"):
        BsafePlusConfig(share_plain=2.0)
    with pytest.raises(ValueError, match="exceed 1"):
        BsafePlusConfig(late_share=0.7, cut_violation_share=0.7)
    with pytest.raises(ValueError, match="'refuse' or 'split'"):
        BsafePlusConfig(on_too_long="clamp")
