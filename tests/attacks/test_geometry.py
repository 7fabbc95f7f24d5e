"""Lengths of forced text in ids, and the attacks made of middle filling."""

import itertools

import numpy as np
import pytest

from rlbf_jax.attacks import STANDARD
from rlbf_jax.attacks.direct import AttackConfig
from rlbf_jax.attacks.forced.further import (
    NOTES,
    FurtherOptions,
    critic_note,
    many_violations,
    reprogram,
    respelled,
)
from rlbf_jax.attacks.forced.geometry import (
    GeometryGrid,
    benign_grid,
    middle_grid,
    prefilling_depth,
)
from rlbf_jax.attacks.forced.middle_filling import middle_filling
from rlbf_jax.sampling.request import Knobs
from tests.attacks.small_world import CONFIG, WORLD, parts

GRID = GeometryGrid(prefix=(0, 7, 40), span=(3, 30), tail=(0, 5), depths=(1, 5, 60))


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("attack", [middle_grid, benign_grid])
def test_every_cell_has_its_lengths_and_every_prompt(tokenizer, attack):
    attempts = attack(WORLD, tokenizer, rng(), 5, CONFIG, options=GRID)
    assert [dict(a.cell) for a in attempts[:12]] == [
        dict(p=p, v=v, b=b) for p, v, b in itertools.product((0, 7, 40), (3, 30), (0, 5))
    ]
    assert len(attempts) == 60
    for attempt in attempts:
        cell = dict(attempt.cell)
        assert (attempt.num_prefix, attempt.num_bridge) == (cell["p"], 0)
        assert (attempt.num_span, attempt.num_tail) == (cell["v"], cell["b"])
        prefix, _, span, tail = parts(tokenizer, attempt)
        assert attempt.prefix == prefix and (not tail or tail.startswith("."))
        if attack is benign_grid:
            # Cut inside words, so whole words alone tell where they come from.
            assert (
                span.replace(". the tram is late", "").strip(" .")
                in " the tram is late. the tram is late"
            )
        else:
            known = attempt.violation.text + "."
            assert known.startswith(span) if len(span) < len(known) else span.startswith(known)
            whole = len(tokenizer.encode(attempt.violation.text))
            assert attempt.by_construction == (cell["v"] >= whole)
    assert {a.by_construction for a in attempts} == (
        {False} if attack is benign_grid else {False, True}
    )


def test_without_a_prefix_it_is_prefilling_of_the_violation(tokenizer):
    grid = GeometryGrid(prefix=(0,), span=(4,), tail=(0,))
    for attempt in middle_grid(WORLD, tokenizer, rng(), 10, CONFIG, options=grid):
        assert list(attempt.request.forced) == tokenizer.encode(attempt.violation.text)[:4]


def test_prefilling_depth_slices_ids(tokenizer):
    attempts = prefilling_depth(WORLD, tokenizer, rng(), 4, CONFIG, options=GRID)
    opener = tokenizer.encode("Sure, here it is.")
    for attempt in attempts:
        k, ids = dict(attempt.cell)["k"], list(attempt.request.forced)
        answer = opener + tokenizer.encode(attempt.violation.text + ".")
        assert len(ids) == k and ids[: len(answer)] == answer[:k]
        assert attempt.num_bridge == min(k, len(opener))
        assert attempt.by_construction == (k == 60)


@pytest.mark.parametrize(
    "fields, message",
    [(dict(span=(0,)), "expected lengths of 1 or more"), (dict(tail=()), "tail is empty")],
)
def test_a_grid_that_cannot_be_says_so(fields, message):
    with pytest.raises(ValueError, match=message):
        GeometryGrid(**fields)


def test_too_little_room_is_told(tokenizer):
    small = AttackConfig(knobs=Knobs(max_tokens=60))
    with pytest.raises(
        ValueError, match=r"\(p, v, b\) = \(40, 3, 5\).*raise knobs.max_tokens to 64"
    ):
        middle_grid(
            WORLD,
            tokenizer,
            rng(),
            1,
            small,
            options=GeometryGrid(prefix=(40,), span=(3,), tail=(5,)),
        )


def test_many_violations_counts_them(tokenizer):
    options = FurtherOptions(violations=(1, 3))
    for attempt in many_violations(WORLD, tokenizer, rng(), 6, CONFIG, options=options):
        count = dict(attempt.cell)["violations"]
        text = tokenizer.decode(attempt.request.forced)
        assert sum(text.count(start) for start in (" you are a soggy", " otto sleeps")) == count
        prefix, between, span, _ = parts(tokenizer, attempt)
        assert text.endswith(attempt.violation.text) and span == attempt.violation.text
        # Only the first sentence is benign words that should be kept.
        assert prefix == attempt.prefix and not any(
            start in prefix for start in (" you are a soggy", " otto sleeps")
        )
        assert bool(between) == (count > 1)


def test_respelling_changes_ids_and_not_the_text(tokenizer):
    ours, theirs = (f(WORLD, tokenizer, rng(), 8, CONFIG, **o) for f, o in pair())
    for mine, other in zip(ours, theirs, strict=True):
        assert tokenizer.decode(mine.request.forced) == tokenizer.decode(other.request.forced)
        assert mine.num_span > other.num_span and mine.prompt == other.prompt
        assert mine.request.forced[: mine.num_prefix] == other.request.forced[: other.num_prefix]


def pair():
    options = FurtherOptions()
    return ((respelled, dict(options=options)), (middle_filling, dict(options=options.middle)))


def test_reprogramming_spells_directives_that_are_not_control_ids(tokenizer):
    spelled = set()
    for attempt in reprogram(WORLD, tokenizer, rng(), 8, CONFIG):
        text = attempt.request.prompt.removesuffix(attempt.prompt.text)
        assert any(name in text for name in tokenizer.controls.rule().names())
        assert not any(
            tokenizer.controls.rule().is_control(i)
            for i in tokenizer.encode_prompt(attempt.request.prompt)
        )
        spelled.add(next(name for name in tokenizer.controls.rule().names() if name in text))
    assert len(spelled) > 4


def test_notes_stand_behind_the_violation(tokenizer):
    notes = [parts(tokenizer, a)[3] for a in critic_note(WORLD, tokenizer, rng(), 6, CONFIG)]
    assert notes == [*NOTES, *NOTES]


def test_the_default_suite_is_what_it_was():
    assert STANDARD == (
        "none", "direct", "prefilling", "deep_prefilling", "benign_prefill", "middle_filling",
        "benign_middle", "decoding",
    )  # fmt: skip
