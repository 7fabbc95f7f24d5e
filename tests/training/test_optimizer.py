"""Learning rates at chosen steps, and the optimizer chain."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlbf_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer


def rates(schedule, steps=50, **fields):
    config = OptimizerConfig(
        learning_rate=0.2, schedule=schedule, warmup_steps=10, final_share=0.1, **fields
    )
    return [float(learning_rate(config, steps)(step)) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_and_every_update_of_it_learns(schedule):
    wanted = [*np.linspace(0.02, 0.2, 10), 0.2]
    np.testing.assert_allclose(rates(schedule)[:11], wanted, atol=1e-7)


def test_a_warm_up_of_one_update_is_none():
    one, none = (
        [float(learning_rate(OptimizerConfig(warmup_steps=w), 5)(t)) for t in range(3)]
        for w in (1, 0)
    )
    assert one[:2] == [pytest.approx(1e-3)] * 2 and none[0] == pytest.approx(1e-3)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_first_update_moves_parameters(name):
    config = OptimizerConfig(name=name, learning_rate=0.5, warmup_steps=5)
    assert (np.asarray(first_update(config, [3.0, -1.0, 4.0])) != 0).all()


def test_updates_that_end_inside_the_warm_up_are_said(capsys):
    for steps in (0, 5, 9):
        make_optimizer(OptimizerConfig(warmup_steps=5), steps, name="sft")
    assert capsys.readouterr().err == ""
    slow = OptimizerConfig(warmup_steps=9)
    make_optimizer(OptimizerConfig(warmup_steps=8), 6, {"value": slow}, name="sft")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("stage sft: 6 updates end inside a warm-up of 8, at 75% of the")
    assert second.startswith("stage sft: value 6 updates end inside a warm-up of 9, at 67%")
    make_optimizer(slow, 6)
    assert capsys.readouterr().err.startswith("6 updates end inside")


def test_after_warm_up_each_schedule_follows_its_formula():
    share = np.arange(41) / 40
    np.testing.assert_allclose(rates("linear")[10:], 0.2 - 0.18 * share, atol=1e-6)
    cosine = [0.2 * (0.1 + 0.9 * (1 + math.cos(math.pi * s)) / 2) for s in share]
    np.testing.assert_allclose(rates("cosine")[10:], cosine, atol=1e-6)
    np.testing.assert_allclose(rates("constant")[10:], 0.2, atol=1e-7)


def test_without_warm_up_the_first_step_has_the_peak():
    config = OptimizerConfig(learning_rate=0.2, warmup_steps=0)
    assert float(learning_rate(config, 5)(0)) == pytest.approx(0.2)


def first_update(config, gradient):
    optimizer = make_optimizer(config, 4)
    params = {"w": jnp.ones(3)}
    return optimizer.update({"w": jnp.asarray(gradient)}, optimizer.init(params), params)[0]["w"]


def test_gradients_are_clipped_by_their_global_norm():
    config = OptimizerConfig(
        name="sgd", learning_rate=0.5, schedule="constant", warmup_steps=0, clip_norm=1.0
    )
    np.testing.assert_allclose(first_update(config, [3.0, 0.0, 4.0]), [-0.3, 0.0, -0.4], atol=1e-6)
    np.testing.assert_allclose(first_update(config, [0.3, 0.0, 0.4]), [-0.15, 0.0, -0.2], atol=1e-6)
    unclipped = OptimizerConfig(
        name="sgd", learning_rate=0.5, schedule="constant", warmup_steps=0, clip_norm=0.0
    )
    np.testing.assert_allclose(
        first_update(unclipped, [3.0, 0.0, 4.0]), [-1.5, 0.0, -2.0], atol=1e-6
    )


def test_adamw_is_optaxs_with_our_numbers():
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", warmup_steps=0, clip_norm=0.0, weight_decay=0.3
    )
    plain = optax.adamw(0.1, b1=0.9, b2=0.99, weight_decay=0.3)
    params = {"w": jnp.ones(3)}
    wanted = plain.update({"w": jnp.asarray([3.0, -1.0, 0.5])}, plain.init(params), params)[0]["w"]
    np.testing.assert_allclose(first_update(config, [3.0, -1.0, 0.5]), wanted, atol=1e-7)
