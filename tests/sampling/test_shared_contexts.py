"""Rows that share a prefilled context, and how requests become batches."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbf_jax.directives import Semantics
from rlbf_jax.errors import InputError
from rlbf_jax.models import transformer
from rlbf_jax.sampling import loop, prefill, program
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.sampler import (
    IDLE,
    Row,
    Sampler,
    SamplerConfig,
    batches_of,
    make_batch,
    sharing,
)
from tests.fakes import LetterTokenizer, random_model

TOKENIZER = LetterTokenizer()
RULE = TOKENIZER.controls.rule()
MODEL, PARAMS = random_model(TOKENIZER)
ALONE = SamplerConfig(Semantics.REWIND, batch_size=12, min_context=32, min_room=32)
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


def sampler(rows_per_context, model=MODEL, config=ALONE):
    return Sampler(model, TOKENIZER, dataclasses.replace(config, rows_per_context=rows_per_context))


def assert_same(generations, others, tolerance=1e-4):
    assert len(generations) == len(others)
    for one, other in zip(generations, others, strict=True):
        np.testing.assert_array_equal(one.trace, other.trace)
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=tolerance)
        assert dataclasses.replace(
            one, trace=None, logprobs=None, prompt_ids=None
        ) == dataclasses.replace(other, trace=None, logprobs=None, prompt_ids=None)
        np.testing.assert_array_equal(one.prompt_ids, other.prompt_ids)


@pytest.mark.parametrize("semantics", list(Semantics))
@pytest.mark.parametrize("rows_per_context", [3, 12])
def test_rows_that_share_a_context_draw_what_they_draw_alone(rows_per_context, semantics):
    """All settings beside each other, contexts with directives among them;
    7 rows a context fill no group of these."""
    config = dataclasses.replace(ALONE, semantics=semantics)
    expected = sampler(1, config=config)(PARAMS, REQUESTS, 0)
    assert_same(sampler(rows_per_context, config=config)(PARAMS, REQUESTS, 0), expected)
    assert sum(len(g.edits) for g in expected) > 30 and sum(g.finished for g in expected) > 10
    assert len({tuple(g.trace) for g in expected}) > 40


def test_rings_of_windows_are_shared_too():
    model, params = random_model(TOKENIZER, windows=(6, None))
    expected = Sampler(model, TOKENIZER, ALONE)(params, REQUESTS, 0)
    assert_same(sampler(4, model)(params, REQUESTS, 0), expected)
    assert sum(len(g.edits) for g in expected) > 30


def test_a_row_is_bit_equal_in_whatever_group_and_order():
    whole = sampler(3)(PARAMS, REQUESTS, 0)
    rng = np.random.default_rng(0)
    for count in (1, 5, 29, len(REQUESTS)):
        order = rng.permutation(len(REQUESTS))[:count]
        some = sampler(3)(PARAMS, [REQUESTS[i] for i in order], 0)
        assert_same(some, [whole[i] for i in order], 0)


def test_contexts_are_read_once(monkeypatch):
    read, whole = [], transformer.forward

    def forward(config, params, tokens, visibility):
        read.append(tokens.shape)
        return whole(config, params, tokens, visibility)

    monkeypatch.setattr(program.transformer, "forward", forward)
    rows = [Row(request, (1, 2), at, at) for at, request in enumerate(REQUESTS[:7])]
    config = dataclasses.replace(ALONE, rows_per_context=4)
    (one,) = batches_of(rows, config)
    batch, room = make_batch(MODEL, config, RULE, one, jax.random.key(0), TOKENIZER.eos_ids)
    state = jax.eval_shape(
        lambda: prefill.prefill(
            program.Single(MODEL), PARAMS, RULE, Semantics.REWIND, batch, room, 0
        )
    )
    assert read == [(3, 32)] and state.logits.shape[0] == 12 and len(batch.context) == 3
    assert all(x.shape[0] == 12 for x in jax.tree.leaves(state))


def test_a_grid_of_settings_compiles_once():
    shapes = dataclasses.replace(ALONE, min_room=29)
    before = loop.generate._cache_size()
    for requests in (
        REQUESTS,
        REQUESTS[:5],
        [dataclasses.replace(REQUESTS[9], prompt="no", forced=())],
    ):
        sampler(6, config=shapes)(PARAMS, requests, 0)
    assert loop.generate._cache_size() == before + 1


def test_the_end_of_rows_is_asked_for_by_place():
    # Sorting and grouping move rows about; places stay those of the list.
    long = [
        dataclasses.replace(r, knobs=dataclasses.replace(r.knobs, max_tokens=60, stop_ids=()))
        for r in REQUESTS
    ]
    shapes = dataclasses.replace(ALONE, min_room=60)
    whole = sampler(1, config=shapes)(PARAMS, long, 0)
    asked: set[int] = set()

    def ended(place, generation):
        asked.add(place)
        assert generation.request is long[place]
        return place % 3 == 0

    short = sampler(3, config=shapes)(PARAMS, long, 0, ended=ended)
    assert asked == set(range(len(long)))
    for place, (some, all_) in enumerate(zip(short, whole, strict=True)):
        assert len(some.trace) < 60 if place % 3 == 0 else len(some.trace) == 60
        np.testing.assert_array_equal(some.trace, all_.trace[: len(some.trace)])


@pytest.mark.parametrize("rows_per_context", [1, 4])
def test_progress_counts_every_response_once(rows_per_context):
    told: list[int] = []
    generations = sampler(rows_per_context)(PARAMS, REQUESTS[:31], 0, progress=told.append)
    assert sum(told) == len(generations) == 31 and len(told) > 2 and all(0 < n <= 12 for n in told)
    assert sampler(rows_per_context)(PARAMS, [], 0, progress=told.append) == [] and sum(told) == 31


def test_nothing_is_sampled_before_every_request_is_checked():
    told: list[int] = []
    with pytest.raises(InputError, match="top_k is -1"):
        sampler(1)(
            PARAMS, [*REQUESTS[:30], Request("a", (), Knobs(top_k=-1))], 0, progress=told.append
        )
    assert told == []


def test_a_batch_divides_into_groups():
    for batch_size, shared in ((12, 5), (12, 24), (12, 0), (0, 1), (-3, -3)):
        with pytest.raises(
            ValueError, match=f"batch_size = {batch_size} must be a multiple of rows_per_context"
        ):
            SamplerConfig(batch_size=batch_size, rows_per_context=shared)


# Batches ----------------------------------------------------------------------------------------

ROWS = st.lists(
    st.tuples(
        st.integers(0, 3), st.booleans(), st.sampled_from((0, 5)), st.sampled_from((0.5, 1.0))
    )
)


@given(ROWS, st.sampled_from((1, 2, 3, 4)), st.integers(1, 3))
@settings(max_examples=200)
def test_batches_hold_every_row_once_and_groups_share_a_context(drawn, shared, groups):
    rows = [
        Row(Request("", (9,) * forced, Knobs(top_k=top_k, top_p=top_p)), (prompt,), 0, place)
        for place, (prompt, forced, top_k, top_p) in enumerate(drawn)
    ]
    config = SamplerConfig(batch_size=shared * groups, rows_per_context=shared)
    batches = batches_of(rows, config)
    assert all(len(batch) == config.batch_size for batch in batches)
    flat = [row for batch in batches for row in batch]
    assert sorted(row.place for row in flat if row is not IDLE) == list(range(len(rows)))
    kinds = []
    for start in range(0, len(flat), shared):
        group = flat[start : start + shared]
        busy = [row for row in group if row is not IDLE]
        assert group[: len(busy)] == busy and len({(r.prompt, r.request.forced) for r in busy}) <= 1
        kinds.append(
            (
                any(r.request.knobs.top_p < 1 for r in busy),
                any(r.request.knobs.top_k > 0 for r in busy),
            )
        )
    # No more groups than contexts need, rows that sweep alike together,
    # and idle groups only at the end.
    contexts = [(row.prompt, row.request.forced) for row in rows]
    needed = sum(-(-contexts.count(context) // shared) for context in set(contexts))
    assert len(batches) == -(-needed // groups)
    assert kinds[:needed] == sorted(kinds[:needed])
    assert all(row is IDLE for row in flat[needed * shared :])


def test_order_stays_among_rows_that_ask_for_the_same():
    rows = [Row(Request("", (), Knobs(top_k=5 * (i % 2))), (i,), i, i) for i in range(10)]
    (batch,) = batches_of(rows, SamplerConfig(batch_size=10))
    assert [row.place for row in batch] == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    assert batches_of([], SamplerConfig()) == []


@pytest.mark.parametrize(
    ("batch_size", "rows", "expected"),
    [(96, 1, 1), (96, 2, 2), (96, 49, 6), (14, 49, 7), (98, 49, 49), (1, 9, 1), (96, 10, 12)],
)
def test_groups_leave_few_rows_idle(batch_size, rows, expected):
    found = sharing(batch_size, rows)
    assert batch_size % found == 0 and found == expected
    SamplerConfig(batch_size=batch_size, rows_per_context=found)


def test_idle_rows_of_a_group_draw_nothing():
    config = dataclasses.replace(ALONE, rows_per_context=4)
    rows = [Row(REQUESTS[9], (1, 3, 4), 0, 0)]
    (one,) = batches_of(rows, config)
    batch, room = make_batch(MODEL, config, RULE, one, jax.random.key(0), TOKENIZER.eos_ids)
    trace, logprobs, emitted = loop.generate(
        PARAMS,
        batch,
        program=program.Single(MODEL),
        rule=RULE,
        semantics=Semantics.REWIND,
        room=room,
        rewound=0,
        one_hot=False,
    )
    assert int(emitted[0]) > len(REQUESTS[9].forced) and not bool(
        jnp.isnan(logprobs[0, int(emitted[0]) - 1])
    )
    assert batch.limits.max_emitted[1:].tolist() == [0] * 11
