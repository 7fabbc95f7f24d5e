"""Learner and `train` on two parameters, against optax by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlbf_jax.objectives.masked import masked_term
from rlbf_jax.parallel.mesh import make_mesh
from rlbf_jax.training.journal import read_journal
from rlbf_jax.training.learner import Learner, Objective
from rlbf_jax.training.loop import Loop
from rlbf_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from rlbf_jax.training.supervised import train

CONFIG = OptimizerConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.01, clip_norm=0.5)
STEPS = 6
START = {"slope": 2.0, "log_z": -1.0}


def predicted(params, x):
    return params["slope"] * x + params["log_z"]


OBJECTIVE = Objective(
    lambda params, batch: {
        "error": masked_term(jnp.square(predicted(params, batch[0]) - batch[1]), batch[2]),
        "size": masked_term(jnp.square(params["slope"] * batch[0]), batch[2]),
        "seen": masked_term(predicted(params, batch[0]), batch[2]),
    },
    lambda batch: {k: jnp.sum(batch[2], dtype=jnp.float32) for k in ("error", "size")},
    {"error": 1.0, "size": 0.25},
)


def loss_by_hand(params, batch):
    x, y, mask = batch
    error = jnp.sum(mask * (predicted(params, x) - y) ** 2) / mask.sum()
    return error + 0.25 * jnp.sum(mask * (params["slope"] * x) ** 2) / mask.sum()


def params():
    return {name: jnp.float32(value) for name, value in START.items()}


def batch_of(number):
    rng = np.random.default_rng(number)
    x, y = rng.normal(size=(2, 4)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(y), jnp.asarray([True, True, number % 2 == 0, True])


def mesh():
    return make_mesh(devices=jax.devices()[:1])


class Numbered:
    """Batches 0, 1, 2, ..., set back to where they were."""

    def __init__(self, start=0):
        self.next = start

    def next_batch(self):
        self.next += 1
        return batch_of(self.next - 1)

    def get_state(self):
        return self.next

    def set_state(self, state):
        self.next = state


def by_hand(optimizer, steps=STEPS):
    """Parameters after each update, [steps + 1], and losses before each."""
    now = params()
    state, path, losses = optimizer.init(now), [now], []
    for number in range(steps):
        loss, gradient = jax.value_and_grad(loss_by_hand)(now, batch_of(number))
        updates, state = optimizer.update(gradient, state, now)
        now = optax.apply_updates(now, updates)
        path.append(now)
        losses.append(float(loss))
    return path, losses


def close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, **tolerance), one, other)


def chain(config, steps=STEPS):
    """As `make_optimizer` says, spelled out."""
    schedule = learning_rate(config, steps)
    core = (
        optax.sgd(schedule)
        if config.name == "sgd"
        else optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), core)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_updates_are_those_of_optax_by_hand(accumulate):
    path, losses = by_hand(chain(CONFIG))
    learner = Learner(OBJECTIVE, make_optimizer(CONFIG, STEPS), params(), mesh(), accumulate)
    for number, (after, loss) in enumerate(zip(path[1:], losses, strict=True)):
        metrics = learner.update(batch_of(number))
        terms = {name: float(term.mean) for name, term in metrics.terms.items()}
        assert terms["error"] + 0.25 * terms["size"] == pytest.approx(loss, rel=1e-5)
        assert set(terms) == {"error", "size", "seen"} and bool(metrics.finite)
        close(learner.params, after, atol=1e-6)
        assert int(learner.state.step) == number + 1
    close(learner.trained, path[-1], atol=1e-6)


def test_what_is_trained_is_a_copy():
    """A stage keeps it, and the next update reuses the learner's buffers."""
    learner = Learner(OBJECTIVE, make_optimizer(CONFIG, STEPS), params(), mesh())
    learner.update(batch_of(0))
    kept = learner.trained
    before = jax.tree.map(np.array, kept)
    learner.update(batch_of(1))
    jax.tree.map(np.testing.assert_array_equal, kept, before)


def test_frozen_parameters_are_read_and_stay():
    trained, frozen = {"slope": params()["slope"]}, {"log_z": params()["log_z"]}
    learner = Learner(OBJECTIVE, optax.sgd(0.1), trained, mesh(), frozen=frozen)
    now = params()
    for number in range(3):
        gradient = jax.grad(loss_by_hand)(now, batch_of(number))
        now = now | {"slope": now["slope"] - 0.1 * gradient["slope"]}
        learner.update(batch_of(number))
    close(learner.params, now, atol=1e-6)
    assert set(learner.trained) == {"slope"} and float(learner.params["log_z"]) == START["log_z"]
    moments = jax.tree.leaves(
        Learner(OBJECTIVE, optax.adam(0.1), {"slope": jnp.float32(2)}, mesh(), 1, frozen).state
    )
    assert len(moments) == 1 + 3 + 1  # the slope, its count and two moments, the step


def test_groups_have_optimizers_of_their_own():
    """And their own clipping: gradient norms of the groups are apart."""
    fast = OptimizerConfig(name="sgd", learning_rate=0.5, schedule="constant", warmup_steps=0)
    learner = Learner(OBJECTIVE, make_optimizer(CONFIG, STEPS, {"log_z": fast}), params(), mesh())
    rest, own = chain(CONFIG), chain(fast)
    now = params()
    parts = [{"slope": now["slope"]}, {"log_z": now["log_z"]}]
    states = [rest.init(parts[0]), own.init(parts[1])]
    for number in range(STEPS):
        gradient = jax.grad(loss_by_hand)(now, batch_of(number))
        for index, (optimizer, name) in enumerate(((rest, "slope"), (own, "log_z"))):
            updates, states[index] = optimizer.update(
                {name: gradient[name]}, states[index], parts[index]
            )
            parts[index] = optax.apply_updates(parts[index], updates)
        now = parts[0] | parts[1]
        learner.update(batch_of(number))
        close(learner.params, now, atol=1e-6)
    alike = by_hand(make_optimizer(CONFIG, STEPS))[0][-1]
    assert abs(float(alike["log_z"] - now["log_z"])) > 0.1


def test_a_group_that_no_parameter_belongs_to_is_refused():
    optimizer = make_optimizer(CONFIG, STEPS, {"logz": CONFIG})
    with pytest.raises(ValueError, match="optimizer group 'logz': parameters are slope, log_z"):
        Learner(OBJECTIVE, optimizer, params(), mesh())


# Training ---------------------------------------------------------------------------------------


def trained(folder, steps=STEPS, stop=None, batches=None):
    """`train` in a folder; with `stop` it is broken off after so many updates, as by a kill."""
    learner = Learner(OBJECTIVE, make_optimizer(CONFIG, STEPS), params(), mesh())
    if stop is not None:
        update = learner.update

        def struck(batch):
            if int(learner.state.step) == stop:
                raise RuntimeError("struck")
            return update(batch)

        learner.update = struck
    loop = Loop(folder, "toy", steps, 2, mesh())
    return train(learner, batches or Numbered(), loop)


def test_training_is_the_updates_and_writes_their_terms(tmp_path):
    path, losses = by_hand(chain(CONFIG))
    close(trained(tmp_path), path[-1], atol=1e-6)
    rows = read_journal(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS))
    got = [row["error"] + 0.25 * row["size"] for row in rows]
    np.testing.assert_allclose(got, losses, rtol=1e-5)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_struck_and_run_again_it_is_the_undisturbed_training_to_the_bit(tmp_path, stop):
    whole = trained(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="struck"):
        trained(tmp_path / "struck", stop=stop)
    again = trained(tmp_path / "struck")
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "struck")]
    assert metrics[0] == metrics[1]


def test_no_steps_give_the_first_parameters(tmp_path):
    assert jax.tree.map(float, trained(tmp_path, steps=0)) == START
