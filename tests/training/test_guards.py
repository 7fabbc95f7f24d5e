"""Guards of online training: each warns exactly once, and a healthy run hears nothing."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.sampling.request import Generation, Request
from rlbf_jax.training.guards import (
    GuardConfig,
    Guards,
    Look,
    all_flat,
    largest_gap,
    repeated_groups,
)

PROMPT, WIDTH = 2, 12


def row(ids, logprob=-3.0, forced=0) -> Generation:
    """A response of these ids, each drawn with one log-probability."""
    logprobs = np.full(len(ids), logprob, np.float32)
    logprobs[:forced] = np.nan
    return Generation(
        text="",
        trace=np.asarray(ids, np.int32),
        edits=(),
        logprobs=logprobs,
        visible=(),
        prompt_ids=np.zeros(PROMPT, np.int32),
        num_forced=forced,
        finished=False,
        malformed=0,
        request=Request("ask"),
    )


HEALTHY = ([5, 6, 7, 8], [5, 6, 7, 9], [1, 2, 3, 4], [1, 2, 3, 3])


def look(traces=HEALTHY, reward=(1, -1, 1, 1), gap=0.0, step=0, **fields) -> Look:
    generations = [row(ids) for ids in traces]
    recorded = np.zeros((len(traces), WIDTH), np.float32)
    for number, ids in enumerate(traces):
        recorded[number, PROMPT : PROMPT + len(ids)] = -3.0
    scored = jnp.asarray(recorded).at[0, PROMPT + 1].add(gap)
    rewards = np.asarray(reward, np.float32)
    group = np.asarray([0, 0, 1, 1], np.int32)
    return dataclasses.replace(Look(step, generations, group, rewards, recorded, scored), **fields)


def test_a_healthy_run_hears_nothing(heard):
    guards = Guards()
    for step in range(30):
        guards.look(look(step=step, gap=1e-5))
    assert heard == []


def test_rows_with_one_key_are_told_once(heard):
    guards = Guards()
    for step in range(3):
        guards.look(look(([5, 6, 7, 8, 9, 3, 2],) * 2 + HEALTHY[2:], step=step))
    (line,) = heard
    assert "step 0: all rollouts of 1 groups drew the same ids" in line and "8e-10" in line
    assert "Request.id" in line


def test_a_model_that_is_sure_may_repeat_itself(heard):
    sure = [row([5, 6, 7, 8, 9, 3, 2], -0.1)] * 2 + [row([1, 2]), row([1, 3])]
    Guards().look(look(generations=sure))
    assert heard == []
    # The chance is of all members but the first: e^-0.7.
    assert repeated_groups(look(generations=sure)) == [pytest.approx(math.exp(-0.7))]


def test_forced_ids_are_no_draws():
    alike = [row([5, 6, 7, 8], forced=3)] * 2 + [row([1, 2], forced=2)] * 2
    assert repeated_groups(look(generations=alike)) == [pytest.approx(math.exp(-3))]


@pytest.mark.parametrize(
    ("bfloat16", "gap", "warns"),
    [(False, 0.2, 1), (False, 0.05, 0), (True, 0.2, 0), (True, 1.5, 1), (False, math.nan, 1)],
)
def test_a_gap_between_sampler_and_scorer_is_told_once(heard, bfloat16, gap, warns):
    guards = Guards()
    for step in range(4):
        guards.look(look(gap=gap, step=step, bfloat16=bfloat16))
    assert len(heard) == warns
    for line in heard:
        assert f"differ by {gap:.3g} nats" in line and "edit rule, semantics" in line
        assert ("most_gap_bfloat16" in line) == bfloat16


def test_only_drawn_ids_are_compared():
    """A scorer may say anything of prompts, forced ids and padding."""
    seen = look()
    forced = [dataclasses.replace(g, num_forced=2) for g in seen.generations]
    noise = np.full(seen.recorded.shape, 9.0, np.float32)
    noise[:, PROMPT + 2 : PROMPT + 4] = seen.recorded[:, PROMPT + 2 : PROMPT + 4]
    assert (
        largest_gap(dataclasses.replace(seen, generations=forced, scored=jnp.asarray(noise))) == 0
    )
    assert largest_gap(dataclasses.replace(seen, scored=jnp.asarray(noise))) == 12


@given(st.integers(0, 2**32 - 1))
def test_the_largest_gap_by_loops(seed):
    rng = np.random.default_rng(seed)
    generations = [row(rng.integers(0, 9, rng.integers(1, 9)), forced=0) for _ in range(4)]
    generations = [
        dataclasses.replace(g, num_forced=int(rng.integers(0, len(g.trace) + 1)))
        for g in generations
    ]
    recorded = rng.normal(size=(4, WIDTH)).astype(np.float32)
    scored = rng.normal(size=(4, WIDTH)).astype(np.float32)
    largest = 0.0
    for r, g in enumerate(generations):
        for t in range(PROMPT + g.num_forced, PROMPT + len(g.trace)):
            largest = max(largest, abs(float(scored[r, t] - recorded[r, t])))
    seen = look(generations=generations, recorded=recorded, scored=jnp.asarray(scored))
    assert largest_gap(seen) == pytest.approx(largest)


def test_flat_rewards_are_told_after_some_steps_and_once(heard):
    guards = Guards(GuardConfig(flat_steps=3))
    for step, reward in enumerate([(1, 1, 0, 0)] * 2 + [(1, 0, 1, 1)] + [(1, 1, 0, 0)] * 2):
        guards.look(look(reward=reward, step=step))
    assert heard == []
    # Groups that cannot say neither count nor begin anew.
    guards.look(look(reward=(1, np.nan, np.nan, 1), step=5))
    assert heard == []
    for step in range(6, 12):
        guards.look(look(reward=(1, 1, -1, -1), step=step))
    (line,) = heard
    assert "step 6: for 3 steps no group" in line and "--reinforcement.temperature" in line


def test_groups_without_two_judged_members_cannot_be_flat():
    group = np.asarray([0, 0, 1, 1])
    nan = np.nan
    for reward, flat in [
        ((1, 1, 0, 0), True),
        ((1, 1, 0, 1), False),
        ((1, nan, 0, 0), True),
        ((1, nan, nan, 0), None),
        ((1, 1, nan, nan), True),
    ]:
        assert all_flat(np.asarray(reward, np.float32), group) is flat
    assert all_flat(np.ones(3, np.float32), np.arange(3)) is None


@pytest.mark.parametrize(
    "wrong", [{"most_gap": 0}, {"most_gap_bfloat16": -1}, {"least_chance": 2}, {"flat_steps": 0}]
)
def test_bounds_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GuardConfig(**wrong)


def test_rows_of_a_run_have_keys_of_their_own():
    """As `methods.rlbf` makes them: fold_in(fold_in(seed, 2 + step), request id)."""
    from rlbf_jax.training.rollouts import Rollout, in_groups

    prompts = [Rollout(Request(f"p{i}", id=7), None) for i in range(12)]
    rollouts, _ = in_groups(prompts, 8)
    ids = jnp.asarray([rollout.request.id for rollout in rollouts])
    assert len({int(i) for i in ids}) == len(rollouts) == 96
    steps = jnp.arange(300)

    @jax.jit
    def keys(seed):
        def of(step, row):
            return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(seed, 2 + step), row))

        return jax.vmap(lambda step: jax.vmap(lambda row: of(step, row))(ids))(steps)

    found = np.asarray(keys(jax.random.key(0))).reshape(-1, 2)
    assert len(np.unique(found, axis=0)) == len(found) == 300 * 96
