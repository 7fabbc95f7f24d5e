"""Policy-gradient pieces against slow numpy twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.objectives.policy import (
    clipped_surrogate,
    generalized_advantages,
    group_advantages,
    kl_estimate,
    terminal_rewards,
    value_loss,
    whiten,
)

SEEDS = st.integers(0, 2**32 - 1)
NORMALIZATIONS = ["trajectory", "sequence", "token", "constant"]


def holes(rng, rows=5, time=9):
    """A mask with holes, and a row in which nothing counts."""
    mask = rng.random((rows, time)) < 0.6
    mask[0] = False
    return mask


# Group advantages -------------------------------------------------------------------------------


def slow_group_advantages(reward, scored, group, num_groups, eps):
    advantage, flat, counted = np.zeros(len(reward)), 0, 0
    for g in range(num_groups):
        members = [i for i in range(len(reward)) if group[i] == g and scored[i]]
        if not members:
            continue
        counted += 1
        values = np.asarray([reward[i] for i in members], np.float64)
        flat += values.std() < 1e-6
        for i in members:
            advantage[i] = (reward[i] - values.mean()) / (values.std() + eps)
    return advantage, flat, counted


@given(seed=SEEDS)
def test_group_advantages_equal_a_loop_over_groups(seed):
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 4, 12).astype(np.int32)
    reward = rng.choice([-1.0, -0.5, -0.23, 0.17, 1.0], 12).astype(np.float32)
    scored = rng.random(12) < 0.7
    reward[~scored] = np.nan
    got = group_advantages(
        jnp.asarray(reward), jnp.asarray(scored), jnp.asarray(group), 5, eps=1e-4
    )
    advantage, flat, counted = slow_group_advantages(reward, scored, group, 5, 1e-4)
    np.testing.assert_allclose(got.advantage, advantage, atol=2e-3, rtol=1e-3)
    assert (float(got.zero_variance.numerator), float(got.zero_variance.denominator)) == (
        flat,
        counted,
    )


def test_groups_of_one_and_flat_groups_teach_nothing_and_are_counted():
    reward = jnp.asarray([0.7, -0.2, -0.2, -0.2, 1.0, -1.0])
    group = jnp.asarray([0, 1, 1, 1, 2, 2])
    got = group_advantages(reward, jnp.ones(6, bool), group, 3)
    np.testing.assert_allclose(got.advantage[:4], 0.0, atol=1e-3)
    np.testing.assert_allclose(got.advantage[4:], [1.0, -1.0], atol=1e-3)
    assert float(got.zero_variance.mean) == pytest.approx(2 / 3)


EQUAL = (0.1, -0.7, 1 / 3, 1e4 + 0.1, 3e7)


@pytest.mark.parametrize("size", [1, 3, 7, 10])
@pytest.mark.parametrize("value", EQUAL)
def test_groups_of_equal_rewards_have_no_advantage_at_all(value, size):
    """Exactly, whatever the mean rounds to; beside them an unscored member and a group that
    varies."""
    reward = jnp.asarray([value] * size + [np.nan, 0.1, 0.2], jnp.float32)
    group = jnp.asarray([0] * (size + 1) + [1, 1], jnp.int32)
    got = group_advantages(reward, jnp.isfinite(reward), group, 2)
    assert (np.asarray(got.advantage[: size + 1]) == 0).all()
    assert (np.asarray(got.advantage[size + 1 :]) != 0).all()
    assert float(got.zero_variance.numerator) == 1


def test_some_mean_of_equal_rewards_is_not_the_reward():
    """What the test above guards against happens."""
    off = [
        float(jnp.sum(jnp.full(size, value, jnp.float32)) / size - np.float32(value))
        for value in EQUAL
        for size in (3, 7, 10)
    ]
    assert any(off)


@pytest.mark.parametrize("value", EQUAL)
def test_equal_values_whiten_to_zero_and_a_nan_stays(value):
    mask = jnp.arange(12).reshape(3, 4) < 7
    x = jnp.where(mask, jnp.float32(value), jnp.nan)
    assert (np.asarray(whiten(x, mask)) == 0).all()
    assert np.isnan(np.asarray(whiten(x.at[0, 0].set(jnp.nan), mask))).any()


def test_an_unscored_member_changes_nobody_elses_advantage():
    scored = jnp.asarray([True, True, False, True])
    with_it = group_advantages(
        jnp.asarray([0.3, -0.4, np.nan, 1.0]), scored, jnp.zeros(4, jnp.int32), 1
    ).advantage
    without = group_advantages(
        jnp.asarray([0.3, -0.4, 1.0]), jnp.ones(3, bool), jnp.zeros(3, jnp.int32), 1
    ).advantage
    np.testing.assert_allclose(np.asarray(with_it)[[0, 1, 3]], without, rtol=1e-6)
    assert with_it[2] == 0


# Generalized advantages -------------------------------------------------------------------------


def slow_gae(reward, value, action, lam):
    """By the definition: sum over later actions of lam^k times the temporal differences."""
    advantage = np.zeros(reward.shape)
    for b in range(reward.shape[0]):
        acts = [t for t in range(reward.shape[1]) if action[b, t]]
        values = [value[b, t] for t in acts] + [0.0]
        delta = [reward[b, t] + values[i + 1] - values[i] for i, t in enumerate(acts)]
        for i, t in enumerate(acts):
            advantage[b, t] = sum(lam**k * d for k, d in enumerate(delta[i:]))
    return advantage


@given(seed=SEEDS, lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_gae_equals_its_definition_with_holes_between_actions(seed, lam):
    rng = np.random.default_rng(seed)
    action = holes(rng)
    reward, value = rng.normal(size=(2, *action.shape)).astype(np.float32)
    advantage, returns = generalized_advantages(
        jnp.asarray(reward), jnp.asarray(value), jnp.asarray(action), lam
    )
    np.testing.assert_allclose(advantage, slow_gae(reward, value, action, lam), atol=1e-5)
    np.testing.assert_allclose(
        returns, np.where(action, slow_gae(reward, value, action, lam) + value, 0), atol=1e-5
    )


@given(seed=SEEDS)
def test_with_lambda_one_the_advantage_is_return_minus_value(seed):
    rng = np.random.default_rng(seed)
    action = holes(rng)
    final, value = (
        rng.normal(size=5).astype(np.float32),
        rng.normal(size=action.shape).astype(np.float32),
    )
    reward = terminal_rewards(jnp.asarray(final), jnp.asarray(action))
    advantage, returns = generalized_advantages(
        reward, jnp.asarray(value), jnp.asarray(action), 1.0
    )
    np.testing.assert_allclose(advantage, np.where(action, final[:, None] - value, 0), atol=1e-5)
    np.testing.assert_allclose(returns, np.where(action, final[:, None], 0), atol=1e-5)


def test_terminal_rewards_stand_on_the_last_action():
    action = np.asarray([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
    got = terminal_rewards(jnp.asarray([0.5, 9.0, -0.25]), jnp.asarray(action))
    np.testing.assert_array_equal(got, [[0, 0, 0.5, 0], [0, 0, 0, 0], [0, 0, 0, -0.25]])


@given(seed=SEEDS)
def test_whitened_values_have_zero_mean_and_unit_variance_where_they_count(seed):
    rng = np.random.default_rng(seed)
    mask = holes(rng)
    x = np.where(mask, rng.normal(3, 5, mask.shape), np.inf).astype(np.float32)
    got = np.asarray(whiten(jnp.asarray(x), jnp.asarray(mask)))
    assert (got[~mask] == 0).all()
    assert got[mask].mean() == pytest.approx(0, abs=1e-4)
    assert got[mask].std() == pytest.approx(1, abs=1e-3)
    assert not np.asarray(whiten(jnp.asarray(x), jnp.zeros_like(mask))).any()


# Surrogate, value, KL ---------------------------------------------------------------------------


def slow_surrogate(
    logprobs, behavior, advantage, action, clip, normalization, high=None, of="token"
):
    """The loss and the share of clipped ids, id by id."""
    rows, clipped = [], []
    high = clip if high is None else high
    for b in range(action.shape[0]):
        losses = []
        ratios = {
            t: float(logprobs[b, t]) - float(behavior[b, t]) for t in np.flatnonzero(action[b])
        }
        if of == "sequence":
            ratios = dict.fromkeys(ratios, np.mean(list(ratios.values())) if ratios else 0.0)
        for t, log_ratio in ratios.items():
            ratio, a = np.exp(log_ratio), float(advantage[b, t])
            losses.append(-min(ratio * a, min(max(ratio, 1 - clip), 1 + high) * a))
            clipped.append(not 1 - clip <= ratio <= 1 + high)
        rows.append(losses)
    rows = [r for r in rows if r]
    mean = {
        "token": lambda: np.mean([x for r in rows for x in r]),
        "sequence": lambda: np.mean([np.mean(r) for r in rows]),
        "trajectory": lambda: np.mean([np.sum(r) for r in rows]),
        "constant": lambda: np.mean([np.sum(r) / action.shape[1] for r in rows]),
    }[normalization]
    return mean(), np.mean(clipped)


@pytest.mark.parametrize("of", ["token", "sequence"])
@given(seed=SEEDS, normalization=st.sampled_from(NORMALIZATIONS))
def test_clip_higher_and_ratios_of_responses_equal_a_loop_over_ids(of, seed, normalization):
    rng = np.random.default_rng(seed)
    action = holes(rng)
    action[1, 2] = True
    draws = jnp.asarray(rng.normal(scale=0.4, size=(3, *action.shape)), jnp.float32)
    how = {"clip_high": 0.28, "ratio": of}
    loss, clipped = clipped_surrogate(*draws, jnp.asarray(action), 0.1, normalization, **how)
    wanted = slow_surrogate(*np.asarray(draws), action, 0.1, normalization, 0.28, of)
    assert float(loss.mean) == pytest.approx(wanted[0], abs=1e-4)
    assert float(clipped.mean) == pytest.approx(wanted[1], abs=1e-6)


@given(seed=SEEDS)
def test_the_gradient_of_a_response_s_ratio_is_that_of_gspo(seed):
    """One advantage a response, mean over its ids: grad of -min(s A, clip(s) A) for
    s = exp(mean log-ratio), written down without the detour over ids."""
    rng = np.random.default_rng(seed)
    action = jnp.asarray(holes(rng))
    logprobs, behavior = jnp.asarray(rng.normal(scale=0.2, size=(2, *action.shape)), jnp.float32)
    advantage = jnp.asarray(rng.normal(size=action.shape[0]), jnp.float32)

    def direct(x):
        count = jnp.sum(action, axis=1)
        mean = jnp.sum(jnp.where(action, x - behavior, 0), axis=1) / jnp.maximum(count, 1)
        s = jnp.exp(mean)
        loss = -jnp.minimum(s * advantage, jnp.clip(s, 0.9, 1.2) * advantage)
        return jnp.sum(jnp.where(count > 0, loss, 0)) / jnp.maximum(jnp.sum(count > 0), 1)

    def ours(x):
        wide = jnp.broadcast_to(advantage[:, None], action.shape)
        how = {"clip_high": 0.2, "ratio": "sequence"}
        return clipped_surrogate(x, behavior, wide, action, 0.1, "sequence", **how)[0].mean

    assert float(ours(logprobs)) == pytest.approx(float(direct(logprobs)), abs=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(logprobs), jax.grad(direct)(logprobs), atol=1e-5)


def test_constant_normalization_counts_the_ids_there_might_have_been():
    action = jnp.asarray([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    ones, zeros = jnp.ones((3, 4)), jnp.zeros((3, 4))
    of = lambda most: clipped_surrogate(zeros, zeros, ones, action, 0.2, "constant", most=most)[0]  # noqa: E731
    assert float(of(None).mean) == pytest.approx(-3 / (2 * 4))
    assert float(of(10).mean) == pytest.approx(-3 / (2 * 10))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@given(seed=SEEDS)
def test_surrogate_equals_a_loop_over_ids(normalization, seed):
    rng = np.random.default_rng(seed)
    action = holes(rng)
    action[1, 2] = True
    draws = jnp.asarray(rng.normal(scale=0.4, size=(3, *action.shape)), jnp.float32)
    loss, clipped = clipped_surrogate(*draws, jnp.asarray(action), 0.2, normalization)
    slow_loss, slow_clipped = slow_surrogate(*np.asarray(draws), action, 0.2, normalization)
    assert float(loss.mean) == pytest.approx(slow_loss, abs=1e-4)
    assert float(clipped.mean) == pytest.approx(slow_clipped, abs=1e-6)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_on_policy_the_gradient_is_that_of_the_policy_gradient_theorem(normalization):
    rng = np.random.default_rng(0)
    action = holes(rng)
    logprobs, advantage = jnp.asarray(rng.normal(size=(2, *action.shape)), jnp.float32)

    def loss(x):
        acts = jnp.asarray(action)
        return clipped_surrogate(x, logprobs, advantage, acts, 0.2, normalization)[0].mean

    weight = {
        "token": np.full(action.shape, 1 / action.sum()),
        "sequence": np.repeat(1 / (4 * np.maximum(action.sum(1, keepdims=True), 1)), 9, axis=1),
        "trajectory": np.full(action.shape, 1 / 4),
        "constant": np.full(action.shape, 1 / (4 * 9)),
    }[normalization]
    np.testing.assert_allclose(jax.grad(loss)(logprobs), -advantage * weight * action, atol=1e-6)


def test_beyond_the_clip_only_the_way_back_has_a_gradient():
    behavior = jnp.zeros((1, 4))
    logprobs = jnp.log(jnp.asarray([[1.5, 0.5, 1.5, 0.5]]))
    advantage = jnp.asarray([[1.0, -1.0, -1.0, 1.0]])

    def loss(x):
        return clipped_surrogate(x, behavior, advantage, jnp.ones((1, 4), bool), 0.2, "token")[
            0
        ].numerator

    np.testing.assert_allclose(jax.grad(loss)(logprobs), [[0.0, 0.0, 1.5, -0.5]], atol=1e-6)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("bad", [-np.inf, np.nan, 1e30])
def test_masked_infinities_leave_loss_and_gradient_finite(normalization, bad):
    rng = np.random.default_rng(1)
    action = jnp.asarray(holes(rng))
    draws = rng.normal(size=(3, *action.shape))
    logprobs, behavior, advantage = jnp.asarray(draws, jnp.float32)
    logprobs, behavior = jnp.where(action, logprobs, bad), jnp.where(action, behavior, -np.inf)

    def loss(x):
        return clipped_surrogate(x, behavior, advantage, action, 0.2, normalization)[0].mean

    value, gradient = jax.value_and_grad(loss)(logprobs)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert (np.asarray(gradient)[~np.asarray(action)] == 0).all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_batch_without_actions_costs_nothing(normalization):
    nothing = jnp.zeros((2, 3), bool)
    loss, clipped = clipped_surrogate(*jnp.ones((3, 2, 3)), nothing, 0.2, normalization)
    assert float(loss.mean) == float(clipped.mean) == 0.0


@given(seed=SEEDS, clip=st.sampled_from([0.0, 0.3]))
def test_value_loss_equals_a_loop_over_ids(seed, clip):
    rng = np.random.default_rng(seed)
    action = holes(rng)
    value, old, returns = rng.normal(size=(3, *action.shape)).astype(np.float32)
    slow = []
    for b, t in np.argwhere(action):
        error = (value[b, t] - returns[b, t]) ** 2
        if clip:
            near = old[b, t] + min(max(value[b, t] - old[b, t], -clip), clip)
            error = max(error, (near - returns[b, t]) ** 2)
        slow.append(error / 2)
    got = value_loss(
        jnp.asarray(value), jnp.asarray(old), jnp.asarray(returns), jnp.asarray(action), clip
    )
    assert float(got.mean) == pytest.approx(np.mean(slow) if slow else 0.0, abs=1e-5)


def test_kl_estimate_is_never_negative_and_unbiased():
    rng = np.random.default_rng(2)
    p, q = (jax.nn.log_softmax(jnp.asarray(x)) for x in rng.normal(size=(2, 6)).astype(np.float32))
    estimate = kl_estimate(p, q)
    assert (np.asarray(estimate) >= 0).all()
    exact = jnp.sum(jnp.exp(p) * (p - q))
    assert float(jnp.sum(jnp.exp(p) * estimate)) == pytest.approx(float(exact), abs=1e-6)


def test_kl_estimators_are_those_of_their_names():
    """k1 and k3 are unbiased; k2's gradient is the KL's, k1's is zero on average."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 6)).astype(np.float32)
    q = jax.nn.log_softmax(jnp.asarray(y))

    def exact(logits):
        p = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(p) * (p - q))

    def as_loss(logits, name):
        """What samples average to: the weights of what was drawn have no gradient."""
        p = jax.nn.log_softmax(logits)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(p)) * kl_estimate(p, q, name))

    wanted, gradient = jax.value_and_grad(exact)(jnp.asarray(x))
    found = {n: jax.value_and_grad(as_loss)(jnp.asarray(x), n) for n in ("k1", "k2", "k3")}
    for name in ("k1", "k3"):
        assert float(found[name][0]) == pytest.approx(float(wanted), abs=1e-6)
    np.testing.assert_allclose(found["k1"][1], 0, atol=1e-6)
    np.testing.assert_allclose(found["k2"][1], gradient, atol=1e-6)
    assert float(found["k2"][0]) > 0 and np.abs(found["k3"][1] - gradient).max() > 1e-3
    assert (kl_estimate(q, q, "k2") == 0).all()


@given(seed=SEEDS)
def test_baselines_of_groups_equal_loops_over_members(seed):
    rng = np.random.default_rng(seed)
    reward = rng.normal(size=9).astype(np.float32)
    scored, group = rng.random(9) < 0.8, np.sort(rng.integers(0, 3, 9)).astype(np.int32)
    arrays = jnp.asarray(reward), jnp.asarray(scored), jnp.asarray(group), 3
    centered = group_advantages(*arrays, baseline="centered").advantage
    left_out = group_advantages(*arrays, baseline="leave_one_out").advantage
    for row in range(9):
        mates = [i for i in range(9) if group[i] == group[row] and scored[i]]
        others = [reward[i] for i in mates if i != row]
        if not scored[row] or not others:
            assert centered[row] == left_out[row] == 0
            continue
        assert centered[row] == pytest.approx(reward[row] - np.mean(reward[mates]), abs=1e-5)
        assert left_out[row] == pytest.approx(reward[row] - np.mean(others), abs=1e-5)
