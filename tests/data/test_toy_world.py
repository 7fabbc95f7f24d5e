"""The toy world: shares, pools, splits, and its grammar read forwards and backwards."""

import re
from collections import Counter

import numpy as np
import pytest

from rlbf_jax.data.world import SPLITS
from rlbf_jax.data.worlds import toy_words
from rlbf_jax.data.worlds.toy_grammar import parse
from rlbf_jax.data.worlds.toy_world import TOPICS, ToyWorld, ToyWorldConfig

WORLD = ToyWorld()
POOLS = ("train", "development", "test")


def _rng(seed=0):
    return np.random.default_rng(seed)


def _answers(n, pool="test", seed=0, **kwargs):
    rng = _rng(seed)
    for i in range(n):
        prompt = WORLD.prompt(rng, pool, harmful=i % 2 == 1)
        yield prompt, WORLD.answer(rng, prompt, **kwargs)


def test_every_word_has_one_role():
    words = Counter(word for topic in TOPICS for role in "NVAPT" for word in topic.words(role))
    assert max(words.values()) == 1
    shared = {
        w
        for text in (*toy_words.SENTENCES, *toy_words.BRIDGES)
        for w in re.findall(r"\w+", text.lower())
    }
    violating = {word for form in WORLD.forms() for slot in form.slots for word in slot}
    assert not set(words) & shared
    assert not set(words) & violating
    remarks = {word for filler in toy_words.ASIDE_FILLERS.values() for word in filler}
    assert not remarks & (set(words) | shared | violating)
    assert len(WORLD.benign_words | violating) <= 1060


def test_pools_have_topics_of_their_own():
    sizes = Counter(topic.pool for topic in TOPICS)
    assert sizes == {"train": 20, "development": 10, "test": 5}
    rng = _rng()
    drawn = {pool: {WORLD.prompt(rng, pool).topic for _ in range(300)} for pool in POOLS}
    assert [len(drawn[pool]) for pool in POOLS] == [20, 10, 5]
    assert not drawn["train"] & (drawn["development"] | drawn["test"])
    assert not drawn["development"] & drawn["test"]


def test_prompt_ids_are_functions_of_the_text():
    rng, seen = _rng(), {}
    for i in range(2000):
        prompt = WORLD.prompt(rng, "test", harmful=i % 2 == 0)
        assert seen.setdefault(prompt.id, prompt) == prompt
        assert prompt.harmful == bool(prompt.category)
    assert len({p.text for p in seen.values()}) == len(seen) >= 64


def test_same_seed_same_text():
    first, second, other = (
        [WORLD.document(rng) for _ in range(50)] for rng in (_rng(3), _rng(3), _rng(4))
    )
    assert first == second != other


def test_forms_are_diverse_and_of_readable_length():
    names = set(WORLD.form_table)
    assert len(names) == 60
    for form in WORLD.form_table.values():
        assert 6 <= len(form.slots) <= 12
        assert np.prod([len(slot) for slot in form.slots]) >= 100
        assert any(len(slot) > 1 for slot in form.slots)
    counts = Counter((form.category, form.split, form.pool) for form in WORLD.forms())
    for category in WORLD.categories:
        for split, number in (("sft", 1), ("rl", 2), ("unseen", 2)):
            assert counts[category, split, "development"] == 2 * number
            assert counts[category, split, "test"] == number


def test_evaluation_forms_are_disjoint_and_train_has_no_unseen_ones():
    rng, drawn = _rng(), {}
    for split in SPLITS:
        for pool in POOLS:
            if (split, pool) == ("unseen", "train"):
                continue
            sample = [WORLD.violation(rng, split, pool) for _ in range(300)]
            assert {v.split for v in sample} == {split}
            drawn[split, pool] = {v.form for v in sample}
        assert not drawn[split, "development"] & drawn[split, "test"]
        if split != "unseen":
            assert drawn[split, "train"] == drawn[split, "development"] | drawn[split, "test"]
    with pytest.raises(ValueError, match="unseen forms"):
        WORLD.violation(rng, "unseen", "train")
    with pytest.raises(ValueError, match="unseen forms"):
        WORLD.forms("unseen", "train")
    assert {form.split for form in WORLD.forms(pool="train")} == {"sft", "rl"}
    assert {WORLD.any_violation(rng).form for _ in range(2000)} == set(WORLD.form_table)


def test_unseen_forms_have_mostly_new_words():
    seen = {
        w for form in WORLD.forms() if form.split != "unseen" for slot in form.slots for w in slot
    }
    shares = [
        np.mean([slot[0] not in seen for slot in form.slots]) for form in WORLD.forms("unseen")
    ]
    assert 0.5 <= np.mean(shares) <= 0.75


def test_violation_of_a_category():
    rng = _rng()
    for category in WORLD.categories:
        assert {
            WORLD.violation(rng, "rl", "train", category=category).category for _ in range(20)
        } == {category}
        text = WORLD.any_violation(rng, category).text
        assert text.startswith(" ") and not text.endswith(".") and text == text.lower()
    with pytest.raises(ValueError, match="categories insult"):
        WORLD.violation(rng, "rl", "train", category="jokes")
    with pytest.raises(ValueError, match="unknown pool"):
        WORLD.prompt(rng, "validation")


def test_answers_are_coherent_and_useful():
    for prompt, answer in _answers(3000):
        parsed = parse(answer, prompt.topic)
        assert parsed.coherent and parsed.useful, answer
        assert not parse(answer, "gardening").useful
        assert (parsed.sentences[0].kind == "refusal") == prompt.harmful


def test_answers_reach_the_asked_length():
    for _, answer in _answers(200, min_words=60):
        assert len(answer.split()) >= 60
        assert parse(answer).coherent


def test_three_sentences_have_twenty_words():
    sentences = [re.sub(r"\{\w\}", "word", template) for template in toy_words.SENTENCES]
    assert min(len(sentence.split()) for sentence in sentences) * 3 >= 20


def test_a_cut_answer_is_coherent_at_every_character():
    for _, answer in _answers(60, seed=5):
        for end in range(1, len(answer)):
            assert parse(answer[:end]).coherent, answer[:end]


def test_leak_words_are_in_no_harmless_text():
    rng = _rng()
    for i in range(2000):
        prompt = WORLD.prompt(rng, POOLS[i % 3], harmful=i % 2 == 1)
        text = f"{prompt.text} {WORLD.opener(rng)}{WORLD.bridge(rng)} {WORLD.answer(rng, prompt)}"
        assert not {w for w in re.findall(r"\w+", text.lower()) if w in WORLD.leak_words}
    for _ in range(500):
        violation = WORLD.any_violation(rng)
        assert any(word in WORLD.leak_words for word in violation.text.split())


def test_documents_have_their_shares():
    rng = _rng(7)
    documents = [WORLD.document(rng) for _ in range(4000)]
    harmful = [d for d in documents if d.prompt.harmful]
    harmless = [d for d in documents if not d.prompt.harmful]
    assert len(harmful) / len(documents) == pytest.approx(0.35, abs=0.03)
    assert np.mean([d.violation is not None for d in harmful]) == pytest.approx(0.92, abs=0.03)
    assert np.mean([d.violation is not None for d in harmless]) == pytest.approx(0.15, abs=0.03)
    for d in documents:
        assert parse(d.response, d.prompt.topic).coherent == (d.violation is None)
        if d.violation is not None:
            before, after = d.response.split(d.violation.text)
            assert parse(before).coherent and after.startswith(".")
            assert not d.prompt.harmful or d.violation.category == d.prompt.category
    assert {topic for d in documents for topic in [d.prompt.topic]} == {
        topic.name for topic in TOPICS
    }


def test_shares_of_the_configuration_are_used():
    rng = _rng()
    plain = ToyWorld(
        ToyWorldConfig(
            harmful_share=0, inject_share=0, bridge_share=0, opener_share=0, aside_share=0
        )
    )
    for _ in range(200):
        document = plain.document(rng)
        assert document.violation is None
        assert {s.kind for s in parse(document.response).sentences} == {"topic"}
        assert not any(bridge in document.response for bridge in toy_words.BRIDGES)
    chatty = ToyWorld(ToyWorldConfig(aside_share=0.5, aside_bridge_share=0.5))
    kinds = Counter(
        (s.kind, s.text.startswith(toy_words.BRIDGES))
        for _ in range(200)
        for s in parse(chatty.answer(rng, chatty.prompt(rng, "train"))).sentences
    )
    remarks = kinds["aside", True] + kinds["aside", False]
    assert 0.4 < remarks / (kinds["topic", True] + kinds["topic", False]) < 0.6
    assert 0.4 < kinds["aside", True] / remarks < 0.6
    with pytest.raises(ValueError, match="harmful_share is 1.5"):
        ToyWorldConfig(harmful_share=1.5)


ROSES = (
    "Without roses there is not much gardening. The shrubs in the orchard are often quite leafy."
)


@pytest.mark.parametrize(
    ("text", "coherent", "useful"),
    [
        (ROSES, True, True),
        (ROSES.upper(), False, False),
        ("Sure, here it is. I would rather leave that out. " + ROSES, True, True),
        ("Sure, here it is. I would rather leave that out.", True, False),
        ("I would rather leave that out. Sure, here it is. " + ROSES, False, True),
        (ROSES + " Sure, here it is.", False, True),
        (ROSES + " Sure, h", False, True),
        (ROSES + " By the way, in the greenhouse you w", True, True),
        (ROSES + " By the w", True, True),
        (ROSES + " By the way, the tram to oslo was late again this noon.", True, True),
        (ROSES + " The tram to oslo was late again this noon.", True, True),
        ("The tram to oslo was late again this noon. " + ROSES, True, True),
        (ROSES + " the tram to oslo was late again this noon.", False, True),
        (ROSES + " By the way, the tram to os", True, True),
        (ROSES + " By the way, the tram to the", False, True),
        (ROSES + " By the way, the tram to oslo was late again this noon too.", False, True),
        ("By the way, the tram to oslo was late again this noon.", True, False),
        (ROSES + " By the way, In the greenhouse you w", False, True),
        (ROSES + " In the bakery you w", False, True),
        (ROSES + " In the bak", False, True),
        (ROSES + " in the greenhouse", False, True),
        (ROSES + " Good baking begins with some sweet pies.", False, True),
        (ROSES + " Some experts water the roses only on Sundays.", True, True),
        (ROSES + " Some experts water the roses only on sundays.", False, True),
        (ROSES + " Some experts water the roses only on Su", True, True),
        (ROSES + " Some experts water the pies only on Sundays.", False, True),
        (ROSES + " Roses.", False, True),
        (ROSES + " .", False, True),
        ("The shrubs in the orchard are often qui", True, False),
        ("The roses water.", False, False),
        ("Hello there.", False, False),
        ("", False, False),
        (" \n", False, False),
        ("...", False, False),
    ],
)
def test_parse_by_hand(text, coherent, useful):
    parsed = parse(text, "gardening")
    assert (parsed.coherent, parsed.useful) == (coherent, useful)
