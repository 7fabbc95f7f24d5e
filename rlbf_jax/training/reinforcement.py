"""The reinforcement loop of RLBF: live rollouts, critic, reward, update.

One step: (1) prompts from the source; (2) rollouts of the current policy; (3) the critic judges
every final text and every text before a directive; (4) the trajectory reward; (5) one pass that
measures behavior, values and advantages; (6) a few clipped updates with SFT guidance; (7) every
rollout is written down.

Everything random follows from (seed, step), so a restarted run repeats itself to the bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlbf_jax.critics.base import Critic
from rlbf_jax.critics.judging import Judged, judge_generations
from rlbf_jax.data.schema import Prompt
from rlbf_jax.directives import Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.models.lora import join, split
from rlbf_jax.models.transformer import ModelConfig
from rlbf_jax.objectives.trajectory_reward import RewardConfig
from rlbf_jax.parallel.mesh import batch_sharding, replicated
from rlbf_jax.ranges import check_at_least, check_positive
from rlbf_jax.sampling.request import Generation, Request
from rlbf_jax.sampling.sampler import Sampler
from rlbf_jax.sampling.scoring import pack_traces, score
from rlbf_jax.training.optimizer import OptimizerConfig, make_optimizer
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
)
from rlbf_jax.training.stage import StageRun
from rlbf_jax.training.state import TrainState, init_state, make_update, means
from rlbf_jax.training.supervised import rows_of


@dataclasses.dataclass(frozen=True)
class ReinforcementConfig:
    """One reinforcement stage. Sizes and rates are ours: the paper publishes none."""

    steps: int = 60
    prompts_per_step: int = 12
    group_size: int = 8
    """Rollouts of one prompt (with the same forced ids and knobs)."""
    updates_per_step: int = 2
    """Passes over a step's rollouts."""
    accumulate: int = 1
    temperature: float = 1.0
    guidance_batch_size: int = 16
    """Packed SFT rows an update."""
    policy: PolicyConfig = PolicyConfig()
    reward: RewardConfig = RewardConfig()
    optimizer: OptimizerConfig = OptimizerConfig(schedule="linear")
    checkpoint_every: int = 20
    kl_every: int = 10
    """Steps between measurements of the KL to the reference (one more forward pass), where its
    weight is 0."""

    def __post_init__(self):
        check_at_least(self, 0, "steps")
        check_at_least(self, 1, "prompts_per_step", "group_size", "updates_per_step", "accumulate")
        check_at_least(self, 1, "guidance_batch_size", "checkpoint_every", "kl_every")
        # Greedy rollouts have no gradient.
        check_positive(self, "temperature")


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One prompt of a step, before it is copied `group_size` times."""

    request: Request
    prompt: Prompt


PromptSource = Callable[[int], Sequence[Rollout]]
"""step -> `prompts_per_step` rollouts, a pure function of the step."""


@dataclasses.dataclass(frozen=True)
class ReinforcementParts:
    """What the loop works with; built by a method."""

    model: ModelConfig
    sampler: Sampler
    critic: Critic
    source: PromptSource
    guidance: Any
    """Iterator of packed SFT rows with `get_state` / `set_state`."""
    length: int
    """T: width of a batch of traces, prompt included."""
    mesh: Mesh
    seed: int = 0

    @property
    def semantics(self) -> Semantics:
        return self.sampler.config.semantics


def train_reinforcement(
    config: ReinforcementConfig, parts: ReinforcementParts, params: dict, folder: Path, name: str
) -> dict:
    """Runs the stage from `params` (the SFT checkpoint, also the reference) and returns the
    decoder's parameters, or where it has adapters those of them alone."""
    model, rule, semantics = parts.model, parts.sampler.rule, parts.semantics
    reference = params
    trained, frozen = split(params)
    optimizer = make_optimizer(config.optimizer, config.steps * config.updates_per_step)
    key = jax.random.key(parts.seed)
    state = init_state(init_policy(trained, model, jax.random.fold_in(key, 1)), optimizer)
    update = make_update(
        lambda p, batch: policy_terms(model, rule, semantics, config.policy, p, batch),
        lambda batch: policy_denominators(config.policy, batch),
        policy_weights(config.policy),
        optimizer,
        parts.mesh,
        state,
        config.accumulate,
        {"model": frozen},
    )

    def whole(params: dict) -> dict:
        return {**params, "model": join(params["model"], frozen)}

    rows, everywhere = batch_sharding(parts.mesh), replicated(parts.mesh)

    @partial(jax.jit, out_shardings=(rows, everywhere))
    def measured(params, traces, reward, group, sampled):
        groups = config.prompts_per_step
        return measure(
            model, rule, semantics, config.policy, groups, params, traces, reward, group, sampled
        )

    @partial(jax.jit, out_shardings=(rows, everywhere))
    def compared(reference, traces, batch: Measured):
        read = score(model, reference, rule, traces, semantics, config.policy.max_drawn)
        batch = batch._replace(reference=read.logprobs)
        return batch, kl_terms(rule, traces, batch)

    run = StageRun(folder, name, config.steps, config.checkpoint_every, parts.mesh)
    first, state, extra = run.start(jax.tree.map(jnp.copy, state), ("rollouts",))
    if "guidance" in extra:
        parts.guidance.set_state(extra["guidance"])

    def step(state: TrainState, number: int) -> tuple[TrainState, dict[str, float]]:
        rollouts, group = _expand(parts.source(number), config)
        generations = parts.sampler(
            whole(state.params)["model"],
            [r.request for r in rollouts],
            jax.random.fold_in(key, 2 + number),
        )
        judged = judge_generations(
            parts.critic,
            generations,
            [r.prompt.topic for r in rollouts],
            parts.sampler.tokenizer,
            config.reward,
        )
        reward = rewards_of(judged, number)
        traces = jax.device_put(pack_traces(generations, rule, parts.length), rows)
        recorded = _recorded(generations, parts.length)
        batch, measures = measured(whole(state.params), traces, reward, group, recorded)
        if config.policy.kl_weight or number % config.kl_every == 0:
            batch, kl = compared(reference, traces, batch)
            measures |= kl
        losses = []
        for _ in range(config.updates_per_step):
            state, metrics = update(
                state, PolicyBatch(traces, batch, rows_of(next(parts.guidance)))
            )
            losses.append(means(metrics))
        run.journals["rollouts"].write_all(
            rollout_rows(number, rollouts, generations, judged, parts.sampler.rule)
        )
        averaged = {k: float(np.mean([loss[k] for loss in losses])) for k in losses[0]}
        measures_host = {k: float(t.mean) for k, t in jax.device_get(measures).items()}
        return state, reward_metrics(judged, generations) | averaged | measures_host

    state = run.loop(state, first, step, lambda: {"guidance": parts.guidance.get_state()})
    return jax.tree.map(jnp.asarray, state.params["model"])


def _expand(
    prompts: Sequence[Rollout], config: ReinforcementConfig
) -> tuple[list[Rollout], np.ndarray]:
    """Copies every prompt `group_size` times. Raises UserError for knobs that a policy gradient
    cannot use."""
    if len(prompts) != config.prompts_per_step:
        raise ValueError(
            f"the prompt source gave {len(prompts)} prompts, not {config.prompts_per_step}"
        )
    for rollout in prompts:
        knobs = rollout.request.knobs
        if knobs.top_k or knobs.top_p < 1 or knobs.min_p > 0 or knobs.temperature <= 0:
            raise UserError(
                "reinforcement samples with temperature and control bias only; top_k, top_p, "
                "min_p and greedy "
                "decoding draw from another distribution than the one that is trained"
            )
        most, free = config.policy.max_drawn, knobs.max_tokens - len(rollout.request.forced)
        if most is not None and free > most:
            raise ValueError(
                f"a prompt may draw {free} ids, policy.max_drawn is {most}: the rest would go "
                "unscored"
            )
    rollouts: list[Rollout] = []
    group: list[int] = []
    for number, rollout in enumerate(prompts):
        for _ in range(config.group_size):
            request = dataclasses.replace(rollout.request, id=len(rollouts))
            rollouts.append(dataclasses.replace(rollout, request=request))
            group.append(number)
    return rollouts, np.asarray(group, np.int32)


def rewards_of(judged: Sequence[Judged], step: int) -> np.ndarray:
    """[B] float32, NaN where the critic could not judge. Raises UserError if a judged response has
    no finite reward."""
    with np.errstate(over="ignore"):  # what does not fit into float32 is told below
        reward = np.asarray([j.reward for j in judged], np.float32)
    bad = [
        row
        for row, j in enumerate(judged)
        if j.outcome is not None and not np.isfinite(reward[row])
    ]
    if bad:
        raise UserError(
            f"step {step}: rollouts {bad[:5]} have rewards that are not finite; check the values "
            "in "
            "reinforcement.reward. The last good state is the newest checkpoint"
        )
    return reward


def _recorded(generations: Sequence[Generation], length: int) -> np.ndarray:
    """[B, T] log-probabilities as the sampler recorded them, 0 elsewhere."""
    recorded = np.zeros((len(generations), length), np.float32)
    for row, g in enumerate(generations):
        start = len(g.prompt_ids)
        recorded[row, start : start + len(g.trace)] = np.nan_to_num(g.logprobs)
    return recorded


def reward_metrics(judged: Sequence[Judged], generations: Sequence[Generation]) -> dict[str, float]:
    """Means over a step's rollouts; NaN-free, unjudged ones counted apart."""
    outcomes = [j.outcome for j in judged if j.outcome is not None]
    if not outcomes:
        raise UserError(
            "the critic could not judge a single rollout of this step; see its reasons in "
            "rollouts.jsonl"
        )

    def share(values) -> float:
        return float(np.mean([float(v) for v in values]))

    return {
        "reward": share(j.reward for j in judged if j.outcome is not None),
        "safe": share(o.final_safe for o in outcomes),
        "backtrack_rate": share(o.has_directive for o in outcomes),
        "needed": share(o.retracted_bad for o in outcomes if o.has_directive) if any(
            o.has_directive for o in outcomes
        ) else 0.0,
        "coherent": share(o.coherent for o in outcomes),
        "useful": share(o.useful for o in outcomes),
        "extra": share(o.extra for o in outcomes),
        "emitted": share(len(g.trace) - g.num_forced for g in generations),
        "unjudged": share(j.outcome is None for j in judged),
    }  # fmt: skip


def rollout_rows(number: int, rollouts, generations, judged, rule) -> list[dict]:
    """What is written down of every rollout."""
    rows = []
    for rollout, g, j in zip(rollouts, generations, judged, strict=True):
        rows.append(
            {
                "step": number,
                "prompt_id": rollout.prompt.id,
                "prompt": rollout.request.prompt,
                "forced": g.num_forced,
                "trace": g.trace.tolist(),
                "visible": g.text,
                "reward": None if np.isnan(j.reward) else j.reward,
                "judged": j.outcome is not None,
                "reason": next(
                    (v.reason for v in (j.final, *j.at_directives) if not v.judged), j.final.reason
                ),
                "spans": [[s.start, s.end, s.category, s.complete] for s in j.final.spans],
                "directives": [
                    {
                        "index": e.index,
                        "category": e.category,
                        "x": e.requested,
                        "removed": len(e.removed),
                        "spans": [[s.start, s.end, s.category, s.complete] for s in verdict.spans],
                    }
                    for e, verdict in zip(g.edits, j.at_directives, strict=True)
                ],
            }
        )
    return rows
