"""The edit algebra against a replay that keeps plain lists of ids, one emission after the other."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlbf_jax.directives import (
    NEVER,
    BacktrackRule,
    EditRule,
    EditState,
    Legal,
    Limits,
    ReplaceRule,
    ResetRule,
    Semantics,
    layout,
    render,
)

KEEP, REWIND = Semantics.KEEP, Semantics.REWIND
ROWS, TIME, VOCAB = 3, 24, 11
ALL = 10**6
"""Amount of a reset: more than any row has."""
COPIED = -1
"""Stands for the amount of a replacement: as many ids as were copied since the flag."""

BACKTRACK = BacktrackRule(4, ("a", "b"), (0, 10, 99), x_max=3)
RESET = ResetRule(4, (), (0,))
REPLACE = ReplaceRule(4, ("a", "b"), (0, 10))
# What every control id means, by hand; all other ids are content.
RULES: dict[EditRule, dict[int, Any]] = {
    BACKTRACK: {4: "a", 5: "b", 6: 1, 7: 2, 8: 3},
    BacktrackRule(4, (), (0,), x_max=2): {4: 1, 5: 2},
    RESET: {4: ALL},
    ResetRule(4, ("a",), ()): {4: "a", 5: ALL},
    REPLACE: {4: "a", 5: "b", 6: COPIED},
}
EVERY_RULE = pytest.mark.parametrize(
    "rule", RULES, ids=["backtrack", "no categories", "reset", "named reset", "replace"]
)
BOTH = pytest.mark.parametrize("semantics", [KEEP, REWIND])


@dataclasses.dataclass
class Replay:
    """What a response did, written down while it was read id by id;
    times count from the start of the segment."""

    position: list[int] = dataclasses.field(default_factory=list)
    sees: list[list[int]] = dataclasses.field(default_factory=list)
    died: dict[int, int] = dataclasses.field(default_factory=dict)
    erased: dict[int, int] = dataclasses.field(default_factory=dict)
    before: list[tuple] = dataclasses.field(default_factory=list)
    shown: list[int] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(EditState._fields, 0)
    )


def replay(rule, prompt, response, semantics) -> Replay:
    """The twin: `alive` and `shown` are explicit lists of the times whose ids are still there, and
    `open` holds a flag or category that waits for its retraction, with what was copied since."""
    meaning, out, zero = RULES[rule], Replay(), (0,) * len(EditState._fields)
    copies = COPIED in meaning.values()
    alive: list[int] = []
    opened: list[int] = []
    for time in range(len(prompt)):
        out.position.append(len(alive))
        alive.append(time)
        out.sees.append(list(alive))
        out.before.append(zero)
    for time, token in enumerate(response, len(prompt)):
        said = meaning.get(token)
        out.before.append(tuple(out.counts[name] for name in EditState._fields))
        out.counts["emitted"] += 1
        retracts, copied = isinstance(said, int), copies and bool(opened) and said is None
        if opened and not retracts and not copied:
            out.counts["malformed"] += 1
            # What was copied goes when the flag goes; a category lives for itself only.
            for j in opened:
                out.died[j] = time
                if semantics is REWIND:
                    alive.remove(j)
            opened = []
        out.position.append(len(alive))
        alive.append(time)
        out.sees.append(list(alive))
        if copied:
            opened.append(time)
        elif said is None:
            out.shown.append(time)
        elif retracts:
            _retract(rule, out, alive, time, opened, said, semantics)
            opened = []
        else:
            out.counts["directives"] += 1
            opened = [time]
        out.counts["pending"] = int(bool(opened))
        out.counts["copied"] = max(0, len(opened) - 1)
        out.counts["visible"] = len(out.shown)
    if not copies:
        # No id that may come lets a category live on, save one that is not there.
        out.died |= {j: len(prompt) + len(response) for j in opened}
    return out


def _retract(rule, out, alive, time, opened, amount, semantics) -> None:
    out.counts["retractions"] += 1
    if not opened:
        out.counts["directives"] += 1
        out.counts["uncategorized"] += bool(rule.categories)
    amount = len(opened[1:]) if amount == COPIED else amount
    out.counts["clamped"] += len(out.shown) < amount < ALL
    dying = [*opened, time]
    for _ in range(amount):
        if not out.shown:
            break
        gone = out.shown.pop()
        out.erased[gone] = time + 1
        out.counts["retracted"] += 1
        dying.append(gone)
    for j in dying:
        out.died[j] = time + 1
        if semantics is REWIND:
            alive.remove(j)


LAYOUT = jax.jit(layout, static_argnums=(0, 4))
STEP = jax.jit(lambda rule, state, token: rule.step(state, token), static_argnums=0)
LEGAL = jax.jit(lambda rule, state, limits: rule.legal(state, limits), static_argnums=0)
LEGAL_IDS = jax.jit(lambda rule, legal: rule.legal_ids(legal, VOCAB), static_argnums=0)

IDS = st.integers(0, VOCAB - 1)
SEGMENT = st.tuples(st.lists(IDS, max_size=3), st.lists(IDS, min_size=1, max_size=14))
PACKED_ROWS = st.lists(st.lists(SEGMENT, min_size=1, max_size=3), min_size=ROWS, max_size=ROWS)


def pack(rows, width=TIME):
    """Arrays of packed rows and, for each row, the segments that fit with their starts."""
    tokens, segment = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.int32)
    responding, placed = np.zeros((len(rows), width), bool), []
    for row, segments in enumerate(rows):
        at = 0
        kept: list[tuple] = []
        for prompt, response in segments:
            end = at + len(prompt) + len(response)
            if end > width:
                break
            tokens[row, at:end] = [*prompt, *response]
            segment[row, at:end] = len(kept) + 1
            responding[row, at + len(prompt) : end] = True
            kept.append((at, prompt, response))
            at = end
        placed.append(kept)
    return tokens, segment, responding, placed


def column(table: dict[int, int], start: int, length: int) -> list[int]:
    return [start + table[t] if t in table else NEVER for t in range(length)]


@EVERY_RULE
@BOTH
@given(PACKED_ROWS)
@example(
    [
        [([2], [1, 2, 3, 4, 2, 3, 6, 9, 5, 1, 4, 1, 1, 1, 1, 1, 6, 2])],
        [([6], [6, 1, 4, 6, 2, 5]), ([5], [4, 1])],
        [([], [1, 4, 1, 5, 2, 6, 3, 4, 3, 6])],
    ]
)
@example(
    [
        [([1], [1, 2, 4, 8, 3, 5, 6, 4, 6, 7, 2])],
        [([], [4]), ([], [6, 4]), ([4], [6])],
        [([4, 8], [1, 1, 4, 5, 6])],
    ]
)
def test_layout_of_packed_rows_equals_a_replay_of_every_example_alone(rule, semantics, rows):
    tokens, segment, responding, placed = pack(rows)
    where = jax.tree.map(np.asarray, LAYOUT(rule, tokens, segment, responding, semantics))
    for row, segments in enumerate(placed):
        for start, prompt, response in segments:
            twin = replay(rule, prompt, response, semantics)
            length = len(prompt) + len(response)
            here = (row, slice(start, start + length))
            assert where.position[here].tolist() == twin.position
            assert where.erased[here].tolist() == column(twin.erased, start, length)
            died = column(twin.died, start, length) if semantics is REWIND else [NEVER] * length
            assert where.died[here].tolist() == died
            before = np.stack([np.asarray(x[here], np.int32) for x in where.before], 1)
            assert [tuple(x) for x in before.tolist()] == twin.before
            # Lifetimes say who sees whom, and a position is the number of live ids before it.
            for i, seen in enumerate(twin.sees):
                assert [j for j in range(i + 1) if i + start < died[j]] == seen
                assert twin.position[i] == len(seen) - 1
            assert [int(tokens[row, start + t]) for t in twin.shown] == list(
                render(rule, response).visible
            )
            kinds = render(rule, response).kinds
            stays = [
                t
                for t in range(len(prompt), length)
                if where.erased[row, start + t] == NEVER and kinds[t - len(prompt)] == "content"
            ]
            assert stays == twin.shown


@EVERY_RULE
@BOTH
@given(PACKED_ROWS)
def test_a_batch_is_its_rows(rule, semantics, rows):
    tokens, segment, responding, _ = pack(rows)
    whole = LAYOUT(rule, tokens, segment, responding, semantics)
    for row in range(ROWS):
        one = slice(row, row + 1)
        alone = LAYOUT(rule, tokens[one], segment[one], responding[one], semantics)
        jax.tree.map(lambda w, a, one=one: np.testing.assert_array_equal(w[one], a), whole, alone)


@EVERY_RULE
@given(st.lists(IDS, max_size=TIME))
def test_step_and_offset_equal_the_replay(rule, response):
    state = rule.initial((1,))
    twins = {semantics: replay(rule, [], response, semantics) for semantics in (KEEP, REWIND)}
    for time, token in enumerate(response):
        assert (
            tuple(int(x[0]) for x in state)
            == twins[REWIND].before[time]
            == twins[KEEP].before[time]
        )
        for semantics, twin in twins.items():
            assert int(rule.offset(state, np.asarray([token]), semantics)[0]) == twin.position[time]
        state = STEP(rule, state, jnp.asarray([token], jnp.int32))
    assert {name: int(x[0]) for name, x in state._asdict().items()} == twins[REWIND].counts


@EVERY_RULE
@given(st.lists(IDS, max_size=TIME))
@example([1, 2, 4, 2, 6, 4, 1, 5, 1, 6, 6, 2, 4, 1])
def test_render_equals_the_replay(rule, response):
    twin, rendered = replay(rule, [], response, KEEP), render(rule, response)
    assert list(rendered.visible) == [response[t] for t in twin.shown]
    assert list(rendered.visible_items) == twin.shown
    assert len(rendered.edits) == twin.counts["retractions"]
    assert sum(len(e.removed) for e in rendered.edits) == twin.counts["retracted"]
    assert sum(e.clamped for e in rendered.edits) == twin.counts["clamped"]
    # The output handler also counts a category at the very end, which no emission has dropped yet.
    assert rendered.malformed == twin.counts["malformed"] + twin.counts["pending"]
    assert {
        j: rendered.edits[k].index + 1 for j, k in enumerate(rendered.erased_by) if k is not None
    } == twin.erased
    meaning = RULES[rule]
    for edit in rendered.edits:
        earlier = replay(rule, [], response[: edit.index], KEEP)
        assert list(edit.before) == [response[t] for t in earlier.shown]
        assert list(edit.before_items) == earlier.shown
        assert edit.removed_items == tuple(
            j for j, t in sorted(twin.erased.items()) if t == edit.index + 1
        )
        waits, copied = earlier.counts["pending"], earlier.counts["copied"]
        assert edit.start == edit.index - waits * (1 + copied)
        assert edit.category == (meaning[response[edit.start]] if waits else None)
        amount = meaning[response[edit.index]]
        assert edit.requested == {ALL: NEVER, COPIED: copied}.get(amount, amount)


@EVERY_RULE
@given(st.lists(IDS, max_size=TIME))
def test_kinds_of_a_rendered_trace(rule, response):
    state = rule.initial(())
    for token, kind in zip(response, render(rule, response).kinds, strict=True):
        said = RULES[rule].get(token)
        copied = rule is REPLACE and bool(state.pending) and said is None
        expected = (
            "category" if isinstance(said, str) else "content" if said is None else "retraction"
        )
        assert kind == ("copy" if copied else expected)
        state = STEP(rule, state, jnp.asarray(token, jnp.int32))


@pytest.mark.parametrize(
    ("response", "position", "died", "erased", "visible"),
    [
        # A directive takes back two of three; the id after it stands where the second stood.
        ([1, 2, 3, 4, 7, 9], [2, 3, 4, 5, 6, 3], [0, 5, 5, 5, 5, 0], [0, 5, 5, 0, 0, 0], [1, 9]),
        # X beyond the text clamps, and the prompt is a floor.
        ([1, 4, 8, 2], [2, 3, 4, 2], [3, 3, 3, 0], [3, 0, 0, 0], [2]),
        # Two directives in a row.
        (
            [1, 2, 4, 6, 5, 6, 3],
            [2, 3, 4, 5, 3, 4, 2],
            [6, 4, 4, 4, 6, 6, 0],
            [6, 4, 0, 0, 0, 0, 0],
            [3],
        ),
        # A lone category is dropped at the next emission; a bare retraction retracts all the same.
        ([1, 4, 2, 6], [2, 3, 3, 4], [0, 2, 4, 4], [0, 0, 4, 0], [1]),
        # A category at the very end; a category announced twice.
        ([4, 5, 6, 4], [2, 2, 3, 2], [1, 3, 3, 4], [0, 0, 0, 0], []),
    ],
)
def test_by_hand(response, position, died, erased, visible):
    tokens, segment, responding, _ = pack([[([1, 1], response)]])
    here = slice(2, 2 + len(response))
    where = LAYOUT(BACKTRACK, tokens, segment, responding, REWIND)
    # 0 stands for "stays"; times above count from the start of the response.
    assert where.position[0, here].tolist() == position
    assert where.died[0, here].tolist() == [d + 2 if d else NEVER for d in died]
    assert where.erased[0, here].tolist() == [e + 2 if e else NEVER for e in erased]
    assert list(render(BACKTRACK, response).visible) == visible
    kept = LAYOUT(BACKTRACK, tokens, segment, responding, KEEP)
    assert kept.position[0, here].tolist() == list(range(2, 2 + len(response)))
    assert set(kept.died[0].tolist()) == {NEVER}
    np.testing.assert_array_equal(kept.erased, where.erased)


@pytest.mark.parametrize(
    ("response", "position", "died", "erased", "visible"),
    [
        # Two of three are copied and replaced: all of the directive and both words are gone.
        (
            [1, 2, 3, 4, 9, 9, 6, 7],
            [2, 3, 4, 5, 6, 7, 8, 3],
            [0, 7, 7, 7, 7, 7, 7, 0],
            [0, 7, 7, 0, 0, 0, 0, 0],
            [1, 7],
        ),
        # More is copied than is visible, and the prompt is a floor.
        (
            [1, 4, 9, 9, 6, 7],
            [2, 3, 4, 5, 6, 2],
            [5, 5, 5, 5, 5, 0],
            [5, 0, 0, 0, 0, 0],
            [7],
        ),
        # A flag drops the open one with its copy: the new one stands where that stood.
        (
            [1, 4, 9, 9, 5, 9, 6, 7],
            [2, 3, 4, 5, 3, 4, 5, 2],
            [7, 4, 4, 4, 7, 7, 7, 0],
            [7, 0, 0, 0, 0, 0, 0, 0],
            [7],
        ),
        # Without a flag, or with nothing copied, nothing is removed.
        ([1, 6, 4, 6, 7], [2, 3, 3, 4, 3], [0, 2, 4, 4, 0], [0] * 5, [1, 7]),
        # A copy that is never closed stays invisible and alive.
        ([1, 4, 9, 9], [2, 3, 4, 5], [0] * 4, [0] * 4, [1]),
    ],
)
def test_replacements_by_hand(response, position, died, erased, visible):
    tokens, segment, responding, _ = pack([[([1, 1], response)]])
    here = slice(2, 2 + len(response))
    where = LAYOUT(REPLACE, tokens, segment, responding, REWIND)
    assert where.position[0, here].tolist() == position
    assert where.died[0, here].tolist() == [d + 2 if d else NEVER for d in died]
    assert where.erased[0, here].tolist() == [e + 2 if e else NEVER for e in erased]
    assert list(render(REPLACE, response).visible) == visible


def test_edits_by_hand():
    edits = render(BACKTRACK, [1, 2, 4, 6, 5, 8, 3, 7]).edits
    assert [(e.index, e.category, e.requested, e.before, e.removed, e.clamped) for e in edits] == [
        (3, "a", 1, (1, 2), (2,), False),
        (5, "b", 3, (1,), (1,), True),
        (7, None, 2, (3,), (3,), True),
    ]
    edits = render(REPLACE, [1, 2, 3, 4, 2, 3, 6, 7, 6, 5, 1, 1, 1, 6]).edits
    assert [(e.index, e.start, e.category, e.requested, e.removed, e.clamped) for e in edits] == [
        (6, 3, "a", 2, (2, 3), False),
        (8, 8, None, 0, (), False),
        (13, 9, "b", 3, (1, 7), True),
    ]
    (reset,) = render(RESET, [1, 2, 4, 3]).edits
    assert (reset.removed, reset.requested, reset.clamped) == ((1, 2), NEVER, False)


# Legality ---------------------------------------------------------------------------------------

LIMITS = st.tuples(
    st.integers(0, 12), st.integers(0, 3), st.integers(0, 12), st.integers(0, 12), st.booleans()
)


def limits_of(max_emitted, budget, forbid_from, forbid_to, grammar, rows=1) -> Limits:
    a, b, c, d = (
        jnp.full(rows, x, jnp.int32) for x in (max_emitted, budget, forbid_from, forbid_to)
    )
    return Limits(a, b, c, d, jnp.full(rows, grammar))


def may_follow(rule, token, counts, limits) -> bool:
    """The twin of legality, asked of one id at a time."""
    max_emitted, budget, forbid_from, forbid_to, grammar = limits
    said = RULES[rule].get(token)
    if token in rule.never:
        return False
    left = max_emitted - counts["emitted"]
    if rule is REPLACE and counts["pending"] and grammar:
        if said is None:
            return left > 2
        return said == COPIED and (counts["copied"] > 0 or left <= 2)
    if counts["pending"] and isinstance(said, int):
        return True
    if counts["pending"] and grammar:
        return False
    if said is None:
        return True
    if counts["directives"] >= budget or forbid_from <= counts["emitted"] < forbid_to:
        return False
    if isinstance(said, str):
        return left >= (4 if rule is REPLACE else 3)
    return left >= 2 and not (grammar and rule.categories)


@EVERY_RULE
def test_legal_ids_equal_a_loop_over_ids_in_every_state(rule):
    windows = [(NEVER, NEVER), (0, NEVER), (1, 3)]
    grid = list(
        itertools.product(
            range(7), (0, 1, 2), range(3), range(3, 7), range(3), windows, (False, True)
        )
    )
    # 0: nothing is open; 1: a category or flag; 2: a flag with one id copied.
    emitted, opened, directives, max_emitted, budget, window, grammar = zip(*grid, strict=True)
    state = rule.initial((len(grid),))._replace(
        emitted=jnp.asarray(emitted),
        pending=jnp.asarray(opened) > 0,
        copied=jnp.maximum(jnp.asarray(opened) - 1, 0),
        directives=jnp.asarray(directives),
    )
    forbid_from, forbid_to = jnp.asarray(window).T
    limits = Limits(
        jnp.asarray(max_emitted), jnp.asarray(budget), forbid_from, forbid_to, jnp.asarray(grammar)
    )
    ids = np.asarray(LEGAL_IDS(rule, LEGAL(rule, state, limits)))
    for got, (some, waits, used, most, allowed, (low, high), strict) in zip(ids, grid, strict=True):
        counts = dict(emitted=some, pending=waits > 0, copied=max(0, waits - 1), directives=used)
        limits = (most, allowed, low, high, strict)
        expected = [may_follow(rule, token, counts, limits) for token in range(VOCAB)]
        assert got.tolist() == expected, (counts, limits)


@EVERY_RULE
@given(st.lists(IDS, min_size=12, max_size=12), LIMITS)
@example([1, 4] + [1] * 10, (9, 3, 12, 12, True))
@example([4, 6, 5] * 4, (12, 3, 12, 12, True))
def test_legal_responses_keep_their_limits(rule, wishes, limits):
    """A walk that takes the wished id where it is legal and else the next legal one."""
    state, trace = rule.initial((1,)), []
    for wish in wishes[: limits[0]]:
        ids = np.asarray(LEGAL_IDS(rule, LEGAL(rule, state, limits_of(*limits))))[0]
        assert ids.any()
        token = next(i % VOCAB for i in range(wish, wish + VOCAB) if ids[i % VOCAB])
        state = STEP(rule, state, jnp.asarray([token], jnp.int32))
        trace.append(token)
    counts = replay(rule, [], trace, KEEP).counts
    assert counts["directives"] <= limits[1]
    assert not set(trace) & set(rule.never)
    if limits[4]:
        assert counts["malformed"] == counts["uncategorized"] == 0
    if len(trace) == limits[0]:
        # Room for the retraction and one id more, so a whole response never ends in a directive
        # that grammar closed, nor inside a copy.
        assert not (limits[4] and trace and trace[-1] in RULES[rule])
        assert not (limits[4] and counts["pending"])
    for time, token in enumerate(trace):
        waits = replay(rule, [], trace[:time], KEEP).counts["pending"]
        starts = isinstance(RULES[rule].get(token), str) or (token in RULES[rule] and not waits)
        assert not (starts and limits[2] <= time < limits[3])


@EVERY_RULE
@given(st.lists(IDS, min_size=14, max_size=14), st.integers(0, 14), LIMITS)
@example([1] * 7 + [4] * 7, 8, (9, 3, 12, 12, True))
@example([1] * 7 + [4] * 7, 8, (10, 0, 0, NEVER, True))
def test_no_forced_beginning_leaves_nothing_legal(rule, response, forced, limits):
    """Anything may be forced; from there on some id is legal as long as there is room."""
    state = rule.initial((1,))
    for token in response[:forced]:
        state = STEP(rule, state, jnp.asarray([token], jnp.int32))
    for wish in response[forced : limits[0]]:
        ids = np.asarray(LEGAL_IDS(rule, LEGAL(rule, state, limits_of(*limits))))[0]
        assert ids.any()
        token = next(i % VOCAB for i in range(wish, wish + VOCAB) if ids[i % VOCAB])
        state = STEP(rule, state, jnp.asarray([token], jnp.int32))


@pytest.mark.parametrize(("emitted", "legal"), [(7, True), (8, False), (9, False)])
def test_room_is_three_ids_for_a_category_and_two_for_a_bare_retraction(emitted, legal):
    state = BACKTRACK.initial((1,))._replace(emitted=jnp.asarray([emitted], jnp.int32))
    assert bool(BACKTRACK.legal(state, limits_of(10, 1, NEVER, NEVER, True)).category[0]) == legal
    free = BACKTRACK.legal(state, limits_of(10, 1, NEVER, NEVER, False))
    assert (bool(free.category[0]), bool(free.retraction[0])) == (legal, emitted <= 8)
    assert bool(RESET.legal(state, limits_of(10, 1, NEVER, NEVER, True)).retraction[0]) == (
        emitted <= 8
    )


@pytest.mark.parametrize(
    ("tokens", "left", "legal"),
    [
        ([], 4, "content category"),
        ([], 3, "content"),
        # A copy before anything else, even where there is little room.
        ([4], 3, "content"),
        ([4, 1], 3, "content retraction"),
        ([4, 1], 2, "retraction"),
        ([4, 1], 1, "retraction"),
        # Forced where nothing fits any more.
        ([4], 2, "retraction"),
        ([4, 1, 6], 4, "content category"),
    ],
)
def test_grammar_of_a_replacement(tokens, left, legal):
    state = REPLACE.initial((1,))
    for token in tokens:
        state = REPLACE.step(state, jnp.asarray([token], jnp.int32))
    kinds = REPLACE.legal(state, limits_of(len(tokens) + left, 9, NEVER, NEVER, True))
    assert [name for name, may in kinds._asdict().items() if bool(may[0])] == legal.split()
    free = REPLACE.legal(state, limits_of(len(tokens) + left, 9, NEVER, NEVER, False))
    pending = bool(state.pending[0])
    assert [bool(x[0]) for x in free] == [True, left >= 4, left >= 2 or pending]


def test_what_a_row_may_take_back():
    assert [rule.rewound(4, 64) for rule in (BACKTRACK, RESET, REPLACE)] == [20, 264, 64]


@EVERY_RULE
@given(st.lists(IDS, max_size=TIME))
def test_no_row_takes_back_more_than_it_says(rule, response):
    """The way down from the highest position so far to any later one, as a ring has to bear it."""
    twin = replay(rule, [], response, REWIND)
    state = rule.initial(())
    top, down = 0, 0
    for position in twin.position:
        top = max(top, position)
        down = max(down, top - position)
    for token in response:
        state = STEP(rule, state, jnp.asarray(token, jnp.int32))
    assert down <= rule.rewound(int(state.directives), len(response))


@pytest.mark.parametrize("grammar", [True, False])
def test_the_closing_retraction_is_always_legal(grammar):
    state = BACKTRACK.step(BACKTRACK.initial((1,)), jnp.asarray([4]))
    legal = BACKTRACK.legal(state, limits_of(1, 0, 0, NEVER, grammar))
    assert [bool(x[0]) for x in legal] == [not grammar, False, True]


@pytest.mark.parametrize(
    ("window", "legal"),
    [((0, NEVER), []), ((2, NEVER), [0, 1]), ((1, 3), [0, 3, 4]), ((9, 9), None)],
)
def test_forbidden_windows(window, legal):
    emitted = jnp.arange(5)
    state = BACKTRACK.initial((5,))._replace(emitted=emitted)
    may = BACKTRACK.legal(state, limits_of(40, 1, *window, True, rows=5)).category
    assert np.flatnonzero(may).tolist() == (list(range(5)) if legal is None else legal)


# Vocabulary -------------------------------------------------------------------------------------


@EVERY_RULE
def test_names_and_kinds(rule):
    for token in range(VOCAB):
        said = RULES[rule].get(token)
        kinds = [
            bool(is_kind(token))
            for is_kind in (rule.is_category, rule.is_retraction, rule.is_control)
        ]
        assert kinds == [isinstance(said, str), isinstance(said, int), said is not None]
    opener = "FLAG" if rule is REPLACE else "CATEGORY"
    closers = {ALL: "[RESET]", COPIED: "[REPLACE]"}
    expected = [
        f"[{opener}_{s.upper()}]" if isinstance(s, str) else closers.get(s, f"[BACKTRACK_BY_{s}]")
        for s in RULES[rule].values()
    ]
    assert rule.names() == expected
    assert hash(rule) == hash(dataclasses.replace(rule))


def test_ids_by_name():
    assert [BACKTRACK.backtrack_id(x) for x in (1, 2, 3)] == [6, 7, 8]
    assert [BACKTRACK.category_id(c) for c in "ab"] == [4, 5]
    for x in (0, 4):
        with pytest.raises(ValueError, match=rf"X = {x} is outside 1\.\.3"):
            BACKTRACK.backtrack_id(x)
    with pytest.raises(KeyError, match="unknown category 'c'; this rule has a, b"):
        BACKTRACK.category_id("c")


def test_a_replacement_needs_a_flag():
    with pytest.raises(ValueError, match="needs at least one category"):
        ReplaceRule(4)


def test_never_ids_beyond_the_vocabulary_are_ignored():
    legal = Legal(*(jnp.ones((), bool),) * 3)
    assert np.flatnonzero(~np.asarray(BACKTRACK.legal_ids(legal, VOCAB))).tolist() == [0, 10]


@pytest.mark.parametrize("rule", [BACKTRACK, RESET, REPLACE])
def test_rows_of_a_model_beyond_the_vocabulary_are_never_legal(rule):
    legal = Legal(*(jnp.ones((), bool),) * 3)
    without = np.asarray(rule.legal_ids(legal, 9 + 5))
    bounded = np.asarray(rule.within(9).legal_ids(legal, 9 + 5))
    assert without[11:].all() and not bounded[9:].any()
    assert bounded[:9].tolist() == without[:9].tolist()
