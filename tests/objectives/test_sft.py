"""The supervised loss that never holds all logits, against the plain one that does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.objectives import sft
from rlbf_jax.objectives.sft import linear_nll, sequence_logprobs, token_nll


def plain(hidden, table, targets, counts):
    logp = jax.nn.log_softmax(hidden @ table.T, axis=-1)
    chosen = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(counts, chosen, 0.0))


def problem(batch, time, share=0.6, width=8, vocab=13, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(batch, time, width)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(vocab, width)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (batch, time)), jnp.int32)
    return hidden, table, targets, jnp.asarray(rng.random((batch, time)) < share)


# 16 ids a chunk: rows of one chunk, of several, of several and a rest,
# and more rows than a chunk holds.
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (2, 8), (3, 11), (4, 13), (20, 3)])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_value_and_gradients_equal_plain_log_softmax(monkeypatch, shape, share):
    monkeypatch.setattr(sft, "CHUNK", 16)
    hidden, table, targets, counts = problem(*shape, share)
    got, gradients = jax.jit(jax.value_and_grad(linear_nll, (0, 1)))(hidden, table, targets, counts)
    wanted, slow = jax.value_and_grad(plain, (0, 1))(hidden, table, targets, counts)
    assert float(got) == pytest.approx(float(wanted), rel=1e-5, abs=1e-5)
    for ours, theirs in zip(gradients, slow, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    if share == 0.0:
        assert float(got) == 0.0 and not any(np.asarray(g).any() for g in gradients)


@pytest.mark.parametrize("shape", [(1, 37), (2, 8), (20, 3)])
def test_weights_count_each_target_as_often_as_they_say(monkeypatch, shape):
    """Against log-softmax with the weights outside; weights of 0 and 1 are a mask."""
    monkeypatch.setattr(sft, "CHUNK", 16)
    hidden, table, targets, counts = problem(*shape)
    weights = jnp.asarray(np.random.default_rng(5).uniform(0.2, 4, shape), jnp.float32) * counts

    def slow(h, w):
        chosen = jnp.take_along_axis(jax.nn.log_softmax(h @ w.T), targets[..., None], -1)[..., 0]
        return -jnp.sum(chosen * weights)

    got, gradients = jax.value_and_grad(linear_nll, (0, 1))(hidden, table, targets, weights)
    wanted, theirs = jax.value_and_grad(slow, (0, 1))(hidden, table)
    assert float(got) == pytest.approx(float(wanted), rel=1e-5)
    for one, other in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    as_mask = linear_nll(hidden, table, targets, counts.astype(jnp.float32))
    assert float(as_mask) == float(linear_nll(hidden, table, targets, counts))


@pytest.mark.parametrize("scale", [-2.5, 0.0, 1e-3])
def test_gradients_follow_the_scale_of_the_loss(scale):
    hidden, table, targets, counts = problem(2, 9)
    got = jax.grad(lambda h, w: scale * linear_nll(h, w, targets, counts), (0, 1))(hidden, table)
    slow = jax.grad(lambda h, w: scale * plain(h, w, targets, counts), (0, 1))(hidden, table)
    for ours, theirs in zip(got, slow, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_large_logits_stay_finite():
    hidden, table, targets, counts = problem(2, 9)
    got, gradients = jax.value_and_grad(linear_nll, (0, 1))(
        hidden * 100, table * 100, targets, counts
    )
    wanted = plain(hidden * 100, table * 100, targets, counts)
    assert float(got) == pytest.approx(float(wanted), rel=1e-5)
    assert all(np.isfinite(g).all() for g in gradients)


def test_bfloat16_hidden_states_keep_a_float32_loss_and_their_own_dtypes():
    hidden, table, targets, counts = problem(2, 9)
    got, gradients = jax.value_and_grad(linear_nll, (0, 1))(
        hidden.astype(jnp.bfloat16), table, targets, counts
    )
    assert got.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
    # bfloat16 keeps 8 bits of inputs of order 1, over sums of 8 products.
    assert float(got) == pytest.approx(float(plain(hidden, table, targets, counts)), rel=2e-2)


def test_token_nll_equals_log_softmax():
    hidden, table, targets, _ = problem(2, 5)
    logits = hidden @ table.T
    wanted = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), np.asarray(targets)[..., None], -1
    )[..., 0]
    np.testing.assert_allclose(token_nll(logits, targets), wanted, atol=1e-5)


# Whole sequences --------------------------------------------------------------------------------


def slow_sequences(nll, counts, segment, num_segments):
    """[B, S] token by token, in float64."""
    out = np.zeros((len(nll), num_segments))
    for b, t in np.ndindex(nll.shape):
        if counts[b, t] and 0 < segment[b, t] <= num_segments:
            out[b, segment[b, t] - 1] -= nll[b, t]
    return out


@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.5, 1.0]))
def test_sequence_logprobs_equal_loops(seed, share):
    rng = np.random.default_rng(seed)
    nll = rng.normal(size=(4, 9)).astype(np.float32)
    counts, segment = rng.random((4, 9)) < share, rng.integers(0, 5, (4, 9)).astype(np.int32)
    nll[~counts] = rng.choice([np.nan, np.inf, 1.0])
    arrays = jnp.asarray(nll), jnp.asarray(counts)
    for most in (3, 6):
        found = sequence_logprobs(*arrays, jnp.asarray(segment), most)
        slow = slow_sequences(nll, counts, segment, most)
        np.testing.assert_allclose(found, slow, atol=1e-5)
    whole = slow_sequences(nll, counts, np.ones_like(segment), 1)[:, 0]
    np.testing.assert_allclose(sequence_logprobs(*arrays), whole, atol=1e-5)


def test_sequence_logprobs_keep_float32_and_gradients_finite():
    nll = jnp.asarray([[1.0, np.inf, 2.0], [np.nan, 3.0, 4.0]], jnp.bfloat16)
    counts = jnp.asarray([[True, False, True], [False, True, False]])
    found = sequence_logprobs(nll, counts)
    assert found.dtype == jnp.float32 and found.tolist() == [-3.0, -3.0]
    segment = jnp.asarray([[1, 1, 2], [1, 2, 2]], jnp.int32)
    assert sequence_logprobs(nll, counts, segment, 2).tolist() == [[-1.0, -2.0], [0.0, -3.0]]
    gradient = jax.grad(lambda x: jnp.sum(sequence_logprobs(x, counts, segment, 2)))(nll)
    np.testing.assert_array_equal(gradient, np.where(counts, -1.0, 0.0))
    with pytest.raises(ValueError, match="num_segments is None"):
        sequence_logprobs(nll, counts, segment)
