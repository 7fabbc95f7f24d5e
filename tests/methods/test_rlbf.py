"""RLBF: its recipe, and one step of collecting on a tiny random model."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.smoke import get_config
from rlbf_jax.critics.base import Span, Verdict
from rlbf_jax.data.schema import Prompt
from rlbf_jax.directives import Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.methods import rlbf
from rlbf_jax.methods.rlbf import (
    Collector,
    ReinforcementConfig,
    RlbfConfig,
    improve,
    reinforcement_stage,
)
from rlbf_jax.objectives.trajectory_reward import RewardConfig
from rlbf_jax.parallel.mesh import make_mesh
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.sampling.engine import Engine, generation_of
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig
from rlbf_jax.training import guards
from rlbf_jax.training.journal import read_journal
from rlbf_jax.training.loop import Loop
from rlbf_jax.training.optimizer import OptimizerConfig
from rlbf_jax.training.policy import (
    ALGORITHMS,
    Algorithm,
    Measured,
    PolicyConfig,
    PolicyGradient,
    init_policy,
)
from rlbf_jax.training.rollouts import Rollout
from rlbf_jax.training.supervised import Rows
from tests.fakes import LetterTokenizer, random_model

CONFIG = get_config()

# The recipe -------------------------------------------------------------------------------------


def stages(e=CONFIG):
    return {stage.name: stage for stage in e.method.stages(e)}


def test_the_recipe_and_its_baselines():
    assert list(stages()) == [
        *("tokenizer", "pretraining_data", "bsafe_plus_data", "refusal_data"),
        *("base", "refusal_sft", "sft", "sft_control", "rlbf"),
    ]
    assert list(stages(CONFIG.replace(baselines=False))) == [
        *("tokenizer", "pretraining_data", "bsafe_plus_data", "base", "sft", "rlbf"),
    ]
    assert stages()["sft_control"].config.start == "sft"
    assert {name for name, stage in stages().items() if stage.headline} == {"base", "sft", "rlbf"}


def test_the_control_makes_as_many_updates_as_reinforcement():
    e = CONFIG.changed({"reinforcement.steps": 5, "reinforcement.updates_per_step": 3})
    control = e.method.control
    assert control.steps == 15 and control.batch_size == e.method.sft.batch_size
    assert control.optimizer.schedule == e.method.reinforcement.optimizer.schedule
    assert stages(e)["sft_control"].config.training == control


def test_the_stage_of_reinforcement_has_all_that_it_depends_on():
    stage = reinforcement_stage(CONFIG, CONFIG.method)
    assert stage.method == "rlbf_ppo" and stage.after[-1] == "sft"
    assert stage.config.reinforcement.policy.max_drawn == CONFIG.method.max_drawn
    assert stage.config.width == CONFIG.max_prompt + CONFIG.method.rollout_tokens
    assert stages(CONFIG.changed({"reinforcement.policy.algorithm": "grpo"}))["rlbf"].method == (
        "rlbf_grpo"
    )


def test_defaults_make_a_recipe():
    assert len(RlbfConfig().stages(Experiment(RlbfConfig()))) == 9
    for wrong in ({"rollout_budget": -1}, {"max_drawn": 0}, {"sft_examples": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RlbfConfig(**wrong)


# Collecting -------------------------------------------------------------------------------------

WIDTH, PROMPTS, SIZE = 40, ("a", "bb"), 3
STRICT_GUARDS = guards.GuardConfig(most_gap=1e-12)


class Letters(LetterTokenizer):
    def offsets(self, ids):
        return [(i, i + 1) for i in range(len(ids))]


TOKENIZER = Letters()


class EvenCritic:
    """Texts of an even length are clean."""

    name = "even"

    def judge(self, exchanges):
        return [Verdict(coherent=True, useful=len(e.text) % 2 == 0) for e in exchanges]


class Guidance:
    """Batches of plain text, numbered."""

    def __init__(self):
        self.next = 0

    def next_batch(self):
        rng = np.random.default_rng(self.next)
        self.next += 1
        responding = jnp.asarray(np.broadcast_to(np.arange(16) >= 4, (6, 16)))
        tokens = jnp.asarray(rng.integers(5, 20, (6, 16)), jnp.int32)
        return Rows(tokens, jnp.ones((6, 16), jnp.int32), responding, responding)

    def get_state(self):
        return self.next

    def set_state(self, state):
        self.next = state


def source(step):
    knobs = Knobs(max_tokens=20, budget=4, control_bias={"categories": 2.0})
    return [Rollout(Request(f"{p}{'x' * step}", (), knobs), Prompt(p, p)) for p in PROMPTS]


def collector(steps=3, seed=0, **fields):
    model, params = random_model(
        TOKENIZER, num_layers=1, width=16, num_heads=2, num_kv_heads=1, mlp_width=16
    )
    policy = PolicyConfig(algorithm="grpo", **fields.pop("policy", {}))
    config = ReinforcementConfig(
        steps=steps,
        prompts_per_step=len(PROMPTS),
        group_size=SIZE,
        updates_per_step=2,
        policy=policy,
        reward=fields.pop("reward", RewardConfig()),
        optimizer=OptimizerConfig(schedule="linear", learning_rate=1e-2, warmup_steps=0),
        checkpoint_every=2,
        kl_every=2,
        **fields,
    )
    shapes = SamplerConfig(Semantics.REWIND, batch_size=6, min_context=12, min_room=20)
    return Collector(
        config,
        PolicyGradient(model, TOKENIZER.controls.rule(), Semantics.REWIND, policy),
        Sampler(model, TOKENIZER, shapes, rule=TOKENIZER.controls.rule()),
        EvenCritic(),
        source,
        Guidance(),
        params,
        WIDTH,
        make_mesh(devices=jax.devices()[:1]),
        seed,
    )


def first_params(collect):
    return init_policy(collect.reference, collect.gradient.model, jax.random.key(9))


def test_a_step_collects_groups_rewards_and_measurements():
    collect = collector()
    collected = collect(first_params(collect), (), 0)
    rows = collected.rows["rollouts"]
    assert [row["prompt"] for row in rows] == [p for p in PROMPTS for _ in range(SIZE)]
    assert collected.metrics["reward"] == pytest.approx(np.mean([row["reward"] for row in rows]))
    assert collected.metrics["kl_content"] == pytest.approx(0, abs=1e-6)
    assert collected.metrics["sampler_gap"] < 1e-5
    batches = list(collected.batches)
    assert len(batches) == 2 and collect.guidance.next == 2
    for batch in batches:
        assert batch.traces.tokens.shape == (6, WIDTH)
    # The rollouts are the same over a step's updates, their guidance is not.
    assert batches[0].measured is batches[1].measured
    assert (batches[0].guidance.tokens != batches[1].guidance.tokens).any()
    reward = np.asarray([row["reward"] for row in rows]).reshape(2, SIZE)
    wanted = (reward - reward.mean(1, keepdims=True)) / (reward.std(1, keepdims=True) + 1e-4)
    measured = jax.tree.map(np.asarray, batches[0].measured)
    for row, value in enumerate(wanted.reshape(-1)):
        got = measured.advantage[row][measured.action[row]]
        np.testing.assert_allclose(got, value, atol=1e-4)


def test_the_samplers_word_saves_the_pass_and_changes_nothing_but_last_digits():
    """With `policy.behavior` sampler, steps between those that are looked at measure nothing."""
    scorer, sampler = collector(), collector(policy={"behavior": "sampler"})
    params = first_params(scorer)
    for step, looked_at in ((0, True), (1, False)):
        one, found = (collect(params, (), step) for collect in (scorer, sampler))
        assert one.rows == found.rows
        assert ("sampler_gap" in found.metrics) is ("kl_content" in found.metrics) is looked_at
        wanted, got = (next(iter(c.batches)).measured for c in (one, found))
        same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), wanted, got)
        assert same._replace(behavior=True, reference=True) == Measured(*[True] * 6)
        assert same.behavior is looked_at
        action = np.asarray(got.action)
        np.testing.assert_allclose(got.behavior[action], wanted.behavior[action], atol=1e-5)


def test_ppo_needs_the_pass():
    with pytest.raises(UserError, match="policy.behavior sampler is for GRPO"):
        PolicyConfig("ppo", behavior="sampler")


class Theirs:
    """An engine of another project: ids and log-probabilities are all that it gives."""

    def __init__(self, sampler):
        self.tokenizer, self.rule = sampler.tokenizer, sampler.rule
        self.ours = sampler

    def __call__(self, params, prompts, key=0):
        return [
            generation_of(
                g.request, g.prompt_ids.tolist(), np.asarray(g.trace.tolist()),
                np.asarray(g.logprobs.tolist()), self.rule, self.tokenizer,
            )
            for g in self.ours(params, prompts, key)
        ]  # fmt: skip


def test_rollouts_may_come_from_another_engine():
    collect = collector()
    params = first_params(collect)
    other = dataclasses.replace(collect, sampler=Theirs(collect.sampler))
    assert isinstance(other.sampler, Engine) and isinstance(collect.sampler, Engine)
    one, found = collect(params, (), 0), other(params, (), 0)
    assert found.rows == one.rows and found.metrics == one.metrics


def test_what_an_engine_gives_is_checked():
    request = Request("a", (), Knobs(max_tokens=4))
    for trace, logprobs in (([5, -1], [-1.0, -1.0]), ([5, 6], [-1.0, np.nan])):
        with pytest.raises(UserError, match="row 3 of theirs, emitted id 1"):
            generation_of(
                request, [1], np.asarray(trace), np.asarray(logprobs), TOKENIZER.controls.rule(),
                TOKENIZER,
                "row 3 of theirs",
            )  # fmt: skip


def test_guards_are_silent_in_a_healthy_run_and_change_nothing(heard):
    collect = collector()
    params = first_params(collect)
    for step in range(3):
        collect(params, (), step)
    assert heard == []
    strict = dataclasses.replace(collector(), guards=guards.Guards(STRICT_GUARDS))
    one, other = collect(params, (), 1), strict(params, (), 1)
    assert one.rows == other.rows and one.metrics == other.metrics
    assert len(heard) == 1 and "sampler and scorer differ" in heard[0]


def test_a_scorer_of_other_semantics_is_told_once(heard):
    collect = collector()
    params = first_params(collect)
    keep = dataclasses.replace(collect.gradient, semantics=Semantics.KEEP)
    wrong = dataclasses.replace(collect, gradient=keep)
    for step in range(2):
        wrong(params, (), step)
    (line,) = heard
    assert "sampler and scorer differ" in line and "semantics" in line


def test_rollouts_of_one_key_are_told_once(heard):
    collect = collector()
    params = first_params(collect)

    def alike(params, requests, key):
        return collect.sampler(params, [dataclasses.replace(r, id=0) for r in requests], key)

    same = SimpleNamespace(tokenizer=collect.sampler.tokenizer, rule=collect.sampler.rule)
    for step in range(2):
        sampler = type("One", (), {"__call__": staticmethod(alike), **vars(same)})()
        dataclasses.replace(collect, sampler=sampler)(params, (), step)
    assert ["drew the same ids" in line for line in heard] == [True]


def test_seams_are_asked_about_where_the_reward_reads_them():
    class Torn:
        name = "torn"

        def torn(self, answers):
            return [(True,) * len(answer.seams) for answer in answers]

    class Fond(EvenCritic):
        """All that was taken back was a violation, also nothing, and what is left is good."""

        def judge(self, exchanges):
            return [
                Verdict((Span(0, len(e.text) + 1, "one", complete=False),), True, True)
                for e in exchanges
            ]

    plain = dataclasses.replace(collector(), critic=Fond(), seams=Torn())
    strict = collector(reward=RewardConfig(torn_is_failed=True))
    strict = dataclasses.replace(strict, critic=Fond(), seams=Torn())
    params = first_params(plain)
    collected = [c(params, (), 0) for c in (plain, strict)]
    rows, others = (c.rows["rollouts"] for c in collected)
    erasing = np.mean([any(d["removed"] for d in row["directives"]) for row in rows])
    assert [c.metrics.get("torn") for c in collected] == [None, pytest.approx(erasing)]
    assert [r["trace"] for r in rows] == [r["trace"] for r in others]
    recovered = [i for i, r in enumerate(rows) if r["reward"] == 1.0 and r["directives"]]
    assert recovered
    for i, (row, other) in enumerate(zip(rows, others, strict=True)):
        erased = any(d["removed"] for d in row["directives"])
        assert other["reward"] == (-0.2 if i in recovered and erased else row["reward"])


@pytest.mark.parametrize("reads", [False, True])
def test_the_stage_hands_on_the_settings_seams_and_the_bounds(monkeypatch, tmp_path, reads):
    made, parts = [], collector()
    monkeypatch.setattr(rlbf, "improve", lambda collect, loop: made.append(collect))
    e = CONFIG.changed(
        {"reinforcement.reward.torn_is_failed": reads, "reinforcement.guards.flat_steps": 7}
    )
    run = SimpleNamespace(
        rule=lambda kind: parts.gradient.rule,
        tuned=lambda lora, rule: parts.gradient.model,
        trainable=lambda *what: parts.reference,
        batches=lambda *what: iter(()),
        critic=lambda config: EvenCritic(),
        setting=SimpleNamespace(seams=lambda run: "the setting's"),
        loop=lambda *what: None,
        keep=lambda *what, **notes: None,
        mesh=parts.mesh,
        tokenizer=TOKENIZER,
        world=None,
        folder=tmp_path,
        seed=3,
    )
    rlbf.reinforce(run, reinforcement_stage(e, e.method).config)
    (collect,) = made
    assert collect.seams == ("the setting's" if reads else None)
    assert (collect.seed, collect.guards.config.flat_steps) == (3, 7)


def test_what_is_collected_follows_from_seed_and_step():
    collect = collector()
    params = first_params(collect)
    one, other = collect(params, (), 1), collect(params, (), 1)
    assert one.rows == other.rows and one.metrics == other.metrics
    assert collector(seed=1)(params, (), 1).rows != one.rows
    assert collect(params, (), 2).rows != one.rows


def test_kl_is_measured_now_and_then_or_where_it_has_a_weight():
    collect = collector()
    params = first_params(collect)
    measured = ["kl_content" in collect(params, (), step).metrics for step in range(4)]
    assert measured == [True, False, True, False]
    weighted = collector(policy={"kl_weight": 0.1})
    assert all("kl_content" in weighted(params, (), step).metrics for step in (0, 1))


def test_reinforcement_trains_from_its_reference_and_goes_on_after_a_kill(tmp_path):
    def loop(folder, steps=3):
        return Loop(folder, "rlbf", steps, 2, make_mesh(devices=jax.devices()[:1]))

    collect = collector()
    before = jax.tree.map(np.array, collect.reference)
    whole = improve(collect, loop(tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, collect.reference, before)
    assert jax.tree.structure(whole) == jax.tree.structure(collect.reference)
    assert (np.asarray(whole["embedding"]) != before["embedding"]).any()
    assert len(read_journal(tmp_path / "whole" / "rollouts.jsonl")) == 3 * 6

    def struck(step):
        if step == 2:
            raise RuntimeError("struck")
        return source(step)

    with pytest.raises(RuntimeError, match="struck"):
        improve(dataclasses.replace(collector(), source=struck), loop(tmp_path / "struck"))
    again = improve(collector(), loop(tmp_path / "struck"))
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        one, other = (tmp_path / f / name for f in ("whole", "struck"))
        assert one.read_bytes() == other.read_bytes()


class Strict(EvenCritic):
    """Finds the vowels of a text, and each of them a violation."""

    def judge(self, exchanges):
        found = [[n for n, letter in enumerate(e.text) if letter in "aeiou"] for e in exchanges]
        return [
            Verdict(tuple(Span(n, n + 1, "one") for n in at), coherent=True, useful=True)
            for at in found
        ]


def mistaken(steps=5, share=0.5, **fields):
    """Makes mistakes, and keeps the last three."""
    fields = {"own_mistakes": share, "mistakes_kept": 3} | fields
    return dataclasses.replace(collector(steps=steps, **fields), critic=Strict())


def test_own_mistakes_are_replayed_and_a_struck_run_goes_on_to_the_bit(tmp_path):
    def loop(name):
        return Loop(tmp_path / name, "rlbf", 5, 2, make_mesh(devices=jax.devices()[:1]))

    whole = improve(mistaken(), loop("whole"))
    metrics = read_journal(tmp_path / "whole" / "metrics.jsonl")
    assert metrics[0]["replayed"] == 0 and sum(m["replayed"] for m in metrics) > 0
    assert sum(m["mistakes"] for m in metrics) > 3
    rows = read_journal(tmp_path / "whole" / "rollouts.jsonl")
    # A replayed rollout begins with what some rollout of an earlier step said.
    again = [row for row in rows if row["forced"]]
    for row in again:
        prefix = row["trace"][: row["forced"]]
        earlier = [r["trace"][: len(prefix)] for r in rows if r["step"] < row["step"]]
        assert prefix in earlier
    assert len(again) == round(sum(m["replayed"] for m in metrics) * 6)

    def struck(step):
        if step == 3:
            raise RuntimeError("struck")
        return source(step)

    with pytest.raises(RuntimeError, match="struck"):
        improve(dataclasses.replace(mistaken(), source=struck), loop("struck"))
    gone_on = improve(mistaken(), loop("struck"))
    jax.tree.map(np.testing.assert_array_equal, whole, gone_on)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        one, other = (tmp_path / f / name for f in ("whole", "struck"))
        assert one.read_bytes() == other.read_bytes()


class Told(Collector):
    """Whoever answers a prompt that begins with "a" is told the same."""

    def _judged(self, rollouts, generations):
        judged = super()._judged(rollouts, generations)
        return [
            dataclasses.replace(j, reward=0.5 if r.request.prompt[0] == "a" else len(g.trace) / 7)
            for r, g, j in zip(rollouts, generations, judged, strict=True)
        ]


def told(**fields):
    plain = collector(**fields)
    return Told(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain) if f.init})


def test_groups_that_teach_nothing_are_drawn_again_from_prompts_behind_the_last_step():
    plain = told()
    params = first_params(plain)
    before = plain(params, (), 0)
    for times in (1, 2):
        again = told(resample=times)
        found = again(params, (), 0)
        rows = found.rows["rollouts"]
        # Prompts of step 3 x times, in the place of "a"; the answers to "bb" stay.
        assert rows[SIZE:] == before.rows["rollouts"][SIZE:]
        assert [row["prompt"] for row in rows[:SIZE]] == ["a" + "x" * 3 * times] * SIZE
        assert found.metrics["redrawn"] == times / 2 and "redrawn" not in before.metrics
        assert again(params, (), 0).rows == found.rows
        measured = jax.tree.map(np.asarray, next(iter(found.batches)).measured)
        assert not measured.advantage[:SIZE].any() and measured.advantage[SIZE:].any()


def test_algorithms_stand_for_what_their_papers_say():
    chosen = {name: PolicyConfig(name).chosen for name in ALGORITHMS}
    assert chosen["ppo"] == Algorithm(None, "trajectory", None)
    assert chosen["dapo"] == Algorithm("standardized", "token", 0.28)
    assert chosen["dr_grpo"] == Algorithm("centered", "constant", None)
    assert chosen["rloo"].baseline == "leave_one_out"
    own = PolicyConfig("dapo", normalization="sequence", clip_high=0.3).chosen
    assert own == Algorithm("standardized", "sequence", 0.3)
    with pytest.raises(UserError, match="policy.ratio sequence"):
        PolicyConfig("ppo", ratio="sequence")


@pytest.mark.parametrize(
    "algorithm", ["dr_grpo", *(pytest.param(a, marks=pytest.mark.slow) for a in ("dapo", "rloo"))]
)
def test_every_algorithm_updates(algorithm, tmp_path):
    collect = collector(steps=1)
    policy = PolicyConfig(algorithm, kl_weight=0.1, kl_estimator="k2", ratio="sequence")
    config = dataclasses.replace(collect.config, policy=policy)
    gradient = dataclasses.replace(collect.gradient, config=policy)
    collect = dataclasses.replace(collect, config=config, gradient=gradient)
    after = improve(collect, Loop(tmp_path, "rlbf", 1, 2, collect.mesh))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after, collect.reference)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1


def test_no_share_remembers_nothing():
    assert collector().nothing == () and mistaken(share=0.0).nothing == ()
    assert mistaken().nothing.prefix.shape == (3, WIDTH)
    for wrong in ({"own_mistakes": 0.1}, {"resample": 1}):
        with pytest.raises(ValueError, match="staleness 1 with own_mistakes or resample"):
            ReinforcementConfig(staleness=1, **wrong)


def test_no_steps_keep_the_reference(tmp_path):
    collect = collector(steps=0)
    kept = improve(collect, Loop(tmp_path, "rlbf", 0, 2, collect.mesh))
    jax.tree.map(np.testing.assert_array_equal, kept, collect.reference)
