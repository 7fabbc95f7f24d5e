"""RLBF: Reinforcement Learning with Backtracking Feedback (arXiv 2602.08377), with its baselines.

1. The directive (section 3). `[CATEGORY_c] [BACKTRACK_BY_X]`: the last X visible tokens were a
   violation of kind c. Rule `backtrack`; the paper's semantics are KEEP, REWIND is ours.

2. BSAFE+ (section 3, step 1). A safe answer is cut, part1 + part2, a violation v is injected behind
   part1 (and a bridge b), and the model learns to take it back:

       L_SFT = -E log p( [CATEGORY_c] [BACKTRACK_BY_|b v|] part2 | prompt part1 b v )            (1)

   The paper writes the input without v although X counts its tokens; (1) is the one reading under
   which X refers to text that is there. Plain examples are mixed in.

3. Backtracking feedback (step 2). The policy answers, a critic judges every final text and every
   text before a directive, and the response gets one reward at its end, R in {-1, -0.5, -0.2, 1}:
   `objectives.trajectory_reward`.

       J_RL = E_{y ~ pi} R(y),     L = -J_RL + lambda_SFT L_SFT                                  (2)

   by GRPO, as in the paper, or PPO: `training.policy`.

The paper publishes no size or rate; every number in these settings is ours. So is what rollouts
start from (`RolloutMix`), `poor`, `residue_is_unsafe` and `torn_is_failed` of the reward, and the
value head's features. Baselines: `refusal_sft` (refuse harmful prompts, no directives) and
`sft_control` (SFT with as many more updates as reinforcement makes).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar

from rlbf_jax.data.builders.injection import BsafePlusConfig
from rlbf_jax.directives import Semantics
from rlbf_jax.evaluation.suite import SuiteConfig
from rlbf_jax.methods.attacked_prompts import (
    TRIES,
    Drawn,
    RolloutMix,
    attack_options,
    check_fits,
    prompt_source,
)
from rlbf_jax.methods.reinforcement import Collector, ReinforcementConfig, improve
from rlbf_jax.methods.searched_suffixes import (
    SuffixSearchConfig,
    SuffixStage,
    suffix_stage,
    suffixes_of,
)
from rlbf_jax.methods.shared import (
    bsafe_plus_data,
    foundation,
    refusal_data,
    supervised_stage,
)
from rlbf_jax.models.config import LoraConfig
from rlbf_jax.parallel.mesh import MeshConfig
from rlbf_jax.plain import FLAT
from rlbf_jax.ranges import check_at_least
from rlbf_jax.runs.critics import CriticConfig
from rlbf_jax.runs.experiment import Beside, Experiment, MethodConfig
from rlbf_jax.runs.run import BASE, TOKENIZER, Run, data_stage
from rlbf_jax.runs.shapes import check_precision, check_rows, check_rows_suffice, check_width
from rlbf_jax.runs.stage import Stage
from rlbf_jax.sampling.request import Knobs
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig
from rlbf_jax.training.guards import Guards
from rlbf_jax.training.policy import PolicyGradient
from rlbf_jax.training.rollouts import (
    PromptSource,
)
from rlbf_jax.training.supervised import PackedRows, SupervisedConfig

CHECKED_ROLLOUTS = 200
"""Rollouts that are drawn before training to see whether prompts and attacks fit."""


# Settings -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RlbfConfig(MethodConfig):
    """RLBF's own settings."""

    name: ClassVar[str] = "rlbf"
    paper: ClassVar[str] = "RLBF, arXiv 2602.08377"
    rule: ClassVar[str] = "backtrack"

    bsafe_plus: BsafePlusConfig = BsafePlusConfig()
    sft_examples: int = 4_000
    refusal_examples: int = 2_000
    refusal_sft: SupervisedConfig = SupervisedConfig()
    sft: SupervisedConfig = SupervisedConfig()
    reinforcement: ReinforcementConfig = ReinforcementConfig()
    rollouts: RolloutMix = RolloutMix()
    suffixes: SuffixSearchConfig = SuffixSearchConfig()
    """Of `rollouts.searched_share`."""
    critic: Annotated[CriticConfig, Beside] = dataclasses.field(
        default=CriticConfig(), metadata=FLAT
    )
    rollout_tokens: int = 88
    """Most ids of a rollout, forced ones included."""
    max_drawn: int = 48
    """Most ids a rollout draws itself."""
    rollout_budget: int = 4
    """Most directives of a rollout."""
    baselines: bool = True
    """Also train and evaluate `refusal_sft` and `sft_control`."""

    def __post_init__(self):
        check_at_least(self, 1, "rollout_tokens", "max_drawn", "sft_examples", "refusal_examples")
        check_at_least(self, 0, "rollout_budget")

    def stages(self, e: Experiment) -> Sequence[Stage]:
        """Data, base, baselines, SFT (1), reinforcement (2)."""
        data = [bsafe_plus_data(self.bsafe_plus, self.sft_examples)]
        *prepared, base = foundation(e)
        sft = supervised_stage(e, "sft", self.sft, "bsafe_plus", headline=True)
        reinforced = [*suffix_stages(e, self), reinforcement_stage(e, self)]
        if not self.baselines:
            return [*prepared, *data, base, sft, *reinforced]
        data.append(refusal_data(self.bsafe_plus, self.refusal_examples))
        refusal = supervised_stage(e, "refusal_sft", self.refusal_sft, "refusal")
        control = supervised_stage(e, "sft_control", self.control, "bsafe_plus", "sft")
        return [*prepared, *data, base, refusal, sft, control, *reinforced]

    @property
    def control(self) -> SupervisedConfig:
        """What the extra updates of reinforcement would do as plain SFT."""
        rl = self.reinforcement
        # The guidance term sees `guidance_batch_size` rows an update;
        # the control gets SFT's own batches.
        optimizer = dataclasses.replace(self.sft.optimizer, schedule=rl.optimizer.schedule)
        steps = rl.steps * rl.updates_per_step
        return dataclasses.replace(self.sft, steps=steps, optimizer=optimizer)


# Step 2 as a stage --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReinforcementStage:
    """Everything that reinforcement depends on beside the SFT model and its data."""

    reinforcement: ReinforcementConfig
    rollouts: RolloutMix
    evaluation: SuiteConfig
    """Options of the attacks that rollouts start from; the rest of it is at its defaults."""
    critic: CriticConfig = dataclasses.field(metadata=FLAT)
    rollout_tokens: int
    max_drawn: int
    rollout_budget: int
    max_prompt: int
    sampling_batch: int
    lora: LoraConfig
    rule: str
    semantics: Semantics
    mesh: MeshConfig

    @property
    def width(self) -> int:
        """Ids of a row of traces, prompt included."""
        return self.max_prompt + self.rollout_tokens

    @property
    def sampler(self) -> SamplerConfig:
        """Room for a prompt and a rollout, one shape whatever attack they start from. Forced ids
        are read in wider contexts, and are ids of the rollout."""
        rows, room = self.sampling_batch, self.rollout_tokens
        return SamplerConfig(self.semantics, rows, min_context=self.max_prompt, min_room=room)


def suffix_stages(e: Experiment, method: RlbfConfig) -> list[Stage]:
    """The search for suffixes, where rollouts have a use for them."""
    if not (method.rollouts.strange_suffix and method.rollouts.searched_share):
        return []
    where = (e.max_prompt, e.sampling_batch, e.rule, e.semantics)
    return [suffix_stage(SuffixStage(method.suffixes, "sft", method.max_drawn, *where))]


def reinforcement_stage(e: Experiment, method: RlbfConfig) -> Stage:
    """The stage `rlbf`."""
    searched = [stage.name for stage in suffix_stages(e, method)]
    policy = dataclasses.replace(method.reinforcement.policy, max_drawn=method.max_drawn)
    settings = ReinforcementStage(
        dataclasses.replace(method.reinforcement, policy=policy),
        method.rollouts,
        attack_options(e.evaluation, method.rollouts),
        method.critic,
        method.rollout_tokens,
        method.max_drawn,
        method.rollout_budget,
        e.max_prompt,
        e.sampling_batch,
        e.base.model.lora,
        e.rule,
        e.semantics,
        e.mesh,
    )
    return Stage(
        method.name,
        reinforce,
        settings,
        (TOKENIZER, data_stage("bsafe_plus"), BASE, "sft", *searched),
        check_reinforcement,
        fit_reinforcement,
        evaluated=True,
        retracts=True,
        method=f"{method.name}_{policy.algorithm}",
        headline=True,
    )


def check_reinforcement(run: Run, config: ReinforcementStage) -> None:
    check_precision(run.base_model, config.lora)
    rl = config.reinforcement
    rows = rl.prompts_per_step * rl.group_size
    name = "reinforcement.prompts_per_step x group_size"
    check_rows(name, rows, run.mesh, rl.accumulate)
    name = "reinforcement.guidance_batch_size"
    check_rows(name, rl.guidance_batch_size, run.mesh, rl.accumulate)
    check_width("max_prompt + rollout_tokens", config.width, run.base_model)


def fit_reinforcement(run: Run, config: ReinforcementStage) -> None:
    """Raises UserError where an attack of the rollouts finds nothing that fits, or a prompt and its
    response may have more ids than a rollout's buffer."""
    check_rows_suffice(
        "reinforcement.guidance_batch_size",
        config.reinforcement.guidance_batch_size,
        "bsafe_plus",
        run.rows_of("bsafe_plus"),
        "sft_examples",
    )
    steps = -(-CHECKED_ROLLOUTS // config.reinforcement.prompts_per_step)
    encode = run.tokenizer.encode_prompt
    check_fits(
        rollout_source(run, config, tries=1), steps, encode, (config.max_prompt, config.width)
    )


def rollout_source(run: Run, config: ReinforcementStage, tries: int = TRIES) -> PromptSource:
    """What rollouts start from, a pure function of (seed, step)."""
    rl = config.reinforcement
    knobs = Knobs(
        temperature=rl.temperature,
        max_tokens=config.rollout_tokens,
        budget=config.rollout_budget,
    )
    drawn = Drawn(
        rl.prompts_per_step, config.max_drawn, knobs, config.evaluation, tries, suffixes_of(run)
    )
    return prompt_source(run, config.rollouts, drawn)


def reinforce(run: Run, config: ReinforcementStage) -> None:
    """Live rollouts, critic, trajectory reward, policy gradient with SFT guidance: equation (2)."""
    rl, rule = config.reinforcement, run.rule(config.rule)
    model = run.tuned(config.lora, rule)
    critic = run.critic(config.critic)
    collect = Collector(
        rl,
        PolicyGradient(model, rule, config.semantics, rl.policy),
        Sampler(model, run.tokenizer, config.sampler, rule=rule, mesh=run.mesh),
        critic,
        rollout_source(run, config),
        PackedRows(run.batches("bsafe_plus", rl.guidance_batch_size)),
        run.trainable("sft", config.lora, rule),
        config.width,
        run.mesh,
        run.seed,
        run.setting.seams(run) if rl.reward.torn_is_failed else None,
        Guards(rl.guards),
    )
    policy = improve(collect, run.loop(rl.steps, rl.checkpoint_every, rl.keep_checkpoints))
    run.keep(model, policy, critic=critic.name)
