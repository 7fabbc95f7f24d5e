"""Continuous batching: rows that enter as others end, contexts that are read once, few programs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbf_jax.directives import Semantics
from rlbf_jax.errors import InputError
from rlbf_jax.models import kv_cache
from rlbf_jax.sampling import loop, prefill
from rlbf_jax.sampling.batching import (
    IDLE,
    Group,
    Row,
    SamplerConfig,
    batch_of,
    context_width,
    contexts_of,
    lanes,
    next_groups,
    shape_of,
)
from rlbf_jax.sampling.program import Single
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.sampler import Sampler
from rlbf_jax.sampling.scoring import pack_traces, score
from tests.fakes import LetterTokenizer, random_model

TOKENIZER = LetterTokenizer()
RULE = TOKENIZER.controls.rule()
MODEL, PARAMS = random_model(TOKENIZER)
SHAPES = SamplerConfig(Semantics.REWIND, batch_size=4, min_context=32, min_room=32)
KNOBS = Knobs(max_tokens=24, budget=4, control_bias={"categories": 2.0})
CATEGORY, BACK_2 = RULE.category_id("two"), RULE.backtrack_id(2)
FORCED = (
    (),
    tuple(TOKENIZER.encode("sure x")),
    (*TOKENIZER.encode("bad"), CATEGORY, BACK_2),
    # An open directive, and an answer that is over.
    (*TOKENIZER.encode("bad"), CATEGORY),
    (*TOKENIZER.encode("hi"), TOKENIZER.eos_id),
)
CONTEXTS = [(prompt, forced) for prompt in ("a", "tell me") for forced in FORCED]
SETTINGS = [
    KNOBS,
    dataclasses.replace(KNOBS, top_k=7),
    dataclasses.replace(KNOBS, top_p=0.7, temperature=1.3),
    dataclasses.replace(KNOBS, temperature=0.0, budget=1),
    dataclasses.replace(KNOBS, top_p=0.5, top_k=12, max_tokens=9),
    dataclasses.replace(KNOBS, stop_ids=(), grammar=False),
    dataclasses.replace(KNOBS, min_p=0.1, stop_ids=tuple(TOKENIZER.encode("e "))),
]
REQUESTS = [
    Request(*context, knobs, 3 * number)
    for number, (context, knobs) in enumerate(itertools.product(CONTEXTS, SETTINGS))
]


WINDOWED = random_model(TOKENIZER, windows=(6, None))
MODELS = {"global": (MODEL, PARAMS), "windowed": WINDOWED}


def sampler(model=MODEL, **changes):
    return Sampler(model, TOKENIZER, dataclasses.replace(SHAPES, **changes))


def assert_same(generations, others, tolerance=0.0):
    assert len(generations) == len(others)
    for one, other in zip(generations, others, strict=True):
        np.testing.assert_array_equal(one.trace, other.trace)
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=tolerance)
        assert dataclasses.replace(
            one, trace=None, logprobs=None, prompt_ids=None
        ) == dataclasses.replace(other, trace=None, logprobs=None, prompt_ids=None)
        np.testing.assert_array_equal(one.prompt_ids, other.prompt_ids)


# Independence -------------------------------------------------------------------------------------


@functools.cache
def alone(name, semantics):
    """Every request by itself: nothing ever enters beside it."""
    model, params = MODELS[name]
    one = sampler(model, semantics=semantics)
    return [one(params, [request], 0)[0] for request in REQUESTS]


@pytest.mark.parametrize("semantics", list(Semantics))
@pytest.mark.parametrize("name", list(MODELS))
def test_rows_that_enter_as_others_end_are_bit_equal_to_rows_alone(name, semantics):
    """56 requests through 4 rows, contexts with directives among them."""
    model, params = MODELS[name]
    expected = alone(name, semantics)
    assert_same(sampler(model, semantics=semantics)(params, REQUESTS, 0), expected)
    assert sum(len(g.edits) for g in expected) > 30 and sum(g.finished for g in expected) > 10
    assert len({tuple(g.trace) for g in expected}) > 40


@given(st.permutations(range(len(REQUESTS))), st.integers(0, 30), st.sampled_from([1, 2, 4]))
@settings(max_examples=12, deadline=None)
def test_a_row_is_bit_equal_in_whatever_order_and_company(order, count, at_once):
    """How many rows are awaited changes who enters when; only how many contexts are read in a pass
    is a shape."""
    order = order[:count]
    some = sampler(contexts_at_once=at_once)(PARAMS, [REQUESTS[i] for i in order], 0)
    expected = alone("global", Semantics.REWIND)
    assert_same(some, [expected[i] for i in order], 0.0 if at_once == 1 else 1e-4)


@pytest.mark.parametrize("semantics", list(Semantics))
@pytest.mark.parametrize("name", list(MODELS))
def test_contexts_may_be_read_in_more_columns_than_a_row_has_room_for(name, semantics):
    """Widths are few, so that programs are; a row has no more room than its ids need."""
    model, params = MODELS[name]
    requests = [
        Request(
            "",
            tuple(TOKENIZER.encode("abcdefghij" * 3))[:forced],
            dataclasses.replace(KNOBS, max_tokens=30, stop_ids=()),
            place,
            tuple(TOKENIZER.encode("lmnopqrstu" * 10))[:prompt],
        )
        for place, (prompt, forced) in enumerate([(8, 3), (8, 29), (20, 28), (1, 29)])
    ]
    narrow = sampler(model, semantics=semantics, min_context=20, min_room=30)
    rows = narrow._rows(requests)
    assert {shape_of(r, narrow.config, narrow.program, RULE).capacity for r in rows} == {50}
    assert {context_width(len(r.context), narrow.config, narrow.program) for r in rows} == {
        20, 32, 64,
    }  # fmt: skip
    wide = sampler(model, semantics=semantics, min_context=60, min_room=30)
    assert_same(narrow(params, requests, 0), wide(params, requests, 0), 1e-4)


LENGTHS = st.lists(
    st.tuples(st.integers(1, 90), st.integers(0, 40), st.integers(0, 30)), min_size=1, max_size=12
)


@given(LENGTHS, st.randoms(use_true_random=False))
@settings(max_examples=8, deadline=None)
def test_lengths_of_all_kinds_do_not_see_each_other(lengths, random):
    """Widths and capacities follow from a row's own request."""
    requests = [
        Request(
            "",
            tuple(TOKENIZER.encode("abcdefghij" * 3))[:forced],
            dataclasses.replace(KNOBS, max_tokens=forced + room, stop_ids=()),
            place,
            tuple(TOKENIZER.encode("lmnopqrstu" * 10))[:prompt],
        )
        for place, (prompt, room, forced) in enumerate(lengths)
    ]
    one = sampler(min_context=8, min_room=8)
    found = one(PARAMS, requests, 0)
    assert [len(g.trace) for g in found] == [r.knobs.max_tokens for r in requests]
    place = random.randrange(len(requests))
    assert_same(one(PARAMS, [requests[place]], 0), [found[place]])


def test_a_batch_of_another_size_agrees_closely():
    expected = alone("global", Semantics.REWIND)
    for rows in (1, 3, 12):
        assert_same(sampler(batch_size=rows)(PARAMS, REQUESTS, 0), expected, 1e-4)


# What is done once --------------------------------------------------------------------------------


@pytest.fixture
def begun(monkeypatch):
    """Contexts of all passes."""
    passes, begin = [], loop.begin

    def recorded(params, contexts, **told):
        passes.append(jax.device_get(contexts))
        return begin(params, contexts, **told)

    monkeypatch.setattr(loop, "begin", recorded)
    return passes


def test_contexts_are_read_once_however_many_rows_follow(begun):
    """25 rows a prompt and 4 rows in all: nearly every row enters long after the pass."""
    requests = [
        Request(f"{'ab' * n}", FORCED[n % 4], KNOBS, i) for n in range(3) for i in range(25)
    ]
    generations = sampler(contexts_at_once=2)(PARAMS, requests, 0)
    assert [int((c.length > 1).sum()) for c in begun] == [2, 1]
    assert all(c.context.shape == (2, 32) for c in begun)
    assert len({tuple(g.trace) for g in generations}) > 60


def test_rows_that_are_over_at_once_make_room(begun):
    ended = Request("a", (*TOKENIZER.encode("hi"), TOKENIZER.eos_id), KNOBS)
    none = Request("b", (), dataclasses.replace(KNOBS, max_tokens=0))
    generations = sampler()(PARAMS, [ended, none] * 20 + [REQUESTS[0]], 0)
    assert all(g.finished and g.text == "hi" for g in generations[:40:2])
    assert all(not len(g.trace) for g in generations[1:40:2]) and len(generations[-1].trace)
    assert len(begun) == 3


def test_mixed_requests_compile_nothing_after_warm_up():
    rng = np.random.default_rng(0)
    one = sampler(min_context=16, min_room=25)

    def requests(count):
        for place in range(count):
            prompt, forced, room = rng.integers(1, 60), rng.integers(0, 4), rng.integers(0, 20)
            knobs = dataclasses.replace(
                SETTINGS[place % len(SETTINGS)],
                budget=int(rng.integers(0, 9)),
                max_tokens=room + forced,
            )
            yield Request("", tuple(TOKENIZER.encode("abcd"))[:forced], knobs, None, (5,) * prompt)

    one(PARAMS, list(requests(100)), 0)
    before = loop.compilations()
    for count in (1, 3, 60):
        one(PARAMS, list(requests(count)), 1)
    assert loop.compilations() == before


@pytest.mark.slow
def test_a_thousand_mixed_requests_compile_nothing_after_warm_up():
    rng = np.random.default_rng(1)
    one = sampler(batch_size=16, min_context=16, min_room=26)
    for _ in range(2):
        requests = [
            Request(
                "",
                (),
                dataclasses.replace(
                    SETTINGS[i % len(SETTINGS)], max_tokens=int(rng.integers(0, 60))
                ),
                None,
                (5,) * int(rng.integers(1, 60)),
            )
            for i in range(1000)
        ]
        before = loop.compilations()
        assert len(one(PARAMS, requests, 0)) == 1000
    assert loop.compilations() == before


def test_a_grid_of_settings_compiles_once():
    before = loop.go_on._cache_size()
    for requests in (
        REQUESTS,
        REQUESTS[:5],
        [dataclasses.replace(REQUESTS[9], prompt="no", forced=())],
    ):
        sampler(min_room=29)(PARAMS, requests, 0)
    assert loop.go_on._cache_size() == before + 1


# Turns --------------------------------------------------------------------------------------------


def test_long_rows_do_not_hold_up_short_ones(monkeypatch):
    """One row of 60 ids and 40 of 3: as many turns as rows of 4 need for 180 ids, and not the 11
    times 60 of batches that wait for their longest."""
    turns, go_on = [], loop.go_on

    def counted(params, batch, state, *args, **told):
        before = np.asarray(state.edit.emitted), np.asarray(state.done)
        after = go_on(params, batch, state, *args, **told)
        turns.append(int((np.asarray(after.edit.emitted) - before[0]).max()))
        return after

    monkeypatch.setattr(loop, "go_on", counted)
    lengths = [60, *[3] * 40]
    requests = [
        Request("a", (), dataclasses.replace(KNOBS, max_tokens=n, stop_ids=())) for n in lengths
    ]
    generations = sampler(min_room=60)(PARAMS, requests, 0)
    assert [len(g.trace) for g in generations] == lengths
    assert 60 <= sum(turns) <= 63


def test_the_end_of_rows_is_asked_for_by_place():
    # Sorting and grouping move rows about; places stay those of the list.
    long = [
        dataclasses.replace(r, knobs=dataclasses.replace(r.knobs, max_tokens=60, stop_ids=()))
        for r in REQUESTS
    ]
    one = sampler(min_room=60)
    whole = one(PARAMS, long, 0)
    asked: set[int] = set()

    def ended(place, generation):
        asked.add(place)
        assert generation.request is long[place]
        return place % 3 == 0

    short = one(PARAMS, long, 0, ended=ended)
    assert asked == set(range(len(long)))
    for place, (some, all_) in enumerate(zip(short, whole, strict=True)):
        assert len(some.trace) < 60 if place % 3 == 0 else len(some.trace) == 60
        np.testing.assert_array_equal(some.trace, all_.trace[: len(some.trace)])


def test_progress_counts_every_response_once():
    told: list[int] = []
    generations = sampler()(PARAMS, REQUESTS[:31], 0, progress=told.append)
    assert sum(told) == len(generations) == 31 and len(told) > 7 and all(0 < n <= 4 for n in told)
    assert sampler()(PARAMS, [], 0, progress=told.append) == [] and sum(told) == 31


def test_nothing_is_sampled_before_every_request_is_checked():
    told: list[int] = []
    wrong = Request("a", (), Knobs(top_k=-1))
    with pytest.raises(InputError, match="top_k is -1"):
        sampler()(PARAMS, [*REQUESTS[:30], wrong], 0, progress=told.append)
    assert told == []


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"contexts_at_once": 0}, "contexts_at_once is 0, expected 1..4"),
        ({"contexts_at_once": 5}, r"contexts_at_once is 5, expected 1..4 \(batch_size\)"),
    ],
)
def test_shapes_that_cannot_be_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(SHAPES, **fields)


# The queue ----------------------------------------------------------------------------------------

ROWS = st.lists(
    st.tuples(
        st.integers(1, 80), st.integers(0, 2), st.sampled_from((0, 5)), st.sampled_from((0.5, 1.0))
    )
)


@given(ROWS, st.integers(1, 5))
@settings(max_examples=200)
def test_the_queue_holds_every_row_once_by_shape_and_context(drawn, at_once):
    rows = [
        Row(Request("", (9,) * forced, Knobs(top_k=k, top_p=p, max_tokens=20)), (3,) * n, 0, place)
        for place, (n, forced, k, p) in enumerate(drawn)
    ]
    config, model = dataclasses.replace(SHAPES, min_context=8, min_room=8), Single(MODEL)
    found = lanes(rows, config, model, RULE)
    assert list(found) == sorted(found)
    flat = [row.place for groups in found.values() for group in groups for row in group.rows]
    assert sorted(flat) == list(range(len(rows)))
    for shape, groups in found.items():
        kinds = []
        while groups:
            taken = next_groups(groups, at_once)
            assert 1 <= len(taken) <= at_once and len({g.width for g in taken}) == 1
            for width, some in taken:
                assert len({(r.prompt, r.request.forced) for r in some}) == 1
                assert [r.place for r in some] == sorted(r.place for r in some)
                for row in some:
                    assert width == context_width(len(row.context), config, model)
                    assert shape == shape_of(row, config, model, RULE)
                    assert len(row.prompt) + 20 <= shape.capacity
                kinds += [(r.request.knobs.top_p < 1, r.request.knobs.top_k > 0) for r in some]
        assert kinds == sorted(kinds)


def test_longer_rows_come_first_and_others_stay_in_order():
    rows = [
        Row(Request("", (), Knobs(top_k=5 * (i % 2), max_tokens=9 + (i == 6))), (i,), i, i)
        for i in range(10)
    ]
    (groups,) = lanes(rows, SHAPES, Single(MODEL), RULE).values()
    assert [g.rows[0].place for g in groups] == [6, 0, 2, 4, 8, 1, 3, 5, 7, 9]
    assert lanes([], SHAPES, Single(MODEL), RULE) == {}


def test_widths_are_few_and_hold_their_contexts():
    config, model = SamplerConfig(min_context=24, bucket=8), Single(MODEL)
    widths = [context_width(n, config, model) for n in range(1, 4000)]
    assert all(w >= n for n, w in enumerate(widths, 1)) and widths == sorted(widths)
    assert widths[0] == 24 and len(set(widths)) < 16
    # A third of padding at most, but for whole attention blocks.
    assert all(w <= 1.5 * n + 8 for n, w in enumerate(widths[:1024], 1) if n > 24)
    assert all(w % 1024 == 0 for w in widths[1024:])


# Entering -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False])
def test_rows_enter_where_they_are_told_and_nowhere_else(in_place):
    """Against a loop over rows in numpy."""
    rows = [Row(r, tuple(TOKENIZER.encode_prompt(r.prompt)), i, i) for i, r in enumerate(REQUESTS)]
    groups = [Group(32, deque([row])) for row in rows[::7][:6]]
    told = dict(program=Single(MODEL), rule=RULE, semantics=Semantics.REWIND)
    made = loop.begin(PARAMS, contexts_of(groups, 6), **told, capacity=64, rewound=0)
    key = jax.random.key(0)
    state = jax.tree.map(
        lambda x: jax.random.normal(key, x.shape).astype(x.dtype), prefill.idle(made, 5)
    )
    source = np.asarray([-1, 4, 0, -1, 3], np.int32)
    asked = [groups[n].rows[0] if n >= 0 else IDLE for n in source]
    batch = batch_of(asked, RULE, TOKENIZER.eos_ids, 4)
    before = jax.device_get(state)
    after = jax.device_get(
        loop.enter(jax.tree.map(jnp.copy, state), made, source, batch, in_place=in_place)
    )
    made = jax.device_get(made)
    for part in ("logits", "cache", "edit", "trace", "logprobs"):
        leaves = (jax.tree.leaves(getattr(x, part)) for x in (before, made, after))
        for old, new, found in zip(*leaves, strict=True):
            for slot, n in enumerate(source):
                np.testing.assert_array_equal(found[slot], old[slot] if n < 0 else new[n])
    # The fourth context ends with an end of sequence.
    assert FORCED[4][-1] == TOKENIZER.eos_id
    expected = [before.done[0], True, False, before.done[3], False]
    assert after.done.tolist() == [bool(x) for x in expected]


# A byte a number ----------------------------------------------------------------------------------


@given(
    st.integers(1, 3), st.integers(1, 4), st.sampled_from([1e-30, 1e-3, 1.0, 1e4]), st.booleans()
)
@settings(max_examples=30, deadline=None)
def test_a_quantized_number_is_off_by_a_254th_of_its_vectors_largest(rows, heads, size, half):
    rng = np.random.default_rng(rows * 10 + heads)
    x = jnp.asarray(rng.normal(size=(rows, heads, 5, 8)) * size, jnp.float32)
    x = x.at[0, 0, 0].set(0.0).astype(jnp.bfloat16 if half else jnp.float32)
    kept = kv_cache.quantize(x)
    assert kept.number.dtype == jnp.int8 and kept.scale.shape == (rows, heads, 5, 1)
    wide = np.asarray(x, np.float64)
    found = np.asarray(kept.number, np.float64) * np.asarray(kept.scale, np.float64)
    most = np.abs(wide).max(-1, keepdims=True)
    assert (np.abs(found - wide) <= most / 254 * (1 + 1e-5)).all()
    assert not found[0, 0, 0].any()
    np.testing.assert_array_equal(np.asarray(kv_cache.read(kept, jnp.float32))[0, 0, 0], 0)


@pytest.mark.parametrize("semantics", list(Semantics))
@pytest.mark.parametrize("name", list(MODELS))
def test_an_int8_cache_draws_nearly_the_same(name, semantics):
    """The recorded log-probabilities are those of a teacher-forced pass up to the cache's error:
    a stated bound on this model, and rows do not see each other."""
    model, params = MODELS[name]
    small = sampler(model, semantics=semantics, int8_cache=True)
    generations = small(params, REQUESTS, 0)
    traces = pack_traces(generations, RULE, 96)
    read = np.asarray(score(model, params, RULE, traces, semantics).logprobs)
    off = [
        np.abs(read[row, len(g.prompt_ids) + i] - g.logprobs[i])
        for row, g in enumerate(generations)
        for i in range(g.num_forced, len(g.trace))
    ]
    assert 1e-5 < np.mean(off) < 0.02 and np.max(off) < 0.2
    for place in (0, 17, 40):
        assert_same(small(params, [REQUESTS[place]], 0), [generations[place]])
    plain = alone(name, semantics)
    equal = [np.array_equal(a.trace, b.trace) for a, b in zip(plain, generations, strict=True)]
    assert np.mean(equal) > 0.5


def test_one_hot_writes_keep_the_same_bytes():
    found = [
        sampler(int8_cache=True, one_hot_writes=one_hot)(PARAMS, REQUESTS[:20], 0)
        for one_hot in (False, True)
    ]
    assert_same(*found, 1e-4)
