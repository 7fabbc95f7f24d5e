"""Masks, rotary positions and attention against loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.extend.core import jaxprs_in_params

from rlbf_jax.directives import NEVER
from rlbf_jax.models import attention
from rlbf_jax.models.attention import Visibility, attend, attend_rows, can_attend, rotary, rotate

TIME = 8
ROW = arrays(np.int32, (2, TIME), elements=st.integers(0, 9))
DIED = arrays(np.int32, (2, TIME), elements=st.sampled_from([0, 1, 3, 5, 7, 8, NEVER]))
ATTEND = jax.jit(attend, static_argnums=4)


def on_device(*rows) -> Visibility:
    """Position, segment and died, of which the last two may be None."""
    return Visibility(*(row if row is None else jnp.asarray(row) for row in rows))


@given(
    ROW,
    st.none() | ROW,
    st.none() | DIED,
    st.sampled_from([None, 1, 3]),
    st.sampled_from([(0, 8), (2, 4), (5, 3)]),
)
def test_masks_equal_a_loop(position, segment, died, window, block):
    start, size = block
    mask = np.asarray(can_attend(on_device(position, segment, died), start, size, window))
    assert mask.shape[1:] == (size, TIME)
    for row in range(2):
        for query in range(start, start + size):
            for key in range(TIME):
                sees = key <= query
                sees &= segment is None or segment[row, key] == segment[row, query]
                sees &= died is None or query < died[row, key]
                sees &= (
                    window is None or int(position[row, query]) - int(position[row, key]) < window
                )
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
        ATTEND(query, key, value, causal, None),
        ATTEND(query, key, value, causal.repeat(2, 0), None),
    )


def test_bfloat16_values_come_back_in_bfloat16():
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in random_heads())
    allowed = np.tril(np.ones((TIME, TIME), bool))[None]
    half = ATTEND(query, key, value, allowed, None)
    assert half.dtype == jnp.bfloat16
    full = ATTEND(*(x.astype(jnp.float32) for x in (query, key, value)), allowed, None)
    np.testing.assert_allclose(half.astype(jnp.float32), full, atol=0.03)


@given(
    ROW,
    st.none() | ROW,
    st.none() | DIED,
    st.sampled_from([None, 1, 3]),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_a_mask_of_some_keys_is_a_piece_of_the_mask(
    position, segment, died, window, start, first_key
):
    visibility = on_device(position, segment, died)
    whole = np.asarray(can_attend(visibility, start, 3, window))
    piece = can_attend(visibility, start, 3, window, first_key, 2)
    np.testing.assert_array_equal(piece, whole[:, :, first_key : first_key + 2])


LONG = 24
POSITIONS = np.arange(LONG, dtype=np.int32)[None].repeat(2, 0)
SEGMENTS = np.asarray([[1] * 9 + [2] * 12 + [0] * 3, [0] * 4 + [1] * 20], np.int32)


def retracted() -> tuple[np.ndarray, np.ndarray]:
    """Positions and lifetimes of rows that take ids back: fewer live ids than indices."""
    died = np.full((2, LONG), NEVER, np.int32)
    died[0, 2:7], died[1, 5:13], died[1, 20] = 7, 13, 22
    index = np.arange(LONG)
    live = (index[None, :] < index[:, None]) & (index[:, None] < died[:, None, :])
    return live.sum(-1).astype(np.int32), died


def segmented() -> Visibility:
    starts = np.stack(
        [
            np.maximum.accumulate(np.where(np.diff(s, prepend=-1), np.arange(LONG), 0))
            for s in SEGMENTS
        ]
    )
    return Visibility(POSITIONS - starts.astype(np.int32), SEGMENTS)


SEEN = {
    "causal": Visibility(POSITIONS),
    "packed": segmented(),
    "lifetimes": Visibility(retracted()[0], None, retracted()[1]),
    "packed lifetimes": Visibility(retracted()[0], SEGMENTS, retracted()[1]),
}


@pytest.mark.parametrize(
    ("seen", "window", "softcap", "rows"),
    [
        ("causal", None, None, 1),
        ("causal", 3, None, 2),
        ("causal", 6, 2.0, 2),
        ("causal", 1, None, 2),
        ("packed", 4, None, 2),
        ("lifetimes", None, 2.0, 1),
        ("lifetimes", 6, None, 2),
        ("packed lifetimes", 40, 0.7, 2),
    ],
)
def test_blockwise_attention_equals_one_block(seen, window, softcap, rows, monkeypatch):
    """Windows smaller than a block of 4, of its size, across blocks and beyond the row;
    grouped heads; gradients."""
    heads = [x[:rows] for x in random_heads(seed=3, queries=LONG, keys=LONG)]
    weights = np.random.default_rng(4).normal(size=heads[0].shape).astype(np.float32)
    visibility = jax.tree.map(lambda x: jnp.asarray(x[:rows]), SEEN[seen])

    def run():
        def total(q, k, v):
            out = attend_rows(q, k, v, visibility, window, softcap)
            return jnp.sum(out * weights), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*heads)

    (_, whole), gradients = run()
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    (_, blocks), other = run()
    np.testing.assert_allclose(blocks, whole, atol=1e-5)
    for ours, known in zip(other, gradients, strict=True):
        assert np.linalg.norm(ours - known) <= 1e-5 * (1 + np.linalg.norm(known))


@pytest.mark.parametrize("window", [None, 1, 4, 5, 9, 100])
def test_only_blocks_that_are_seen_are_visited(window):
    near = [
        [k <= q and (window is None or q - k < window) for k in range(LONG)] for q in range(LONG)
    ]
    holds = np.asarray(near).reshape(6, 4, 6, 4).any((1, 3))
    pairs = attention.visible_blocks(LONG, 4, window)
    assert sorted(map(tuple, pairs.tolist())) == list(zip(*np.nonzero(holds), strict=True))
    first = dict(reversed(pairs.tolist()))
    assert all(q == k for q, k in first.items())


@pytest.mark.parametrize("window", [None, 5])
def test_the_fused_path_is_causal_attention(window, monkeypatch):
    """The layout, scale, groups and window that cuDNN is asked for,
    computed by the library's other implementation."""
    query, key, value = (jnp.asarray(x) for x in random_heads(seed=5, size=8))
    position = jnp.arange(TIME, dtype=jnp.int32)[None]
    expected = attend(query, key, value, can_attend(Visibility(position), 0, TIME, window))
    np.testing.assert_allclose(
        attention.attend_fused(query, key, value, window, implementation="xla"), expected, atol=1e-6
    )
    asked = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "attend_fused", lambda *args: asked.append(args) or args[0])
    half = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    attend_rows(*half, Visibility(position), window, None)
    assert len(asked) == 1 and asked[0][3] == window
    for heads, visibility, softcap in (
        ((query, key, value), Visibility(position), None),
        (half, Visibility(position), 3.0),
        (half, Visibility(position, jnp.ones_like(position)), None),
        (half, Visibility(position, None, jnp.full_like(position, NEVER)), None),
        ([x[..., :6] for x in half], Visibility(position), None),
    ):
        attend_rows(*heads, visibility, window, softcap)
    assert len(asked) == 1


def largest_pair(jaxpr, found=(0, None)):
    """The largest min(a, b) over any two dimensions a, b of an array anywhere
    in a program, and the array."""
    for equation in jaxpr.eqns:
        for array in (x.aval for x in equation.outvars):
            sides = sorted(getattr(array, "shape", ()))
            found = max(found, (sides[-2] if len(sides) > 1 else 0, str(array)), key=lambda x: x[0])
        for inner in jaxprs_in_params(equation.params):
            found = largest_pair(inner, found)
    return found


@pytest.mark.parametrize(("died", "softcap"), [(False, None), (True, None), (False, 30.0)])
def test_no_array_of_time_by_time(died, softcap):
    """Forward and backward at 4,096 ids: neither in the program as written,
    nor in the bytes of the compiled one."""
    time = 4096
    ids = jax.ShapeDtypeStruct((1, time), jnp.int32)
    visibility = Visibility(ids, None, ids if died else None)
    query, key = (jax.ShapeDtypeStruct((1, heads, time, 16), jnp.float32) for heads in (2, 1))

    def total(q, k, v, visibility):
        return jnp.sum(attend_rows(q, k, v, visibility, None, softcap))

    for program in (total, jax.grad(total, argnums=(0, 1, 2))):
        traced = jax.jit(program).trace(query, key, key, visibility)
        assert largest_pair(traced.jaxpr.jaxpr)[0] < time
        compiled = traced.lower().compile()
        # One block of scores is 0.5 MB, one [T, T] array of one head 67 MB.
        assert compiled.memory_analysis().temp_size_in_bytes < 16e6


def test_the_walk_sees_arrays_of_time_by_time():
    def scores(q):
        return jax.lax.map(lambda x: jnp.sum(x @ x.T), q)

    assert largest_pair(jax.make_jaxpr(scores)(jnp.zeros((2, 32, 3))).jaxpr)[0] == 32


def test_long_rows_must_be_whole_blocks(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 3)
    with pytest.raises(
        ValueError, match="rows of 8 ids: pad rows longer than 3 to a multiple of it"
    ):
        query, key, value = (jnp.asarray(x) for x in random_heads())
        attend_rows(query, key, value, Visibility(jnp.zeros((2, TIME), jnp.int32)), None, None)


def test_rotary_keeps_lengths_and_knows_distances_only():
    query, key, _ = map(jnp.asarray, random_heads(heads=2))

    def products(shift, apart):
        position = jnp.full((2, TIME), shift, jnp.int32)
        q = rotate(query, *rotary(position + apart, 6, 100.0))
        k = rotate(key, *rotary(position, 6, 100.0))
        return np.asarray(jnp.sum(q * k, axis=-1)), q

    near, turned = products(0, 3)
    np.testing.assert_allclose(products(40, 3)[0], near, atol=1e-4)
    assert np.abs(products(0, 4)[0] - near).max() > 0.1
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), np.linalg.norm(query, axis=-1), rtol=1e-5
    )
    still = rotate(query, *rotary(jnp.zeros((2, TIME), jnp.int32), 6, 100.0))
    np.testing.assert_array_equal(still, query)
    # The first pair turns by one radian a position, the last by theta ** -(2 / 3).
    cosine, sine = rotary(jnp.asarray([[2]], jnp.int32), 6, 100.0)
    np.testing.assert_allclose(
        cosine[0, 0, 0], np.cos([2, 2 * 100 ** (-1 / 3), 2 * 100 ** (-2 / 3)]), atol=1e-6
    )
    np.testing.assert_allclose(
        sine[0, 0, 0], np.sin([2, 2 * 100 ** (-1 / 3), 2 * 100 ** (-2 / 3)]), atol=1e-6
    )
