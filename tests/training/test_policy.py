"""The reinforcement update on a tiny random model: who is an action, who is praised, and where
probabilities go."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlbf_jax.critics.base import Verdict
from rlbf_jax.critics.judging import Judged
from rlbf_jax.data.schema import Prompt
from rlbf_jax.directives import Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.objectives.trajectory_reward import Outcome
from rlbf_jax.parallel.mesh import make_mesh
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig
from rlbf_jax.sampling.scoring import pack_traces
from rlbf_jax.training.policy import (
    Measured,
    PolicyBatch,
    PolicyConfig,
    init_policy,
    kl_terms,
    measure,
    policy_denominators,
    policy_terms,
    policy_weights,
    read_traces,
)
from rlbf_jax.training.rollouts import (
    Rollout,
    bounded,
    check_rollouts,
    in_groups,
    recorded_logprobs,
    reward_metrics,
    rewards_of,
    rollout_rows,
)
from rlbf_jax.training.state import init_state, make_update
from rlbf_jax.training.supervised import Rows
from tests.fakes import LetterTokenizer, random_model

TIME, GROUPS, SIZE = 40, 3, 4
FORCED = (5, 6, 7)


@functools.cache
def rollouts():
    """12 responses of 3 prompts, the second with forced ids, and the model that drew them."""
    tokenizer = LetterTokenizer()
    config, params = random_model(
        tokenizer, num_layers=1, width=16, num_heads=2, num_kv_heads=1, mlp_width=16
    )
    knobs = Knobs(max_tokens=20, budget=4, control_bias={"categories": 2.0})
    requests = [
        Request(prompt, FORCED if prompt == "bb" else (), knobs)
        for prompt in ("a", "bb", "ccc")
        for _ in range(SIZE)
    ]
    sampler = Sampler(
        config,
        tokenizer,
        SamplerConfig(Semantics.REWIND, batch_size=12, min_context=12, min_room=20),
    )
    generations = sampler(params, requests, 5)
    assert sum(len(edit.removed) for g in generations for edit in g.edits) > 10
    traces = pack_traces(generations, tokenizer.controls.rule(), TIME)
    policy = init_policy(params, config, jax.random.key(1))
    group = np.repeat(np.arange(GROUPS, dtype=np.int32), SIZE)
    return SimpleNamespace(
        model=config, rule=tokenizer.controls.rule(), policy=policy, generations=generations,
        traces=traces, group=group, sampled=recorded_logprobs(generations, TIME),
    )  # fmt: skip


@functools.cache
def jitted(config):
    r = rollouts()
    return jax.jit(functools.partial(measure, r.model, r.rule, Semantics.REWIND, config, GROUPS))


def measured(config, reward):
    r = rollouts()
    got, metrics = jitted(config)(
        r.policy,
        r.traces,
        jnp.asarray(reward, jnp.float32),
        r.group,
        r.sampled,
    )
    return jax.tree.map(np.asarray, got), {k: float(v.mean) for k, v in metrics.items()}


REWARD = [1.0, -1.0, -0.2, 0.7, -0.5, 1.0, 1.0, -0.2, 0.1, 0.2, 0.3, 0.4]


def actions_by_hand():
    """[B, T] from the generations alone: the drawn ids, retracted ones included."""
    action = np.zeros((GROUPS * SIZE, TIME), bool)
    for row, g in enumerate(rollouts().generations):
        first = len(g.prompt_ids) + g.num_forced
        action[row, first : len(g.prompt_ids) + len(g.trace)] = True
    return action


def erased_by_hand():
    """[B, T]: content ids that some directive took back, by replaying each trace."""
    erased = np.zeros((GROUPS * SIZE, TIME), bool)
    for row, g in enumerate(rollouts().generations):
        visible = []
        for index, token in enumerate(g.trace):
            if rollouts().rule.is_retraction(token):
                keep = max(0, len(visible) - int(rollouts().rule.amount(token)))
                erased[row, [len(g.prompt_ids) + i for i in visible[keep:]]] = True
                del visible[keep:]
            elif not rollouts().rule.is_control(token):
                visible.append(index)
    return erased


# Measuring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_only_drawn_ids_are_actions_and_retracted_ones_are(algorithm):
    got, metrics = measured(PolicyConfig(algorithm=algorithm), REWARD)
    np.testing.assert_array_equal(got.action, actions_by_hand())
    assert (got.advantage[~got.action] == 0).all()
    assert (got.advantage[got.action & erased_by_hand()] != 0).any()
    # Drawn by the same model, so the scorer agrees with the sampler.
    assert metrics["sampler_gap"] < 1e-5
    np.testing.assert_allclose(got.behavior[got.action], rollouts().sampled[got.action], atol=1e-4)


def test_kl_is_zero_against_oneself_and_apart_for_content_and_control_ids():
    r = rollouts()
    got, _ = measured(PolicyConfig(), REWARD)
    same = kl_terms(r.rule, r.traces, Measured(*map(jnp.asarray, got)))
    assert float(same["kl_content"].mean) == 0 == float(same["kl_control"].mean)
    action = np.asarray(got.action)
    control = action & np.asarray(r.rule.is_control(np.asarray(r.traces.tokens)))
    other = got._replace(reference=np.where(control, got.behavior - 0.5, got.behavior))
    terms = kl_terms(r.rule, r.traces, Measured(*map(jnp.asarray, other)))
    assert float(terms["kl_content"].mean) == pytest.approx(0, abs=1e-6)
    assert float(terms["kl_control"].mean) == pytest.approx(np.exp(-0.5) - 1 + 0.5, rel=1e-4)
    assert float(terms["kl_control"].denominator) == control.sum() > 0


def test_grpo_advantages_are_the_normalized_rewards_of_each_group():
    got, metrics = measured(PolicyConfig(algorithm="grpo"), REWARD)
    reward = np.asarray(REWARD).reshape(GROUPS, SIZE)
    wanted = (
        (reward - reward.mean(1, keepdims=True)) / (reward.std(1, keepdims=True) + 1e-4)
    ).reshape(-1)
    np.testing.assert_allclose(
        got.advantage, np.where(actions_by_hand(), wanted[:, None], 0), atol=1e-4
    )
    assert metrics["zero_variance"] == 0


def test_an_unscored_row_is_no_action_and_leaves_its_groups_mean():
    reward = np.asarray([np.nan, *REWARD[1:]])
    got, _ = measured(PolicyConfig(algorithm="grpo"), reward)
    assert not got.action[0].any() and not got.advantage[0].any()
    others = np.asarray(REWARD[1:4])
    wanted = (others - others.mean()) / (others.std() + 1e-4)
    np.testing.assert_allclose(
        [row[row != 0].mean() for row in got.advantage[1:4]], wanted, atol=1e-4
    )
    assert np.isfinite(got.returns).all()


def test_a_fresh_value_head_says_zero_and_returns_are_the_reward():
    got, _ = measured(PolicyConfig(algorithm="ppo", gae_lambda=1.0), REWARD)
    assert not got.value.any()
    np.testing.assert_allclose(
        got.returns, np.where(got.action, np.asarray(REWARD)[:, None], 0), atol=1e-6
    )
    assert got.advantage[got.action].mean() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_drop_positive_withholds_praise_from_retracted_ids_only(algorithm):
    config = PolicyConfig(algorithm=algorithm, gae_lambda=1.0)
    kept, _ = measured(config, REWARD)
    dropped, _ = measured(
        PolicyConfig(algorithm=algorithm, gae_lambda=1.0, retracted_advantage="drop_positive"),
        REWARD,
    )
    erased = erased_by_hand() & kept.action
    assert (kept.advantage[erased] > 0).any() and (kept.advantage[erased] < 0).any()
    np.testing.assert_allclose(
        dropped.advantage, np.where(erased, np.minimum(kept.advantage, 0), kept.advantage)
    )


def test_a_bound_on_drawn_ids_changes_nothing_where_it_holds():
    plain, _ = measured(PolicyConfig(algorithm="grpo"), REWARD)
    bounded, _ = measured(PolicyConfig(algorithm="grpo", max_drawn=20), REWARD)
    np.testing.assert_allclose(
        np.where(plain.action, plain.behavior, 0),
        np.where(plain.action, bounded.behavior, 0),
        atol=1e-5,
    )


# Updating ---------------------------------------------------------------------------------------


def guidance(rows=12):
    """Rows of plain text with everything after the prompt in the loss."""
    rng = np.random.default_rng(0)
    responding = np.broadcast_to(np.arange(16) >= 4, (rows, 16))
    return Rows(
        tokens=jnp.asarray(rng.integers(5, 20, (rows, 16)), jnp.int32),
        segment=jnp.ones((rows, 16), jnp.int32),
        in_response=jnp.asarray(responding),
        in_loss=jnp.asarray(responding),
    )


@functools.cache
def reader():
    r = rollouts()
    return jax.jit(lambda p: read_traces(r.model, p, r.rule, r.traces, Semantics.REWIND))


def one_step(config, measured_batch, learning_rate=1e-4, accumulate=1):
    """Parameters after one SGD update, and its metrics."""
    r = rollouts()
    optimizer = optax.sgd(learning_rate)
    mesh = make_mesh(devices=jax.devices()[:1])
    state = init_state(r.policy, optimizer)
    update = make_update(
        lambda p, b: policy_terms(r.model, r.rule, Semantics.REWIND, config, p, b),
        functools.partial(policy_denominators, r.rule, config),
        policy_weights(config),
        optimizer,
        mesh,
        state,
        accumulate,
    )
    batch = PolicyBatch(r.traces, jax.tree.map(jnp.asarray, measured_batch), guidance())
    after, metrics = update(jax.tree.map(jnp.copy, state), batch)
    return after.params, metrics


@pytest.mark.parametrize(
    ("algorithm", "normalization"), [("ppo", "trajectory"), ("grpo", "sequence"), ("grpo", "token")]
)
def test_one_step_raises_what_was_praised_and_lowers_what_was_blamed(algorithm, normalization):
    """A bandit: one good and one bad response per prompt, all others unscored."""
    config = PolicyConfig(algorithm=algorithm, normalization=normalization, sft_weight=0.0)
    reward = np.full(GROUPS * SIZE, np.nan)
    reward[[0, 4, 8]], reward[[1, 5, 9]] = 1.0, -1.0
    batch, _ = measured(config, reward)
    params, metrics = one_step(config, batch)
    assert bool(metrics.finite)
    before, after = (np.asarray(reader()(p)[0]) for p in (rollouts().policy, params))
    change = np.where(actions_by_hand(), after - before, 0).sum(axis=1)
    assert change[[0, 4, 8]].sum() > 0 > change[[1, 5, 9]].sum()
    # To first order, the surrogate falls: advantage-weighted log-probabilities go up.
    assert (batch.advantage * (after - before)).sum() > 0


def test_prompt_forced_and_unscored_ids_give_no_gradient():
    config = PolicyConfig(algorithm="grpo", sft_weight=0.0)
    batch, _ = measured(config, REWARD)
    poisoned = batch._replace(
        advantage=np.where(batch.action, 0.0, 1e6),
        behavior=np.where(batch.action, batch.behavior, -np.inf),
    )
    params, metrics = one_step(config, poisoned)
    assert bool(metrics.finite) and float(metrics.grad_norm) == 0.0
    jax.tree.map(np.testing.assert_array_equal, params, rollouts().policy)


def test_microbatches_do_not_change_the_update():
    config = PolicyConfig(kl_weight=0.1, entropy_weight=0.01)
    batch, _ = measured(config, REWARD)
    batch = batch._replace(reference=batch.behavior - 0.1)
    whole, _ = one_step(config, batch, 0.05)
    parts, _ = one_step(config, batch, 0.05, accumulate=3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole, parts)


def test_the_value_head_learns_towards_the_returns():
    config = PolicyConfig(algorithm="ppo", sft_weight=0.0, gae_lambda=1.0)
    batch, _ = measured(config, [1.0] * 12)
    params, metrics = one_step(config, batch, learning_rate=0.1)
    assert float(metrics.terms["value"].mean) == pytest.approx(0.5)
    value = np.asarray(reader()(params)[2])
    assert (value[batch.action] > 0).mean() > 0.95


def test_weights_name_only_terms_that_are_asked_for():
    assert policy_weights(PolicyConfig()) == {"policy": 1.0, "guidance": 1.0, "value": 1.0}
    grpo = PolicyConfig(algorithm="grpo", sft_weight=0.0, kl_weight=0.2, entropy_weight=0.01)
    assert policy_weights(grpo) == {"policy": 1.0, "kl": 0.2, "entropy": -0.01}


# Knobs that a policy gradient cannot use --------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"temperature": 0.0}]
)
def test_truncated_and_greedy_sampling_are_refused(fields):
    prompt = Rollout(Request("a", knobs=Knobs(**fields)), Prompt("1", "a"))
    with pytest.raises(UserError, match="temperature and control bias only"):
        check_rollouts([prompt], 1, None)


def test_a_group_shares_everything_but_its_row_keys():
    prompts = [
        Rollout(Request(text, FORCED, Knobs(temperature=0.8)), Prompt(text, text)) for text in "ab"
    ]
    check_rollouts(prompts, 2, None)
    rows, group = in_groups(prompts, 3)
    assert [r.request.prompt for r in rows] == list("aaabbb")
    assert [r.request.id for r in rows] == list(range(6))
    assert {r.request.forced for r in rows} == {FORCED} and {
        r.request.knobs.temperature for r in rows
    } == {0.8}
    np.testing.assert_array_equal(group, [0, 0, 0, 1, 1, 1])


def test_a_reward_that_is_not_finite_stops_the_run_and_an_unjudged_one_does_not():
    outcome, verdict = Outcome(False, False, True, True, True), Verdict()
    good, unjudged = Judged(0.5, outcome, verdict, ()), Judged(float("nan"), None, verdict, ())
    np.testing.assert_array_equal(
        rewards_of([good, unjudged], 3), np.asarray([0.5, np.nan], np.float32)
    )
    for value in (float("inf"), float("nan")):
        with pytest.raises(UserError, match=r"step 3: rollouts \[1\].*not finite"):
            rewards_of([good, Judged(value, outcome, verdict, ())], 3)


def test_a_prompt_that_may_draw_more_ids_than_are_scored_is_refused():
    forced = Rollout(Request("a", forced=(5, 6), knobs=Knobs(max_tokens=6)), Prompt("1", "a"))
    check_rollouts([forced], 1, 4)
    assert len(in_groups([forced], 2)[0]) == 2
    free = dataclasses.replace(forced, request=Request("a", knobs=Knobs(max_tokens=6)))
    with pytest.raises(ValueError, match="may draw 6 ids, policy.max_drawn is 4"):
        check_rollouts([free], 1, 4)
    check_rollouts([dataclasses.replace(free, request=bounded(free.request, 4))], 1, 4)
    assert bounded(forced.request, 4) == forced.request


def test_a_source_that_gives_another_number_of_prompts_is_refused():
    prompt = Rollout(Request("a"), Prompt("1", "a"))
    with pytest.raises(ValueError, match="gave 1 prompts, not 2"):
        check_rollouts([prompt], 2, None)


# What is written down ---------------------------------------------------------------------------


def judged_by(verdicts):
    """Judged responses: reward, safe in the end, with a directive that was needed or not."""
    return [
        Judged(reward, Outcome(directive, needed, safe, True, useful), Verdict(), ())
        for reward, directive, needed, safe, useful in verdicts
    ]


def test_metrics_are_means_over_judged_rollouts_alone():
    g = rollouts().generations[:3]
    judged = judged_by([(1.0, True, True, True, True), (-0.5, True, False, False, False)])
    judged.append(Judged(float("nan"), None, Verdict(), ()))
    metrics = reward_metrics(judged, g)
    emitted = np.mean([len(one.trace) - one.num_forced for one in g])
    assert metrics == pytest.approx(
        {
            "reward": 0.25, "safe": 0.5, "backtrack_rate": 1.0, "needed": 0.5, "coherent": 1.0,
            "useful": 0.5, "extra": 0.0, "emitted": emitted, "unjudged": 1 / 3,
        }
    )  # fmt: skip
    with pytest.raises(UserError, match="could not judge a single rollout"):
        reward_metrics(judged[2:], g[2:])


def test_rows_hold_what_was_sampled_and_judged():
    index = next(i for i, g in enumerate(rollouts().generations) if g.edits)
    g = rollouts().generations[index]
    rollout = Rollout(g.request, Prompt("p1", g.request.prompt))
    verdict = Verdict()
    judged = Judged(0.5, Outcome(True, True, True, True, True), verdict, (verdict,) * len(g.edits))
    unjudged = dataclasses.replace(judged, reward=float("nan"), outcome=None)
    row, other = rollout_rows(3, [rollout] * 2, [g] * 2, [judged, unjudged])
    assert (row["step"], row["prompt_id"], row["forced"]) == (3, "p1", g.num_forced)
    assert row["trace"] == g.trace.tolist() and row["visible"] == g.text
    assert [d["removed"] for d in row["directives"]] == [len(e.removed) for e in g.edits]
    assert [d["x"] for d in row["directives"]] == [e.requested for e in g.edits]
    assert (row["reward"], row["judged"]) == (0.5, True)
    assert (other["reward"], other["judged"]) == (None, False)
    json.dumps([row, other], allow_nan=False)
