"""RLBF: Reinforcement Learning with Backtracking Feedback (arXiv 2602.08377), with its baselines.

    data          tokenizer, BSAFE+ (injected violations and how to take them back), refusal data
    base          a small language model that sometimes violates; or a published checkpoint (`start_from`)
    refusal_sft   baseline: refuse harmful prompts, no directives
    sft           BSAFE+: learn the directive (paper section 3, step 1)
    rlbf          reinforcement on the model's own output, judged by a critic (step 2):
                  L = -J_RL + lambda_SFT L_guidance
    sft_control   baseline: SFT with as many extra updates as reinforcement makes

Every model is evaluated under the same attempts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from rlbf_jax.attacks import ATTACKS
from rlbf_jax.attacks.base import Attempt
from rlbf_jax.attacks.direct import AttackConfig
from rlbf_jax.data.world import FormSplit
from rlbf_jax.evaluation.suite import configured_attack
from rlbf_jax.runs.experiment import ExperimentConfig, RolloutMix
from rlbf_jax.runs.fit import check_fit, check_rows_suffice
from rlbf_jax.runs.stage import Stage
from rlbf_jax.runs.workspace import Workspace
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.training.reinforcement import (
    PromptSource,
    ReinforcementParts,
    Rollout,
    train_reinforcement,
)
from rlbf_jax.training.supervised import SupervisedConfig, train_supervised


def rlbf(config: ExperimentConfig) -> list[Stage]:
    """The recipe: train everything, then put every model under the same attacks."""
    models = {
        "base": base,
        "refusal_sft": refusal_sft,
        "sft": sft,
        "sft_control": sft_control,
        "rlbf": reinforce,
    }
    if not config.baselines:
        models = {name: models[name] for name in ("base", "sft", "rlbf")}
    return [
        Stage("data", prepare_data),
        *(Stage(name, run) for name, run in models.items()),
        *(
            Stage(f"evaluate_{name}", evaluation_of(name, method_name(config, name)))
            for name in models
        ),
    ]


def method_name(config: ExperimentConfig, stage: str) -> str:
    """`method` of a record: rlbf_ppo, rlbf_grpo, or the stage itself."""
    return f"rlbf_{config.reinforcement.policy.algorithm}" if stage == "rlbf" else stage


# Stages -----------------------------------------------------------------------------------------


def prepare_data(work: Workspace) -> None:
    work.build_tokenizer()
    check_fit(work, prompt_source(work))
    report = work.build_data()
    check_rows_suffice(work.config, {name: counts["rows"] for name, counts in report.items()})
    work.write_json("data/report.json", report)
    work.note_data({name: counts["sha256"] for name, counts in report.items()})


def base(work: Workspace) -> None:
    """Pretraining, violations mixed in: without them there would be nothing to take back. Or a
    checkpoint as it is."""
    if work.config.start_from:
        work.save_params("base", work.start_params())
    else:
        supervised(work, "base", work.config.pretraining, "pretraining", work.initial_params())


def refusal_sft(work: Workspace) -> None:
    supervised(work, "refusal_sft", work.config.refusal_sft, "refusal", work.trainable("base"))


def sft(work: Workspace) -> None:
    """BSAFE+: context = prompt + part1 + bridge + violation, loss on directive + part2 (and plain
    data)."""
    supervised(work, "sft", work.config.sft, "bsafe_plus", work.trainable("base"))


def sft_control(work: Workspace) -> None:
    """What the extra updates of reinforcement would do as plain SFT."""
    reinforcement = work.config.reinforcement
    extra = reinforcement.steps * reinforcement.updates_per_step
    # The guidance term sees `guidance_batch_size` rows an update; the control gets SFT's own
    # batches.
    optimizer = dataclasses.replace(
        work.config.sft.optimizer, schedule=reinforcement.optimizer.schedule
    )
    config = dataclasses.replace(work.config.sft, steps=extra, optimizer=optimizer)
    supervised(work, "sft_control", config, "bsafe_plus", work.trainable("sft"))


def reinforce(work: Workspace) -> None:
    """Live rollouts, critic, trajectory reward, policy gradient with SFT guidance."""
    config = work.config.reinforcement
    policy = dataclasses.replace(config.policy, max_drawn=work.config.max_drawn)
    config = dataclasses.replace(config, policy=policy)
    parts = ReinforcementParts(
        model=work.tuned,
        sampler=work.policy_sampler,
        critic=work.critic,
        source=prompt_source(work),
        guidance=work.batches("bsafe_plus", config.guidance_batch_size),
        length=work.config.max_prompt + work.config.rollout_tokens,
        mesh=work.mesh,
        seed=work.config.seed,
    )
    params = train_reinforcement(
        config, parts, work.trainable("sft"), work.stage_folder("rlbf"), "rlbf"
    )
    work.save_params("rlbf", params)


def evaluation_of(stage: str, method: str):
    def run(work: Workspace) -> None:
        work.evaluate(stage, method)

    return run


def supervised(
    work: Workspace, name: str, config: SupervisedConfig, data: str, params: dict
) -> None:
    """One supervised stage from `params`, on the data set named `data`."""
    trained = train_supervised(
        config,
        work.model if name == "base" else work.tuned,
        params,
        work.tokenizer.rule,
        work.semantics,
        work.batches(data, config.batch_size),
        work.stage_folder(name),
        name,
        work.mesh,
    )
    work.save_params(name, trained)


# Prompts of reinforcement -----------------------------------------------------------------------


def prompt_source(work: Workspace) -> PromptSource:
    """Plain and attacked prompts of the `train` pool in the configured shares, a pure function of
    (seed, step).

    Attacks have the geometry (options) that the evaluation's have, on other prompts and forms.
    """
    config = work.config
    knobs = Knobs(
        temperature=config.reinforcement.temperature,
        max_tokens=config.rollout_tokens,
        budget=config.rollout_budget,
    )
    kinds, weights = mix_of(config.rollouts)

    def source(step: int) -> Sequence[Rollout]:
        rng = np.random.default_rng([config.seed, 7, step])
        counts = rng.multinomial(config.reinforcement.prompts_per_step, weights)
        attempts: list[Attempt] = []
        for kind, count in zip(kinds, counts, strict=True):
            unseen_by_sft = rng.binomial(count, config.rollouts.rl_forms)
            shares: tuple[tuple[FormSplit, int], ...] = (
                ("rl", unseen_by_sft),
                ("sft", count - unseen_by_sft),
            )
            for split, n in shares:
                if n:
                    told = AttackConfig(pool="train", split=split, knobs=knobs)
                    attack = configured_attack(kind, config.evaluation)
                    attempts += attack(work.world, work.tokenizer, rng, int(n), told)
        return [
            Rollout(bounded(attempt.request, config.max_drawn), attempt.prompt)
            for attempt in attempts
        ]

    return source


def bounded(request: Request, drawn: int) -> Request:
    """The request with room for at most `drawn` free ids."""
    room = min(request.knobs.max_tokens, len(request.forced) + drawn)
    return dataclasses.replace(request, knobs=dataclasses.replace(request.knobs, max_tokens=room))


def mix_of(mix: RolloutMix) -> tuple[list[str], np.ndarray]:
    """Attack names and their probabilities."""
    kinds = [field.name for field in dataclasses.fields(mix) if field.name in ATTACKS]
    weights = np.asarray([getattr(mix, kind) for kind in kinds], np.float64)
    return kinds, weights / weights.sum()
