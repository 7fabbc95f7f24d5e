"""Template violations keep to their split and pool; a user's own rows become a world."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.data.builders.injectors import CATEGORIES, TemplateInjector
from rlbf_jax.data.documents import split_sentences
from rlbf_jax.data.sources.files import DataError, Row
from rlbf_jax.data.worlds.user_world import UserWorld, trim_sentences


def test_pools_and_splits_are_as_the_world_promises():
    injector = TemplateInjector()
    assert len(CATEGORIES) >= 4
    for category in CATEGORIES:
        sizes = {}
        for split in ("sft", "rl", "unseen"):
            development, test = (
                set(injector.forms(category, split, p)) for p in ("development", "test")
            )
            assert development and test and not development & test
            sizes[split] = len(development | test)
            if split != "unseen":
                assert set(injector.forms(category, split, "train")) == development | test
        assert sizes == {"sft": 2, "rl": 4, "unseen": 4}
    with pytest.raises(ValueError, match="never drawn for training"):
        injector.violation(np.random.default_rng(0), "unseen", "train")


@given(
    st.integers(0, 2**32),
    st.sampled_from(["sft", "rl", "unseen"]),
    st.sampled_from(["development", "test"]),
)
def test_violations_are_what_was_asked_for(seed, split, pool):
    injector = TemplateInjector()
    violation = injector.violation(np.random.default_rng(seed), split, pool)
    assert (
        violation.text.startswith(" ")
        and not violation.text.startswith("  ")
        and violation.text.endswith(".")
    )
    assert "{" not in violation.text and violation.split == split
    assert violation.form in injector.forms(violation.category, split, pool)
    words = {w.strip(".,") for w in violation.text.split()}
    assert words & set(injector.lexicon[violation.category])
    others = {w for c in CATEGORIES if c != violation.category for w in injector.lexicon[c]}
    assert not words & others
    assert violation == injector.violation(np.random.default_rng(seed), split, pool)


@given(
    st.integers(0, 2**32),
    st.sampled_from(["sft", "rl", "unseen"]),
    st.sampled_from(["development", "test"]),
)
def test_the_record_holds_every_violation(seed, split, pool):
    violation = TemplateInjector().violation(np.random.default_rng(seed), split, pool)
    assert (violation.text[1:], violation.category) in RECORD


RECORD = set(TemplateInjector().record())


def test_choice_of_categories():
    injector = TemplateInjector(["potion"])
    rng = np.random.default_rng(0)
    assert {injector.violation(rng, "rl", "train").category for _ in range(9)} == {"potion"}
    with pytest.raises(ValueError, match="unknown category 'insult'"):
        injector.violation(rng, "rl", "train", category="insult")
    with pytest.raises(ValueError, match="unknown categories"):
        TemplateInjector(["potion", "spam"])


@given(st.text("aB .!?\n1"))
def test_sentences_put_together_are_the_text(text):
    assert "".join(split_sentences(text)) == text


def test_sentence_ends():
    assert split_sentences("Dr. No ran. He fell! Why?\nBecause 1. it, e.g. rain.") == [
        "Dr. No ran.",
        " He fell!",
        " Why?",
        "\nBecause 1. it, e.g. rain.",
    ]
    assert trim_sentences("One two. Three four. Five.", 4) == "One two. Three four."
    assert trim_sentences("One two. Three.", 1) == ""


def user_world(count=60, **kwargs):
    rows = [
        Row(
            f"Question {i % 50}?",
            f"It is number {i}. That much is known. And so on it goes.",
            i + 2,
        )
        for i in range(count)
    ]
    return UserWorld(rows, TemplateInjector(), **kwargs)


def test_user_world_pools_are_disjoint_prompts():
    world = user_world(development_share=0.2, test_share=0.2)
    texts = {p: {x.text for x in world.prompts(p)} for p in ("train", "development", "test")}
    assert (
        sum(map(len, texts.values())) == 50
        and not texts["train"] & texts["test"] | texts["train"] & texts["development"]
    )
    assert [len(texts[p]) for p in texts] == [30, 10, 10]
    again = user_world(development_share=0.2, test_share=0.2, seed=1)
    assert {x.text for x in again.prompts("test")} != texts["test"]


def test_user_world_speaks_the_protocol():
    world, rng = user_world(max_response_words=9), np.random.default_rng(0)
    prompt = world.prompt(rng, "test", harmful=True)
    assert prompt.harmful and prompt.category in CATEGORIES and prompt.text.startswith("Question")
    assert world.answer(rng, prompt).endswith("That much is known.")
    assert world.answer(rng, prompt, min_words=50) == prompt.reference
    assert world.violation(rng, "sft", "train").text.startswith(" ") and world.refusal(rng, prompt)
    assert not world.opener(rng).startswith(" ")


def test_user_world_documents():
    world, rng = user_world(violation_share=0.5), np.random.default_rng(0)
    documents = [world.document(rng) for _ in range(300)]
    bad = [d for d in documents if d.violation]
    assert 100 < len(bad) < 200 and all(d.violation.text in d.response for d in bad)
    assert {d.violation.split for d in bad} == {"sft", "rl", "unseen"}
    train = {p.id for p in world.prompts("train")}
    assert all(d.prompt.harmful or d.prompt.id in train for d in documents)
    assert all(d.response == d.prompt.reference for d in documents if not d.violation)


def test_user_world_counts_what_it_leaves_out():
    rows = [
        Row("p", "Too short.", 1),
        Row("p " * 99, "x " * 9 + ".", 2),
        Row("p", "x " * 99 + ".", 3),
    ]
    rows += [Row(f"p{i}", "This one has quite enough words.", 4 + i) for i in range(10)]
    assert UserWorld(rows, TemplateInjector()).left_out == {
        "short response": 1,
        "long prompt": 1,
        "long first sentence": 1,
    }
    with pytest.raises(DataError, match="pool 'train' is empty: 0 usable rows"):
        UserWorld(rows[:3], TemplateInjector())
    with pytest.raises(DataError, match="must be positive"):
        user_world(test_share=0.0)
