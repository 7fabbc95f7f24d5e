"""Masked sums against plain numpy, and against what stands in masked places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.objectives.masked import Term, masked_sum, masked_term, per_row_mean


@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_masked_sums_equal_loops(seed, share):
    rng = np.random.default_rng(seed)
    x, mask = rng.normal(size=(4, 7)).astype(np.float32), rng.random((4, 7)) < share
    term = masked_term(jnp.asarray(x), jnp.asarray(mask))
    kept = [x[b, t] for b in range(4) for t in range(7) if mask[b, t]]
    assert float(term.numerator) == pytest.approx(sum(kept), abs=1e-5)
    assert float(term.denominator) == len(kept)
    assert float(term.mean) == pytest.approx(np.mean(kept) if kept else 0.0, abs=1e-5)
    rows = [np.mean(x[b][mask[b]]) if mask[b].any() else 0.0 for b in range(4)]
    np.testing.assert_allclose(per_row_mean(jnp.asarray(x), jnp.asarray(mask)), rows, atol=1e-6)


@pytest.mark.parametrize("reduce", [masked_sum, lambda x, mask: jnp.sum(per_row_mean(x, mask))])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_masked_may_be_anything_and_has_no_gradient(reduce, bad):
    x = jnp.asarray([[1.0, bad, 3.0], [bad, bad, bad]])
    mask = jnp.asarray([[True, False, True], [False, False, False]])
    value, gradient = jax.value_and_grad(reduce)(x, mask)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[~np.asarray(mask)] == 0).all()
    assert (np.asarray(gradient)[np.asarray(mask)] > 0).all()


def test_a_term_over_nothing_is_zero():
    assert float(Term(jnp.float32(0), jnp.float32(0)).mean) == 0.0
