"""Step 2 of RLBF as training sees it: what a step collects, and how collecting and updating go on.

Rollouts, verdicts and one reward a response (`objectives.trajectory_reward`), measured in one pass
(`training.policy`), then updates on them. With `staleness` 1 the rollouts of a step are drawn one
step ahead, and the critic judges them while the parameters are updated and the next ones drawn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from rlbf_jax.critics.base import Critic
from rlbf_jax.critics.judging import Judged, judge_generations
from rlbf_jax.critics.seams import SeamCritic
from rlbf_jax.models.lora import split
from rlbf_jax.objectives.trajectory_reward import RewardConfig
from rlbf_jax.parallel.mesh import batch_sharding, replicated
from rlbf_jax.parallel.placing import placed
from rlbf_jax.plain import DECIDES_NOTHING
from rlbf_jax.ranges import check_at_least, check_between, check_positive
from rlbf_jax.sampling.engine import Engine
from rlbf_jax.sampling.request import Generation, Request
from rlbf_jax.sampling.scoring import pack_traces
from rlbf_jax.training.clock import Clock
from rlbf_jax.training.guards import GuardConfig, Guards, Look
from rlbf_jax.training.learner import Learner
from rlbf_jax.training.loop import Loop
from rlbf_jax.training.mistakes import no_mistakes, remember, replayed
from rlbf_jax.training.online import Collected, Remembered, train_online
from rlbf_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlbf_jax.training.pending import Later, Pending, nothing_pending, pending_of, rollouts_of
from rlbf_jax.training.policy import PolicyBatch, PolicyConfig, PolicyGradient, init_policy
from rlbf_jax.training.rollouts import (
    PromptSource,
    Rollout,
    check_rollouts,
    group_spreads,
    in_groups,
    is_flat,
    recorded_logprobs,
    reward_metrics,
    rewards_of,
    rollout_rows,
)
from rlbf_jax.training.supervised import Batches

M = TypeVar("M")


@dataclasses.dataclass(frozen=True)
class ReinforcementConfig:
    """Step 2. Sizes and rates are ours: the paper publishes none."""

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
    keep_checkpoints: int = dataclasses.field(default=1, metadata=DECIDES_NOTHING)
    """So many of the newest stay; more than one for who wants to look back."""
    kl_every: int = 10
    """Steps between measurements of the KL to the reference (one more forward pass),
    where its weight is 0; and of the scorer, where `policy.behavior` is `sampler`."""
    guards: GuardConfig = GuardConfig()
    resample: int = 0
    """So many times a step, groups whose rewards are all alike are replaced by groups of other
    prompts (DAPO's dynamic sampling, which goes on until there are none, and may never end)."""
    own_mistakes: float = 0.0
    """Share of a step's prompts that give way to the policy's own mistakes of earlier steps: a
    prefix at which the critic found a violation of its own, forced again (Self-ReSET's idea; the
    share is ours, 0 is the paper's)."""
    mistakes_kept: int = 256
    """So many of the newest, as many as theirs."""
    staleness: int = 0
    """0: each step draws its rollouts with the newest parameters, and waits for the critic. 1: they
    were drawn one step earlier, and judged during an update and the next drawing; the ratio of the
    policy gradient is then to the probabilities recorded by the sampler. For critics that take as
    long as sampling (an endpoint); the paper says nothing of it."""

    def __post_init__(self):
        check_at_least(self, 0, "steps")
        check_at_least(self, 1, "prompts_per_step", "group_size", "updates_per_step", "accumulate")
        check_at_least(self, 1, "guidance_batch_size", "checkpoint_every", "kl_every")
        check_at_least(self, 1, "keep_checkpoints")
        check_between(self, 0, 1, "staleness", "own_mistakes")
        check_at_least(self, 1, "mistakes_kept")
        check_at_least(self, 0, "resample")
        if self.staleness and (self.own_mistakes or self.resample):
            raise ValueError(
                "staleness 1 with own_mistakes or resample: rollouts that are drawn ahead know of "
                "no verdicts; set staleness or both of them to 0"
            )
        # Greedy rollouts have no gradient.
        check_positive(self, "temperature")


def improve(collect: Collector, loop: Loop) -> dict:
    """Trains from the collector's reference; returns the decoder's parameters, or where it has
    adapters those of them alone."""
    rl, gradient = collect.config, collect.gradient
    trained, frozen = split(collect.reference)
    learner = Learner(
        gradient.objective,
        policy_optimizer(rl, loop.name),
        init_policy(trained, gradient.model, jax.random.fold_in(collect.key, 1)),
        collect.mesh,
        rl.accumulate,
        {"model": frozen},
    )
    remembered = Remembered(("rollouts",), {"guidance": collect.guidance}, collect.nothing)
    return train_online(learner, collect, loop, remembered)["model"]


def policy_optimizer(rl: ReinforcementConfig, stage: str = "") -> optax.GradientTransformation:
    """The optimizer of all updates of reinforcement; without a stage's name it says nothing."""
    steps = rl.steps * rl.updates_per_step
    return make_optimizer(rl.optimizer, steps, name=stage, warn=bool(stage))


@dataclasses.dataclass(frozen=True)
class Collector:
    """One step of collecting: prompts, rollouts, verdicts, rewards, measurements.
    Everything random follows from (seed, step)."""

    config: ReinforcementConfig
    gradient: PolicyGradient
    sampler: Engine
    critic: Critic
    source: PromptSource
    guidance: Batches
    """SFT rows of L_SFT."""
    reference: dict
    """Parameters of the SFT model: where training starts, and what the KL is measured to."""
    width: int
    """Ids of a row of traces, prompt included."""
    mesh: Mesh
    seed: int
    seams: SeamCritic | None = None
    """Asked where the reward reads whether a text is torn."""
    guards: Guards = dataclasses.field(default_factory=Guards)
    _ahead: dict[int, tuple[Pending, Later[list[Judged]]]] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )
    """Step -> its rollouts and their judging, which has begun. Not checkpointed: what is judged
    follows from the rollouts."""

    @functools.cached_property
    def key(self) -> jax.Array:
        return jax.random.key(self.seed)

    @property
    def nothing(self) -> Any:
        """Memory of the first step."""
        rl = self.config
        if rl.own_mistakes:
            return self._kept(no_mistakes(rl.mistakes_kept, self.width))
        rows = rl.prompts_per_step * rl.group_size
        return self._kept(nothing_pending(rows, self.width)) if rl.staleness else ()

    def _kept(self, memory: M) -> M:
        return placed(memory, replicated(self.mesh))

    @functools.cached_property
    def measured(self) -> Callable:
        rl = self.config
        return self.gradient.measuring(rl.prompts_per_step, self.mesh, bool(rl.staleness))

    @functools.cached_property
    def taken(self) -> Callable:
        """`measured` with the sampler's word for it: no pass."""
        rl = self.config
        stale = bool(rl.staleness)
        return self.gradient.measuring(rl.prompts_per_step, self.mesh, stale, read=False)

    @functools.cached_property
    def compared(self) -> Callable:
        return self.gradient.comparing(self.mesh)

    def __call__(self, params: dict, memory: Any, step: int) -> Collected:
        rl, clock = self.config, Clock()
        rollouts, group = self._asked(step, memory)
        requests = [r.request for r in rollouts]
        if rl.staleness and bool(memory.ready):
            generations = rollouts_of(memory, requests, self.sampler.rule, self.sampler.tokenizer)
        else:
            with clock.part("sampling"):
                generations = self._sampled(params, requests, step)
        if rl.staleness:
            judging = self._begun(memory, rollouts, generations, step)
            with clock.part("sampling"):
                memory = self._drawn_ahead(params, step + 1)
            with clock.part("judging"):  # as far as it took longer
                judged = judging.result()
        else:
            with clock.part("judging"):
                judged = self._judged(rollouts, generations)
        asked = list(rollouts)
        redrawn = self._redrawn(params, step, rollouts, generations, judged, clock)
        reward = rewards_of(judged, step)
        metrics = reward_metrics(judged, generations)
        if rl.resample:
            metrics["redrawn"] = redrawn / rl.prompts_per_step
        if rl.own_mistakes:
            told = self.sampler.rule, self.sampler.tokenizer
            metrics["replayed"] = float(np.mean([r.origin[0] != step for r in asked]))
            memory, found = remember(memory, rollouts, generations, judged, *told)
            memory, metrics["mistakes"] = self._kept(memory), float(found)
        traces = pack_traces(generations, self.sampler.rule, self.width)
        traces = placed(traces, batch_sharding(self.mesh))
        recorded = recorded_logprobs(generations, self.width)
        with clock.part("measuring"):
            looked_at = step % rl.kl_every == 0
            measured = rl.policy.behavior == "scorer" or looked_at
            read = self.measured if measured else self.taken
            batch, measures = read(params, traces, reward, group, recorded)
            if rl.policy.kl_weight or looked_at:
                batch, kl = self.compared(self.reference, traces, batch)
                measures |= kl
            measures_host = {k: float(t.mean) for k, t in jax.device_get(measures).items()}

        def batches() -> Iterator[PolicyBatch]:
            for _ in range(rl.updates_per_step):
                yield PolicyBatch(traces, batch, self.guidance.next_batch())

        half = self.gradient.model.dtype == "bfloat16"
        self.guards.look(Look(step, generations, group, reward, recorded, batch.behavior, half))
        metrics |= measures_host
        rows = {"rollouts": rollout_rows(step, rollouts, generations, judged)}
        return Collected(batches(), metrics, rows, memory, clock.taken())

    def _asked(self, step: int, memory: Any = ()) -> tuple[list[Rollout], np.ndarray]:
        """The step's rollouts before they are drawn, and the group of each."""
        rl = self.config
        prompts = self._drawn(step)
        if rl.own_mistakes:
            rng = np.random.default_rng([self.seed, 11, step])
            encode, drawn = self.sampler.tokenizer.encode_prompt, rl.policy.max_drawn
            prompts = replayed(memory, prompts, self._drawn, rl.own_mistakes, rng, drawn, encode)
        check_rollouts(prompts, rl.prompts_per_step, rl.policy.max_drawn)
        return in_groups(prompts, rl.group_size)

    def _drawn(self, step: int) -> list[Rollout]:
        """What the source has for a step; each knows where it is from."""
        prompts = self.source(step)
        return [dataclasses.replace(p, origin=(step, n)) for n, p in enumerate(prompts)]

    def _sampled(self, params: dict, requests: Sequence[Request], step: int) -> list[Generation]:
        return self.sampler(params["model"], requests, jax.random.fold_in(self.key, 2 + step))

    def _redrawn(
        self,
        params: dict,
        step: int,
        rollouts: list[Rollout],
        generations: list[Generation],
        judged: list[Judged],
        clock: Clock,
    ) -> int:
        """Puts other groups in the places of those that teach nothing, and says how many. They are
        what a step behind the last one would draw, from its prompts and with its keys."""
        rl, count = self.config, 0
        for again in range(1, rl.resample + 1):
            numbers = np.arange(len(judged)) // rl.group_size
            spreads = group_spreads(rewards_of(judged, step), numbers)
            flat = [number for number, spread in enumerate(spreads) if is_flat(spread)]
            if not flat:
                break
            count += len(flat)
            later = rl.steps * again + step
            prompts = self._drawn(later)
            check_rollouts(prompts, rl.prompts_per_step, rl.policy.max_drawn)
            grouped, group = in_groups(prompts, rl.group_size)
            rows = [row for row, number in enumerate(group) if number in flat]
            fresh = [grouped[row] for row in rows]
            with clock.part("sampling"):
                drawn = self._sampled(params, [r.request for r in fresh], later)
            with clock.part("judging"):
                verdicts = self._judged(fresh, drawn)
            for row, rollout, generation, verdict in zip(rows, fresh, drawn, verdicts, strict=True):
                rollouts[row], generations[row], judged[row] = rollout, generation, verdict
        return count

    def _judged(
        self, rollouts: Sequence[Rollout], generations: Sequence[Generation]
    ) -> list[Judged]:
        topics, reward = [r.prompt.topic for r in rollouts], self.config.reward
        tokenizer = self.sampler.tokenizer
        return judge_generations(self.critic, generations, topics, tokenizer, reward, self.seams)

    def _begun(
        self, memory: Pending, rollouts: list[Rollout], generations: list[Generation], step: int
    ) -> Later[list[Judged]]:
        """The judging of a step's rollouts: it began when they were drawn, or begins now."""
        whose, judging = self._ahead.pop(step, (None, None))
        if judging is not None and whose is memory:
            return judging
        return self._judging(rollouts, generations, step)

    def _judging(
        self, rollouts: list[Rollout], generations: list[Generation], step: int
    ) -> Later[list[Judged]]:
        # The next step's begins before this one's must be over: two at a time.
        return Later(f"judging {step % 2}", lambda: self._judged(rollouts, generations))

    def _drawn_ahead(self, params: dict, step: int) -> Pending:
        """Rollouts of a later step, whose judging begins; nothing behind the last one."""
        if step >= self.config.steps:
            return self.nothing
        rollouts, _ = self._asked(step)
        generations = self._sampled(params, [r.request for r in rollouts], step)
        memory = self._kept(pending_of(generations, self.width))
        self._ahead[step] = memory, self._judging(rollouts, generations, step)
        return memory
