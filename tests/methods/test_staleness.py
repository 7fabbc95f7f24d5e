"""Reinforcement on rollouts of one step earlier: who draws what and when, and what it weighs."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from rlbf_jax.errors import UserError
from rlbf_jax.methods.reinforcement import ReinforcementConfig, improve
from rlbf_jax.parallel.mesh import make_mesh
from rlbf_jax.sampling.scoring import score
from rlbf_jax.training.journal import read_journal
from rlbf_jax.training.loop import Loop
from rlbf_jax.training.pending import Later, nothing_pending, pending_of, rollouts_of
from rlbf_jax.training.policy import policy_terms
from tests.methods.test_rlbf import (
    SIZE,
    TOKENIZER,
    WIDTH,
    EvenCritic,
    collector,
    first_params,
    source,
)

PATIENCE = 60


def moved(params, by=0.05):
    """Other parameters."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + by * rng.standard_normal(np.shape(x)).astype(np.float32), params
    )


def test_rollouts_come_back_from_their_arrays_bit_for_bit():
    collect = collector()
    requests = [r.request for r in collect._asked(1)[0]]
    drawn = collect._sampled(first_params(collect), requests, 1)
    assert any(g.edits for g in drawn)
    pending = jax.device_put(pending_of(drawn, WIDTH))
    again = rollouts_of(pending, requests, collect.sampler.rule, TOKENIZER)
    for one, other in zip(drawn, again, strict=True):
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            if isinstance(a, np.ndarray):
                np.testing.assert_array_equal(a, b)
                assert a.dtype == b.dtype
            else:
                assert a == b, field.name
    shapes = [jax.tree.map(np.shape, tree) for tree in (pending, nothing_pending(6, WIDTH))]
    assert shapes[0] == shapes[1] and not nothing_pending(6, WIDTH).ready
    with pytest.raises(ValueError, match="there is room for 3"):
        pending_of(drawn, 3)


def test_each_step_has_the_rollouts_that_the_parameters_before_have_drawn():
    fresh, stale = collector(), collector(staleness=1)
    old = first_params(fresh)
    new = moved(old)
    first = stale(old, stale.nothing, 0)
    assert first.rows == fresh(old, (), 0).rows  # there is nothing older
    second = stale(new, first.memory, 1)
    assert second.rows == fresh(old, (), 1).rows
    assert second.rows != fresh(new, (), 1).rows
    third = stale(new, second.memory, 2)
    assert third.rows == fresh(new, (), 2).rows
    assert bool(second.memory.ready) and not bool(third.memory.ready)  # the last of three steps


def test_the_ratio_is_to_what_was_recorded_when_they_were_drawn():
    """The policy term and its clipped share against a numpy twin, on parameters that have moved."""
    stale = collector(staleness=1)
    old = first_params(stale)
    memory = stale(old, stale.nothing, 0).memory
    new = moved(old, 0.02)
    batch = next(iter(stale(new, memory, 1).batches))
    gradient, m = stale.gradient, jax.tree.map(np.asarray, batch.measured)
    rule, semantics = gradient.rule, gradient.semantics
    requests = [r.request for r in stale._asked(1)[0]]
    drawn = stale._sampled(old, requests, 1)
    today = score(gradient.model, new["model"], rule, batch.traces, semantics).logprobs
    config, total, clipped, count = gradient.config, 0.0, 0, 0
    for row, g in enumerate(drawn):
        start = len(g.prompt_ids)
        terms = []
        for at in range(len(g.trace)):
            place = start + at
            if not m.action[row, place]:
                continue
            assert m.behavior[row, place] == g.logprobs[at]
            ratio = np.exp(float(today[row, place]) - float(g.logprobs[at]))
            bound = np.clip(ratio, 1 - config.clip, 1 + config.clip)
            advantage = float(m.advantage[row, place])
            terms.append(min(ratio * advantage, bound * advantage))
            clipped += ratio * advantage > bound * advantage
            count += 1
        total += sum(terms)  # `trajectory`: the sum of a row
    found = policy_terms(gradient.model, rule, semantics, config, new, batch)
    assert count > 20
    assert found["policy"].numerator == pytest.approx(-total, rel=1e-4, abs=1e-5)
    off = np.abs(np.asarray(today) - m.behavior)[m.action]
    assert off.max() > 0.01  # the parameters have moved, and it is seen


def test_the_critic_judges_while_the_next_rollouts_are_drawn():
    stale = collector(staleness=1)
    drawing, judged_in = threading.Event(), []

    class Waits(EvenCritic):
        def judge(self, exchanges):
            judged_in.append(threading.current_thread())
            assert drawing.wait(PATIENCE), "the next rollouts wait for the critic"
            return super().judge(exchanges)

    calls = []

    class Counts:
        tokenizer, rule = stale.sampler.tokenizer, stale.sampler.rule

        def __call__(self, params, prompts, key=0):
            calls.append(len(prompts))
            if len(calls) == 2:
                drawing.set()
            return stale.sampler(params, prompts, key)

    both = dataclasses.replace(stale, critic=Waits(), sampler=Counts())
    both(first_params(stale), stale.nothing, 0)
    assert calls == [2 * SIZE] * 2 and judged_in[0] is not threading.main_thread()


def test_the_critic_goes_on_while_the_parameters_are_updated():
    stale = collector(staleness=1)
    again, texts = threading.Event(), []

    class Notes(EvenCritic):
        def judge(self, exchanges):
            texts.append(len(exchanges))
            if len(texts) == 2:
                again.set()
            return super().judge(exchanges)

    noted = dataclasses.replace(stale, critic=Notes())
    old = first_params(stale)
    first = noted(old, noted.nothing, 0)
    assert again.wait(PATIENCE), "the next step's rollouts wait for the next step"
    second = noted(old, first.memory, 1)
    # Rollouts from a checkpoint, say, are judged anew, and to the same effect.
    copied = jax.tree.map(np.array, first.memory)
    assert noted(old, copied, 1).rows == second.rows == stale(old, copied, 1).rows


def test_what_the_critic_raises_is_raised():
    class Fails:
        name = "fails"

        def judge(self, exchanges):
            raise UserError("no key")

    stale = dataclasses.replace(collector(staleness=1), critic=Fails())
    with pytest.raises(UserError, match="no key"):
        stale(first_params(stale), stale.nothing, 0)
    with pytest.raises(KeyError, match="none"):
        Later("a test", lambda: {}["none"]).result()


def test_struck_and_run_again_it_is_the_undisturbed_training_to_the_bit(tmp_path):
    def loop(folder):
        return Loop(folder, "rlbf", 5, 2, make_mesh(devices=jax.devices()[:1]))

    whole = improve(collector(steps=5, staleness=1), loop(tmp_path / "whole"))
    assert len(read_journal(tmp_path / "whole" / "rollouts.jsonl")) == 5 * 2 * SIZE
    drawn = []

    def struck(step):
        drawn.append(step)
        if step == 4:
            raise RuntimeError("struck")
        return source(step)

    with pytest.raises(RuntimeError, match="struck"):
        other = dataclasses.replace(collector(steps=5, staleness=1), source=struck)
        improve(other, loop(tmp_path / "struck"))
    again = improve(collector(steps=5, staleness=1), loop(tmp_path / "struck"))
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        one, other = (tmp_path / f / name for f in ("whole", "struck"))
        assert one.read_bytes() == other.read_bytes()
    fresh = improve(collector(steps=5), loop(tmp_path / "fresh"))
    assert (np.asarray(fresh["embedding"]) != np.asarray(whole["embedding"])).any()


@pytest.mark.parametrize("wrong", [-1, 2])
def test_staler_than_one_step_is_refused(wrong):
    with pytest.raises(ValueError, match="staleness"):
        ReinforcementConfig(staleness=wrong)
