"""The one update that every trainer shares, on a linear model whose gradients are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlbf_jax.objectives.masked import masked_term
from rlbf_jax.parallel.mesh import make_mesh
from rlbf_jax.training.state import accumulated_gradients, init_state, make_update, means

WEIGHTS = {"error": 1.0, "size": 0.5}


def terms(params, batch):
    """Two terms with denominators of their own, and one that is a metric only."""
    x, y, mask = batch
    predicted = x @ params["w"]
    return {
        "error": masked_term(jnp.square(predicted - y), mask),
        "size": masked_term(jnp.square(predicted), jnp.ones_like(mask)),
        "seen": masked_term(predicted, mask),
    }


def denominators(batch):
    return {"error": jnp.sum(batch[2], dtype=jnp.float32), "size": jnp.float32(batch[2].size)}


def problem(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(rows, 3)), rng.normal(size=rows)
    mask = rng.random(rows) < 0.6
    mask[0] = True
    return {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}, tuple(
        map(jnp.asarray, (x, y, mask))
    )


def exact_gradient(params, batch):
    x, y, mask = (np.asarray(part, np.float64) for part in batch)
    predicted = x @ np.asarray(params["w"], np.float64)
    return 2 * ((predicted - y) * mask) @ x / mask.sum() + 0.5 * 2 * predicted @ x / len(y)


def updater(optimizer, params, accumulate=1):
    return make_update(
        terms, denominators, WEIGHTS, optimizer, make_mesh(devices=jax.devices()[:1]),
        init_state(params, optimizer), accumulate,
    )  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_gradients_do_not_depend_on_the_number_of_microbatches(accumulate):
    params, batch = problem()
    got, sums = accumulated_gradients(
        terms, WEIGHTS, denominators(batch), params, batch, accumulate
    )
    np.testing.assert_allclose(got["w"], exact_gradient(params, batch), atol=1e-6)
    whole = terms(params, batch)
    for name, term in sums.items():
        np.testing.assert_allclose(term.numerator, whole[name].numerator, rtol=1e-5)
        assert term.denominator == whole[name].denominator


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_an_update_is_a_hand_written_optax_step(accumulate):
    params, batch = problem()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    gradient = {"w": jnp.asarray(exact_gradient(params, batch), jnp.float32)}
    updates, opt_state = optimizer.update(gradient, optimizer.init(params), params)
    wanted = optax.apply_updates(params, updates)
    update = updater(optimizer, params, accumulate)
    state, metrics = update(init_state(jax.tree.map(jnp.copy, params), optimizer), batch)
    np.testing.assert_allclose(state.params["w"], wanted["w"], atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.opt_state, opt_state
    )
    assert int(state.step) == 1 and bool(metrics.finite)
    assert float(metrics.grad_norm) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)


def test_metrics_are_means_over_what_counted():
    params, batch = problem()
    _, metrics = updater(optax.sgd(0.1), params)(
        init_state(jax.tree.map(jnp.copy, params), optax.sgd(0.1)), batch
    )
    x, y, mask = map(np.asarray, batch)
    host = means(metrics)
    assert set(host) == {"error", "size", "seen", "grad_norm"}
    assert host["error"] == pytest.approx(
        np.mean(((x @ np.asarray(params["w"]) - y) ** 2)[mask]), rel=1e-5
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_poisoned_batch_leaves_the_state_as_it_was(bad, accumulate):
    params, (x, y, mask) = problem()
    optimizer = optax.adam(0.1)
    update = updater(optimizer, params, accumulate)
    state, _ = update(init_state(jax.tree.map(jnp.copy, params), optimizer), (x, y, mask))
    before = jax.tree.map(np.array, state)
    after, metrics = update(state, (x, y.at[0].set(bad), mask))
    assert not bool(metrics.finite)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, after), before)
    after, metrics = update(after, (x, y, mask))
    assert bool(metrics.finite) and int(after.step) == 2
