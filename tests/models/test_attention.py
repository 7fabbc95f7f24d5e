"""Masks, rotary positions and attention against loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlbf_jax.directives import NEVER
from rlbf_jax.models import attention
from rlbf_jax.models.attention import Visibility, attend, attend_rows, can_attend, rotary, rotate

TIME = 8
ROW = arrays(np.int32, (2, TIME), elements=st.integers(0, 9))
DIED = arrays(np.int32, (2, TIME), elements=st.sampled_from([0, 1, 3, 5, 7, 8, NEVER]))
ATTEND = jax.jit(attend, static_argnums=4)


@given(ROW, st.none() | ROW, st.none() | DIED, st.sampled_from([None, 1, 3]), st.sampled_from([(0, 8), (2, 4), (5, 3)]))
def test_masks_equal_a_loop(position, segment, died, window, block):
    start, size = block
    mask = np.asarray(can_attend(Visibility(position, segment, died), start, size, window))
    assert mask.shape[1:] == (size, TIME)
    for row in range(2):
        for query in range(start, start + size):
            for key in range(TIME):
                sees = key <= query
                sees &= segment is None or segment[row, key] == segment[row, query]
                sees &= died is None or query < died[row, key]
                sees &= window is None or int(position[row, query]) - int(position[row, key]) < window
                assert mask[row % mask.shape[0], query - start, key] == (sees or key == query)


def random_heads(seed=0, heads=4, kv_heads=2, queries=TIME, keys=TIME, size=6):
    rng = np.random.default_rng(seed)
    shapes = [(2, heads, queries, size), (2, kv_heads, keys, size), (2, kv_heads, keys, size)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_attention_equals_a_loop_over_heads_and_queries(heads, softcap):
    query, key, value = random_heads(heads=heads[0], kv_heads=heads[1], queries=3, keys=5)
    allowed = np.random.default_rng(1).random((2, 3, 5)) < 0.6
    allowed[..., 0] = True
    got = np.asarray(ATTEND(query, key, value, allowed, softcap))
    for row, head, i in np.ndindex(got.shape[:3]):
        kv = head // (heads[0] // heads[1])
        seen = np.flatnonzero(allowed[row, i])
        scores = key[row, kv, seen].astype(float) @ query[row, head, i]
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        shares = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(got[row, head, i], shares @ value[row, kv, seen], atol=1e-5)


def test_a_mask_for_all_rows():
    query, key, value = random_heads()
    causal = np.tril(np.ones((TIME, TIME), bool))[None]
    np.testing.assert_array_equal(
        ATTEND(query, key, value, causal, None), ATTEND(query, key, value, causal.repeat(2, 0), None)
    )


def test_bfloat16_values_come_back_in_bfloat16():
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in random_heads())
    allowed = np.tril(np.ones((TIME, TIME), bool))[None]
    half = ATTEND(query, key, value, allowed, None)
    assert half.dtype == jnp.bfloat16
    full = ATTEND(*(x.astype(jnp.float32) for x in (query, key, value)), allowed, None)
    np.testing.assert_allclose(half.astype(jnp.float32), full, atol=0.03)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, 2.0)])
def test_blockwise_attention_equals_one_block(window, softcap, monkeypatch):
    query, key, value = random_heads()
    rng = np.random.default_rng(2)
    position = np.arange(TIME, dtype=np.int32)[None].repeat(2, 0)
    died = np.where(rng.random((2, TIME)) < 0.5, np.arange(TIME) + 2, NEVER).astype(np.int32)
    segment = np.asarray([[1] * 3 + [2] * 5] * 2, np.int32)
    visibility = Visibility(*(jnp.asarray(x) for x in (position, segment, died)))

    def run():
        def total(q, k, v):
            out = attend_rows(q, k, v, visibility, window, softcap)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(query, key, value)

    (_, whole), gradients = run()
    monkeypatch.setattr(attention, "QUERY_BLOCK", 2)
    (_, blocks), other = run()
    np.testing.assert_allclose(whole, blocks, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, other)


def test_long_rows_must_be_whole_blocks(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 3)
    with pytest.raises(ValueError, match="rows of 8 ids: pad rows longer than 3 to a multiple of it"):
        query, key, value = (jnp.asarray(x) for x in random_heads())
        attend_rows(query, key, value, Visibility(jnp.zeros((2, TIME), jnp.int32)), None, None)


def test_rotary_keeps_lengths_and_knows_distances_only():
    query, key, _ = random_heads(heads=2)

    def products(shift, apart):
        position = jnp.full((2, TIME), shift, jnp.int32)
        q = rotate(query, *rotary(position + apart, 6, 100.0))
        k = rotate(key, *rotary(position, 6, 100.0))
        return np.asarray(jnp.sum(q * k, axis=-1)), q

    near, turned = products(0, 3)
    np.testing.assert_allclose(products(40, 3)[0], near, atol=1e-4)
    assert np.abs(products(0, 4)[0] - near).max() > 0.1
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), np.linalg.norm(query, axis=-1), rtol=1e-5)
    still = rotate(query, *rotary(jnp.zeros((2, TIME), jnp.int32), 6, 100.0))
    np.testing.assert_array_equal(still, query)
    # The first pair turns by one radian a position, the last by theta ** -(2 / 3).
    cosine, sine = rotary(jnp.asarray([[2]], jnp.int32), 6, 100.0)
    np.testing.assert_allclose(cosine[0, 0, 0], np.cos([2, 2 * 100 ** (-1 / 3), 2 * 100 ** (-2 / 3)]), atol=1e-6)
    np.testing.assert_allclose(sine[0, 0, 0], np.sin([2, 2 * 100 ** (-1 / 3), 2 * 100 ** (-2 / 3)]), atol=1e-6)
