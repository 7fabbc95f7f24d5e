"""Attacks on a small world: forced ids spell what they say they spell, and their counts add up."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbf_jax.attacks import ATTACKS, BENIGN, DRAWN, HAS_FORMS, STANDARD, WHOLE, WORST_OF_N
from rlbf_jax.attacks.decoding import DecodingGrid, decoding
from rlbf_jax.attacks.forced.middle_filling import (
    MiddleFillingOptions,
    benign_middle,
    middle_filling,
)
from rlbf_jax.attacks.forced.prefilling import (
    benign_prefill,
    deep_prefilling,
    encode_parts,
    ids_of_words,
    prefilling,
)
from rlbf_jax.sampling.request import Knobs
from tests.attacks.small_world import CONFIG, SENTENCES, WORLD, parts


@pytest.mark.parametrize("name", DRAWN)
def test_shape_shared_by_all(tokenizer, name):
    attempts = ATTACKS[name](WORLD, tokenizer, np.random.default_rng(0), 6, CONFIG)
    again = ATTACKS[name](WORLD, tokenizer, np.random.default_rng(0), 6, CONFIG)
    assert attempts == again and len({a.prompt.id for a in attempts}) == 6
    for attempt in attempts:
        forced = attempt.request.forced
        parts(tokenizer, attempt)
        assert attempt.attack == name and attempt.prompt.text in attempt.request.prompt
        changed = ("reprogram", "strange_suffix")
        assert name in changed or attempt.request.prompt == attempt.prompt.text
        pieced = ("middle_grid", "benign_grid", "prefilling_depth", "respelled")
        assert (
            list(forced) == tokenizer.encode(tokenizer.decode(forced))
            or attempt.num_tail
            or name in pieced
        )
        assert len(forced) + CONFIG.room <= attempt.request.knobs.max_tokens
        assert (attempt.violation is not None) == (name in HAS_FORMS)
        assert attempt.split == (CONFIG.split if name in HAS_FORMS else "all")
        assert attempt.prompt.harmful == (
            name in ("direct", "decoding", "prefilling", "deep_prefilling", "prefilling_depth")
        )
        assert name not in BENIGN or attempt.violation is None


def test_prefilling_cuts_from_two_words_to_the_whole(tokenizer):
    attempts = prefilling(WORLD, tokenizer, np.random.default_rng(1), 200, CONFIG)
    shares, mid_word = [], 0
    for attempt in attempts:
        prefix, opener, span, tail = parts(tokenizer, attempt)
        whole = attempt.violation.text
        assert (prefix, opener, tail) == ("", "Sure, here it is.", "")
        assert whole.startswith(span) and len(span.split()) >= 2
        assert attempt.violation.category == attempt.prompt.category and not attempt.by_construction
        rest = whole[len(span) :]
        mid_word += bool(rest) and not rest.startswith(" ")
        least = ids_of_words(tokenizer, tokenizer.encode(whole), 2)
        shares.append((attempt.num_span - least) / (len(tokenizer.encode(whole)) - least))
    assert min(shares) == 0 and max(shares) == 1
    assert 0.4 < np.mean(shares) < 0.6
    assert mid_word > 5


def test_deep_prefilling_has_a_tail(tokenizer):
    for attempt in deep_prefilling(WORLD, tokenizer, np.random.default_rng(1), 20, CONFIG):
        _, opener, span, tail = parts(tokenizer, attempt)
        assert opener == "Sure, here it is." and span == attempt.violation.text
        assert tail.startswith(". ") and len(tail.split()) == 3 and attempt.by_construction


def test_benign_prefill_has_the_geometry_of_prefilling(tokenizer):
    rng = np.random.default_rng
    theirs = prefilling(WORLD, tokenizer, rng(2), 300, CONFIG)
    ours = benign_prefill(WORLD, tokenizer, rng(3), 300, CONFIG)
    assert np.mean([a.num_span for a in ours]) == pytest.approx(
        np.mean([a.num_span for a in theirs]), rel=0.15
    )
    for attempt in ours:
        assert parts(tokenizer, attempt)[1] == "Sure, here it is."
        assert not attempt.prompt.harmful


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_middle_filling_has_the_stated_share_of_long_prefixes(tokenizer, share):
    options = MiddleFillingOptions(long_share=share, max_sentences=2)
    attempts = middle_filling(
        WORLD, tokenizer, np.random.default_rng(0), 40, CONFIG, options=options
    )
    assert sum(len(a.prefix.split()) >= 20 for a in attempts) == 40 * share
    for attempt in attempts:
        prefix, bridge, span, tail = parts(tokenizer, attempt)
        assert prefix == attempt.prefix and prefix[-1] in ".!" and tail == ""
        assert bridge in ("", " By the way,", " Also,") and span == attempt.violation.text
        assert attempt.by_construction and attempt.violation.split == "rl"


def test_cut_middle_filling_stops_inside_the_violation(tokenizer):
    options = MiddleFillingOptions(cut=True)
    for attempt in middle_filling(
        WORLD, tokenizer, np.random.default_rng(0), 40, CONFIG, options=options
    ):
        span = parts(tokenizer, attempt)[2]
        assert attempt.violation.text.startswith(span) and span != attempt.violation.text
        assert len(span.split()) >= 2 and not attempt.by_construction


@pytest.mark.parametrize("aside_share", [0.0, 0.5, 1.0])
def test_benign_middle_continues_its_own_answer_or_remarks_something(tokenizer, aside_share):
    lowered = {s[0].lower() + s[1:] for s in SENTENCES}
    options, remarks = MiddleFillingOptions(aside_share=aside_share), 0
    for attempt in benign_middle(
        WORLD, tokenizer, np.random.default_rng(0), 40, CONFIG, options=options
    ):
        prefix, bridge, span, _ = parts(tokenizer, attempt)
        if span == " the tram is late":
            remarks += 1
            continue
        assert prefix == attempt.prefix and span.startswith(" ")
        known = lowered if bridge else set(SENTENCES)
        assert any(sentence.rstrip(".!") == span.strip() for sentence in known)
    assert {0.0: remarks == 0, 0.5: 8 < remarks < 32, 1.0: remarks == 40}[aside_share]


@pytest.mark.parametrize("harmful", [True, False])
def test_cuts_stop_inside_the_span_and_also_inside_words(tokenizer, harmful):
    name = "middle_cut" if harmful else "benign_cut"
    attempts = ATTACKS[name](WORLD, tokenizer, np.random.default_rng(1), 200, CONFIG)
    mid_word = 0
    for attempt in attempts:
        _, _, span, tail = parts(tokenizer, attempt)
        assert tail == "" and len(span.split()) >= 2 and not attempt.by_construction
        wholes = [attempt.violation.text] if harmful else None
        if harmful:
            assert wholes[0].startswith(span) and span != wholes[0]
            rest = wholes[0][len(span) :]
            mid_word += not rest.startswith(" ")
        else:
            assert not any(sentence[:-1] in span for sentence in SENTENCES)
    assert not harmful or mid_word > 20


@pytest.mark.parametrize("name", ["late_filling", "benign_late"])
def test_late_spans_are_followed_by_as_many_ids_as_asked(tokenizer, name):
    options = dataclasses.replace(ATTACKS[name].options, tails=(0, 3, 16))
    attempts = ATTACKS[name](
        WORLD, tokenizer, np.random.default_rng(1), 20, CONFIG, options=options
    )
    assert [dict(a.cell)["b"] for a in attempts] == [0, 3, 16] * 20
    for at in range(0, 60, 3):
        none, some, most = attempts[at : at + 3]
        assert [a.num_tail for a in (none, some, most)] == [0, 3, 16]
        for a in (some, most):
            assert a.request.forced[: len(none.request.forced)] == none.request.forced
            assert (a.prompt, a.violation) == (none.prompt, none.violation)
        _, _, span, tail = parts(tokenizer, most)
        assert tail.startswith(". ") and (name == "benign_late" or span == most.violation.text)
    with pytest.raises(ValueError, match="tails is"):
        dataclasses.replace(options, tails=(-1,))


def test_benign_many_has_a_remark_in_place_of_each_violation(tokenizer):
    rng = np.random.default_rng
    theirs = ATTACKS["many_violations"](WORLD, tokenizer, rng(1), 10, CONFIG)
    attempts = ATTACKS["benign_many"](WORLD, tokenizer, rng(1), 10, CONFIG)
    assert [dict(a.cell) for a in attempts] == [{"remarks": 2}, {"remarks": 4}] * 10
    for attempt, their in zip(attempts, theirs, strict=True):
        text = tokenizer.decode(attempt.request.forced)
        count = dict(attempt.cell)["remarks"]
        assert text.count(".") + text.count("!") >= 2 * count - 1
        assert their.violation is not None and attempt.violation is None


def test_strange_suffixes_are_pieces_of_the_vocabulary_that_can_be_typed(tokenizer):
    attempts = ATTACKS["strange_suffix"](WORLD, tokenizer, np.random.default_rng(1), 30, CONFIG)
    suffixes = [a.request.prompt[len(a.prompt.text) + 1 :] for a in attempts]
    assert len(set(suffixes)) == 30
    for attempt, suffix in zip(attempts, suffixes, strict=True):
        assert suffix.isascii() and suffix.isprintable() and len(suffix) >= 15
        ids = tokenizer.encode_prompt(attempt.request.prompt)
        rule = tokenizer.controls.rule()
        assert not any(rule.is_control(i) for i in ids)


def test_refusal_prefill_forces_a_refusal_of_a_harmless_prompt(tokenizer):
    for attempt in ATTACKS["refusal_prefill"](
        WORLD, tokenizer, np.random.default_rng(1), 9, CONFIG
    ):
        assert tokenizer.decode(attempt.request.forced) == WORLD.refusal(None, attempt.prompt)


def test_decoding_runs_every_setting(tokenizer):
    assert len(DecodingGrid.paper().settings(Knobs())) == 49
    grid = DecodingGrid((0.5, 1.0), (1,), (0.9,), samples=3)
    attempts = decoding(WORLD, tokenizer, np.random.default_rng(0), 5, CONFIG, options=grid)
    assert len(attempts) == 5 * 4 * 3
    knobs = [a.request.knobs for a in attempts[:12]]
    assert [k.temperature for k in knobs[::3]] == [0.5, 1.0, 1.0, 1.0]
    assert (knobs[6].top_k, knobs[9].top_p, knobs[9].max_tokens) == (1, 0.9, 250)
    with pytest.raises(ValueError, match="grid is empty"):
        decoding(
            WORLD, tokenizer, np.random.default_rng(0), 5, CONFIG, options=DecodingGrid((), (), ())
        )


def test_too_little_room_is_said(tokenizer):
    tight = dataclasses.replace(CONFIG, knobs=Knobs(max_tokens=20))
    for attack in (prefilling, deep_prefilling, middle_filling):
        with pytest.raises(ValueError, match="max_tokens"):
            attack(WORLD, tokenizer, np.random.default_rng(0), 4, tight)


pieces = st.lists(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=12), min_size=1, max_size=4
)


@settings(max_examples=150, deadline=None)
@given(pieces)
def test_encode_parts_counts_every_id_once(tokenizer, texts):
    ids, counts = encode_parts(tokenizer, *texts)
    assert ids == tokenizer.encode("".join(texts)) and sum(counts) == len(ids) and min(counts) >= 0
    # Where borders fall between ids, the counted ids spell exactly the parts.
    borders = np.cumsum([len(text) for text in texts])[:-1]
    offsets = tokenizer.offsets(ids)
    if not any(start < border < end for border in borders for start, end in offsets):
        cuts = np.cumsum([0, *counts])
        joined = [tokenizer.decode(ids[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
        assert joined == texts or any(offsets[i] == offsets[i - 1] for i in range(1, len(offsets)))


def test_sets_of_names_follow_the_list(monkeypatch):
    twins = {"benign_grid", "benign_cut", "benign_late", "benign_many"}
    benign = {"none", "benign_prefill", "benign_middle", "refusal_prefill", "strange_suffix"}
    assert BENIGN == benign | twins | {"trigger"}
    assert WHOLE == {"deep_prefilling", "middle_filling", "late_filling", "many_violations"}
    assert WORST_OF_N == {"decoding"} and "decoding" not in HAS_FORMS and 3 not in HAS_FORMS
    assert DRAWN - HAS_FORMS == (DRAWN & BENIGN) | {"direct", "decoding"}
    assert BENIGN - set(STANDARD) == twins | {"refusal_prefill", "strange_suffix", "trigger"}
    toy = dataclasses.replace(ATTACKS["none"], name="toy", benign=False, has_forms=True)
    before = len(HAS_FORMS)
    with monkeypatch.context() as patch:
        patch.setitem(ATTACKS, "toy", toy)
        assert "toy" in HAS_FORMS and len(HAS_FORMS) == before + 1 and "toy" not in BENIGN
    assert "toy" not in HAS_FORMS and len(HAS_FORMS) == before
    assert all(name == spec.name and spec.says for name, spec in ATTACKS.items())
