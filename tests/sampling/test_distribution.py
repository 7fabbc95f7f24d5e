"""Truncation and the draw, against a sorted list and the cumulative mass in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbf_jax.sampling.distribution import BLOCK, ONE_BLOCK, Truncation, draw, kept_by_truncation

KEPT, DRAW = jax.jit(kept_by_truncation), jax.jit(draw)


def truncation(top_k=0, top_p=1.0, min_p=0.0, rows=1):
    return Truncation(
        jnp.full(rows, top_k),
        jnp.full(rows, top_p, jnp.float32),
        jnp.full(rows, min_p, jnp.float32),
    )


def kept_ids(weights, top_k, top_p, min_p):
    """The twin: a sorted list, cut from its end."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    order = order[:top_k] if top_k else order
    if top_p < 1:
        total = sum(weights[i] for i in order)
        order = order[
            : next(
                n
                for n in range(1, len(order) + 1)
                if sum(weights[i] for i in order[:n]) >= top_p * total
            )
        ]
    return {i for i in order if weights[i] >= min_p * max(weights)}


@given(
    st.lists(st.integers(0, 6), min_size=8, max_size=8).filter(any),
    st.integers(0, 9),
    st.integers(1, 16),
    st.integers(0, 8),
)
@settings(max_examples=200)
def test_truncation_equals_a_sorted_list(weights, top_k, p, min_p):
    """Whole weights and binary fractions: sums are exact, so ties and boundaries are as well."""
    kept = np.asarray(
        KEPT(jnp.asarray([weights], jnp.float32), truncation(top_k, p / 16, min_p / 8))
    )[0]
    assert set(np.flatnonzero(kept).tolist()) == kept_ids(weights, top_k, p / 16, min_p / 8)


@given(st.lists(st.integers(1, 6), min_size=8, max_size=8), st.integers(1, 15))
def test_top_p_reaches_p_and_no_smaller_set_does(weights, p):
    kept = np.asarray(KEPT(jnp.asarray([weights], jnp.float32), truncation(top_p=p / 16)))[0]
    mass = sorted(w for w, k in zip(weights, kept, strict=True) if k)
    assert 16 * sum(mass) >= p * sum(weights) > 16 * sum(mass[1:])


def test_truncation_always_keeps_the_likeliest():
    probabilities = jnp.asarray([[0.2, 0.5, 0.3], [0.25, 0.25, 0.5]])
    # 1e-42 is rounded to 0 where small numbers are flushed.
    kept = KEPT(
        probabilities, Truncation(jnp.zeros(2, jnp.int32), jnp.full(2, 1e-42), jnp.zeros(2))
    )
    np.testing.assert_array_equal(kept, [[False, True, False], [False, False, True]])


def test_truncation_on_random_logits_row_by_row():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (64, 50)).astype(np.float32)
    top_k, top_p, min_p = (
        rng.integers(0, 12, 64),
        rng.choice([0.3, 0.7, 0.9, 1.0], 64),
        rng.choice([0, 0.05, 0.3], 64),
    )
    probabilities = np.asarray(jax.nn.softmax(logits))
    settings = Truncation(
        *(
            jnp.asarray(x, t)
            for x, t in zip((top_k, top_p, min_p), ("int32", "f4", "f4"), strict=True)
        )
    )
    kept = np.asarray(KEPT(probabilities, settings))
    for row in range(64):
        expected = kept_ids(
            probabilities[row].astype(float).tolist(), top_k[row], top_p[row], min_p[row]
        )
        assert set(np.flatnonzero(kept[row]).tolist()) == expected


@pytest.mark.parametrize("vocab", [12, ONE_BLOCK, ONE_BLOCK + 1, 7 * BLOCK, 10 * BLOCK - 3])
@pytest.mark.parametrize(
    "knobs", [{}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 9, "top_p": 0.9}]
)
def test_draw_is_the_inverse_of_the_cumulative_mass(knobs, vocab):
    rng = np.random.default_rng(vocab)
    logits = np.where(rng.random(vocab) < 0.3, -np.inf, rng.normal(0, 1.5, vocab)).astype(
        np.float32
    )
    weights = np.exp(logits.astype(float))
    kept = kept_ids(weights.tolist(), **({"top_k": 0, "top_p": 1.0, "min_p": 0.0} | knobs))
    mass = np.cumsum([w if i in kept else 0.0 for i, w in enumerate(weights)])
    rows = 4000 if vocab == 12 else 500
    uniform = ((np.arange(rows) + 0.5) / rows).astype(np.float32)
    ids = np.asarray(
        DRAW(jnp.tile(logits, (rows, 1)), truncation(rows=rows, **knobs), jnp.ones(rows), uniform)
    )
    sure = np.abs(uniform[:, None] - mass / mass[-1]).min(1) > (1e-5 if vocab == 12 else 2e-6)
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(
        ids[sure], np.searchsorted(mass, uniform[sure] * mass[-1], side="right")
    )
    # An even grid of draws: every id as often as it is likely.
    shares = np.diff(mass, prepend=0) / mass[-1]
    np.testing.assert_allclose(np.bincount(ids, minlength=vocab) / rows, shares, atol=2 / rows)
    assert set(ids.tolist()) <= kept


def test_rows_of_a_large_vocabulary_have_settings_of_their_own():
    rng = np.random.default_rng(3)
    rows, vocab = 40, 5 * BLOCK + 7
    # A few values only, so that many ids tie at every bound.
    logits = rng.integers(-8, 3, (rows, vocab)).astype(np.float32)
    top_k, top_p = rng.choice([0, 1, 40, 900], rows), rng.choice([0.1, 0.9, 1.0], rows)
    temperature = rng.choice([0.0, 0.7, 1.3], rows).astype(np.float32)
    uniform = rng.random(rows).astype(np.float32)
    cut = Truncation(
        jnp.asarray(top_k, jnp.int32), jnp.asarray(top_p, jnp.float32), jnp.zeros(rows)
    )
    scale = np.where(temperature > 0, temperature, 1)[:, None]
    ids = np.asarray(DRAW(logits / scale, cut, temperature, uniform))
    for row in range(rows):
        weights = np.exp(logits[row].astype(float) / scale[row])
        expected = {int(np.argmax(logits[row]))}
        if temperature[row]:
            expected = set()
            # Rounding may let one of many tied ids in or out, and move a bound.
            for p in {top_p[row], min(top_p[row], 1 - 1e-5) - 1e-5, min(top_p[row] + 1e-5, 1)}:
                kept = list(kept_ids(weights.tolist(), top_k[row], p, 0))
                mass = np.cumsum(weights * np.isin(np.arange(vocab), kept))
                bounds = (uniform[row] + np.asarray([-1e-5, 1e-5])) * mass[-1]
                expected |= {*np.searchsorted(mass, bounds, side="right").tolist()}
        assert ids[row] in expected and len(expected) < 5


@pytest.mark.parametrize(
    ("vocab", "share"), [(ONE_BLOCK, 0.4), (5 * BLOCK, 0.4), (40 * BLOCK, 0.01)]
)
def test_rounding_at_a_bound_never_draws_an_illegal_id(vocab, share):
    """Shares within some units in the last place of every bound between two
    legal ids, and 1 itself."""
    rng = np.random.default_rng(5)
    legal = rng.random(vocab) < share
    legal[::BLOCK], legal[-1] = False, False
    logits = np.where(legal, rng.normal(0, 2, vocab), -np.inf).astype(np.float32)
    mass = np.cumsum(np.exp(logits.astype(float)))
    bounds = np.unique((mass / mass[-1]).astype(np.float32))
    uniform = np.ravel(
        bounds[:, None] + np.spacing(bounds)[:, None] * np.arange(-4, 5, dtype=np.float32)
    )
    drawn = []
    for some in np.array_split(np.clip(uniform, 0, 1), 8):
        drawn.append(
            DRAW(
                np.tile(logits, (len(some), 1)),
                truncation(rows=len(some)),
                jnp.ones(len(some)),
                some,
            )
        )
    ids = np.concatenate(drawn)
    assert legal[ids].all() and len(np.unique(ids)) > 0.9 * legal.sum()


@pytest.mark.parametrize("gap", [0, BLOCK, 4 * BLOCK])
def test_blocks_that_nothing_may_be_drawn_from_are_passed_over(gap):
    """One id at each end of the vocabulary, or at an end and in the middle,
    and nothing legal between."""
    vocab = 4 * BLOCK + 2
    first, last = gap // 2, vocab - 1
    logits = (
        jnp.full((5, vocab), -jnp.inf)
        .at[:, jnp.asarray([first, last])]
        .set(jnp.asarray([0.0, 1.0]))
    )
    share = 1 / (1 + np.e)
    uniform = jnp.asarray(
        [0.0, share - 1e-4, share + 1e-4, 0.999, np.nextafter(np.float32(1), np.float32(0))]
    )
    ids = DRAW(logits, truncation(rows=5), jnp.ones(5), uniform)
    assert ids.tolist() == [first, first, last, last, last]
    assert DRAW(logits, truncation(rows=5), jnp.zeros(5), uniform).tolist() == [last] * 5


@pytest.mark.parametrize("vocab", [6, 3 * BLOCK, 4 * BLOCK + 100])
def test_a_tie_falls_to_the_lower_id(vocab):
    for places in ([2, 5], [1, vocab - 1], [vocab - 2, vocab - 1]):
        logits = jnp.zeros((1, vocab)).at[0, jnp.asarray(places)].set(3.0)
        for cut, temperature in ((truncation(), 0.0), (truncation(top_k=1), 1.0)):
            for u in (0.0, 0.5, 0.99):
                ids = DRAW(logits, cut, jnp.asarray([temperature]), jnp.asarray([u]))
                assert ids.tolist() == [places[0]]


def test_draw_at_the_ends_of_the_interval_takes_legal_ids():
    logits = jnp.asarray([[-jnp.inf, 0.0, 1.0, -jnp.inf, 0.5, -jnp.inf]] * 2)
    ends = jnp.asarray([0.0, np.nextafter(np.float32(1), np.float32(0))])
    assert DRAW(logits, truncation(rows=2), jnp.ones(2), ends).tolist() == [1, 4]
    assert DRAW(logits, truncation(rows=2), jnp.zeros(2), ends).tolist() == [2, 2]
