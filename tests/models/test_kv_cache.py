"""The cache: slots against loops, and decoding id by id against one whole pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.directives import NEVER, Semantics, layout
from rlbf_jax.models import kv_cache, transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.kv_cache import KVCache, latest_writer, ring_slots
from tests.fakes import LetterTokenizer, random_model

BOTH = pytest.mark.parametrize("semantics", [Semantics.KEEP, Semantics.REWIND])
LATEST = jax.jit(latest_writer, static_argnums=2)
STEP = jax.jit(transformer.step, static_argnums=(0, 5))
FORWARD = jax.jit(transformer.forward, static_argnums=0)
TOKENIZER = LetterTokenizer(x_max=6)
RULE = TOKENIZER.controls.rule()


@given(
    st.lists(st.lists(st.integers(0, 11), min_size=10, max_size=10), min_size=2, max_size=2),
    st.tuples(st.integers(0, 10), st.integers(0, 10)),
    st.sampled_from([1, 3, 12]),
)
def test_latest_writer_equals_a_loop(positions, lengths, slots):
    index, held = LATEST(jnp.asarray(positions, jnp.int32), jnp.asarray(lengths, jnp.int32), slots)
    for row in range(2):
        writer: dict[int, int] = {}
        for time in range(lengths[row]):
            writer[positions[row][time] % slots] = time
        assert index[row].tolist() == [writer.get(s, 0) for s in range(slots)]
        assert held[row].tolist() == [
            positions[row][writer[s]] if s in writer else NEVER for s in range(slots)
        ]


def test_writes_change_one_slot_a_row():
    rng = np.random.default_rng(0)
    cache, new = rng.normal(size=(3, 2, 5, 4)), rng.normal(size=(3, 2, 1, 4))
    slot = jnp.asarray([0, 4, 2], jnp.int32)
    expected = cache.astype(np.float32)
    for row in range(3):
        expected[row, :, slot[row]] = new[row, :, 0]
    for one_hot in (False, True):
        written = kv_cache.write(
            jnp.asarray(cache, jnp.float32), jnp.asarray(new, jnp.float32), slot, one_hot
        )
        np.testing.assert_array_equal(written, expected)
    positions = kv_cache.write_position(jnp.full((3, 5), NEVER), jnp.asarray([7, 8, 9]), slot)
    assert positions.tolist() == [
        [7, *[NEVER] * 4],
        [*[NEVER] * 4, 8],
        [NEVER, NEVER, 9, NEVER, NEVER],
    ]


@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_query_sees_slots_at_or_below_it_inside_its_window(window):
    positions = np.asarray([[0, 1, 2, 3, NEVER], [5, 6, 2, NEVER, 4]], np.int32)
    for position in range(8):
        seen = np.asarray(
            kv_cache.sees(jnp.asarray(positions), jnp.full(2, position, jnp.int32), window)
        )
        for row, slot in np.ndindex(positions.shape):
            held = int(positions[row, slot])
            assert seen[row, 0, slot] == (
                held <= position and (window is None or position - held < window)
            )


def test_ring_slots():
    assert [
        ring_slots(None, 100, 9),
        ring_slots(4, 100, 0),
        ring_slots(4, 100, 9),
        ring_slots(4, 10, 9),
    ] == [
        100,
        4,
        13,
        10,
    ]


@functools.cache
def model(windows):
    return random_model(TOKENIZER, windows=windows, num_layers=2)


def trace_rows(rows=3, time=48):
    """Prompts of 2 and up, then letters, maximal and consecutive directives,
    lone categories, bare retractions."""
    rng = np.random.default_rng(4)
    letters = TOKENIZER.encode("abcdefghijklmnopqrstuvwxyz")
    tokens = np.zeros((rows, time), np.int32)
    for row in range(rows):
        ids = rng.choice(letters, 14).tolist()
        while len(ids) < time:
            directive = [RULE.category_id("one"), RULE.backtrack_id(int(rng.choice([1, 6, 6])))]
            pieces = [
                directive,
                directive * 2,
                directive[:1],
                directive[1:],
                rng.choice(letters, 9).tolist(),
            ]
            ids += pieces[int(rng.choice(5, p=[0.2, 0.1, 0.1, 0.1, 0.5]))]
        tokens[row] = ids[:time]
    return tokens, np.arange(time)[None] >= np.asarray([[2], [5], [9]])


def retracted_positions(position):
    """Most that a row's positions fall below its highest so far, summed over falls:
    enough slots for any ring."""
    return int(np.maximum(position[:, :-1] + 1 - position[:, 1:], 0).sum(1).max())


def decode(config, params, tokens, position, slots):
    """Hidden states [B, T, D] of ids that are fed one by one into an empty cache."""
    rows, time = tokens.shape
    empty = [jnp.zeros((rows, config.num_kv_heads, s, config.head_dim)) for s in slots * 2][
        : config.num_layers
    ]
    places = tuple(jnp.full((rows, s), NEVER, jnp.int32) for s in slots)
    cache = KVCache(tuple(empty), tuple(empty), places)
    hidden = []
    for t in range(time):
        out, cache = STEP(config, params, tokens[:, t], position[:, t], cache, False)
        hidden.append(out)
    return np.stack(hidden, axis=1)


def lay_out(tokens, responding, semantics):
    ids = jnp.asarray(tokens)
    return layout(RULE, ids, jnp.ones_like(ids), jnp.asarray(responding), semantics)


@BOTH
@pytest.mark.parametrize("windows", [(None,), (4, None)])
def test_decoding_id_by_id_equals_one_pass(semantics, windows):
    config, params = model(windows)
    tokens, responding = trace_rows()
    where = lay_out(tokens, responding, semantics)
    died = where.died if semantics is Semantics.REWIND else None
    whole, _ = FORWARD(config, params, tokens, Visibility(where.position, None, died))
    position = np.asarray(where.position)
    rewound = retracted_positions(position)
    assert (rewound == 0) == (semantics is Semantics.KEEP)
    slots = [ring_slots(w, tokens.shape[1], rewound) for w in windows]
    np.testing.assert_allclose(decode(config, params, tokens, position, slots), whole, atol=2e-5)
    assert semantics is Semantics.KEEP or int((where.died < NEVER).sum()) > 30


def test_a_ring_without_spare_slots_loses_what_it_rewinds_to():
    config, params = model((4, None))
    tokens, responding = trace_rows()
    where = lay_out(tokens, responding, Semantics.REWIND)
    whole, _ = FORWARD(config, params, tokens, Visibility(where.position, None, where.died))
    narrow = decode(config, params, tokens, np.asarray(where.position), [4, tokens.shape[1]])
    assert np.abs(narrow - np.asarray(whole)).max() > 0.1
