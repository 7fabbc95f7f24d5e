"""The reinforcement update: measured batches, loss terms, jitted steps. The loop is in `online.py`.

1. `measure`: behavior log-probabilities, values and advantages of a batch
   of traces, in one jitted pass.
2. `policy_terms`: the loss terms of RLBF, L = -J_RL + lambda_SFT L_guidance (+ value, KL, entropy).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from rlbf_jax.directives import NEVER, EditRule, EditState, Limits, Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.models.transformer import ModelConfig, ValueHead
from rlbf_jax.objectives.masked import Term, masked_term
from rlbf_jax.objectives.policy import (
    Baseline,
    KlEstimator,
    Normalization,
    Ratio,
    clipped_surrogate,
    generalized_advantages,
    group_advantages,
    kl_estimate,
    terminal_rewards,
    value_loss,
    whiten,
)
from rlbf_jax.parallel.axes import traced_for
from rlbf_jax.parallel.mesh import batch_sharding, replicated
from rlbf_jax.ranges import check_at_least, check_between, check_positive
from rlbf_jax.sampling.scoring import Traces, hidden_states, layout_of, score, token_scores
from rlbf_jax.training.learner import Objective
from rlbf_jax.training.supervised import Rows, supervised_nll, total_weight

FEATURES = 4
"""Width of `trace_features`."""


class Algorithm(NamedTuple):
    """What an algorithm's name stands for, where the configuration does not say otherwise."""

    baseline: Baseline | None
    """None: generalized advantages of a value head."""
    normalization: Normalization = "trajectory"
    clip_high: float | None = None


ALGORITHMS = {
    "ppo": Algorithm(None),
    "grpo": Algorithm("standardized"),
    "dr_grpo": Algorithm("centered", "constant"),
    "dapo": Algorithm("standardized", "token", 0.28),
    "rloo": Algorithm("leave_one_out"),
}
"""docs/objectives.md has each as a formula, with its source."""


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Loss of the reinforcement update. The paper names GRPO and the form of the sum;
    every number here is ours."""

    algorithm: Literal["ppo", "grpo", "dr_grpo", "dapo", "rloo"] = "ppo"
    """`dapo` is whole with `reinforcement.resample` of 1 or more."""
    clip: float = 0.2
    clip_high: float | None = None
    """Upper bound of the ratio, less 1; None: the algorithm's, which is `clip` but for `dapo`."""
    ratio: Ratio = "token"
    """`sequence`: of whole responses, as in GSPO; not for PPO, whose advantages are of ids."""
    normalization: Normalization | None = None
    """None: the algorithm's. `trajectory`, of PPO, GRPO and RLOO here, is the gradient of J_RL;
    `sequence` is GRPO as published, and thins a directive's two ids out among all ids of the
    response."""
    gae_lambda: float = 0.95
    """PPO only. Safe under REWIND because the value head sees features
    of what was retracted; 1 otherwise."""
    value_weight: float = 1.0
    value_clip: float = 0.0
    sft_weight: float = 1.0
    """lambda_SFT. Published nowhere; at 0 the toy policy collapses."""
    directive_weight: float = 1.0
    """Of control ids among the targets of L_SFT, see `SupervisedConfig`."""
    kl_weight: float = 0.0
    """Against the SFT checkpoint under the same grammar mask."""
    kl_estimator: KlEstimator = "k3"
    entropy_weight: float = 0.0
    retracted_advantage: Literal["keep", "drop_positive"] = "keep"
    """`drop_positive` withholds praise from ids that were taken back: violate-then-retract pays
    like clean text in the paper's table."""
    max_drawn: int | None = None
    """Most ids any row draws itself (recipes set it);
    their logits are all that is computed. None: no bound."""
    behavior: Literal["scorer", "sampler"] = "scorer"
    """Whose probabilities of what was drawn the ratio is to. `sampler`, GRPO only: those that it
    recorded, which saves a forward pass; every `kl_every`-th step is measured as under `scorer`,
    for the guard that the two agree."""
    correction_cap: float = 2.0
    """In bfloat16, advantages are weighted by min(cap, scorer / sampler probability);
    float32 needs no correction."""

    def __post_init__(self):
        if self.algorithm == "ppo" and self.behavior == "sampler":
            raise UserError(
                "policy.behavior sampler is for GRPO: PPO needs the values of the pass that it "
                "saves; set --reinforcement.policy.algorithm grpo"
            )
        if self.algorithm == "ppo" and self.ratio == "sequence":
            raise UserError(
                "policy.ratio sequence is for algorithms that compare the responses of a group; "
                "set --reinforcement.policy.algorithm grpo, or another of them"
            )
        check_positive(self, "clip", "clip_high", "correction_cap", "directive_weight")
        check_between(self, 0, 1, "gae_lambda")
        check_at_least(
            self, 0, "value_weight", "value_clip", "sft_weight", "kl_weight", "entropy_weight"
        )
        check_at_least(self, 1, "max_drawn")

    @property
    def chosen(self) -> Algorithm:
        """The algorithm, with what is configured in place of what is its own."""
        own = ALGORITHMS[self.algorithm]
        return Algorithm(
            own.baseline,
            own.normalization if self.normalization is None else self.normalization,
            own.clip_high if self.clip_high is None else self.clip_high,
        )


class Measured(NamedTuple):
    """What the update needs of a batch of traces, [B, T] each, fixed over its epochs."""

    behavior: Array
    reference: Array
    """Log-probabilities under the reference (the SFT checkpoint, same grammar mask);
    `behavior` until they are read."""
    value: Array
    returns: Array
    advantage: Array
    action: Array
    """bool: drawn by the model, in a scored row."""


class PolicyBatch(NamedTuple):
    """One update's arrays; rows in front everywhere."""

    traces: Traces
    measured: Measured
    guidance: Rows


def trace_features(before: EditState, limits: Limits) -> Array:
    """[B, T, 4] float32: directives used, ids left, category pending,
    ids retracted; each about 0..1."""
    row = jax.tree.map(lambda x: x[:, None].astype(jnp.float32), limits)
    room = jnp.maximum(row.max_emitted, 1)
    columns = [
        before.directives / jnp.maximum(row.budget, 1),
        (room - before.emitted) / room,
        before.pending,
        before.retracted / room,
    ]
    return jnp.stack([jnp.asarray(c, jnp.float32) for c in columns], axis=-1)


def init_policy(params: dict, model: ModelConfig, key: Array) -> dict:
    """The decoder's trained parameters and a fresh value head
    (its last layer is zero, so values start at 0)."""
    head = ValueHead().init(key, jnp.zeros((1, model.width)), jnp.zeros((1, FEATURES)))["params"]
    return {"model": params, "value": head}


def read_traces(
    model: ModelConfig,
    params: dict,
    rule: EditRule,
    traces: Traces,
    semantics: Semantics,
    drawn: int | None = None,
) -> tuple[Array, Array, Array]:
    """Log-probabilities, entropies and values [B, T]; value t is that of the query before id t."""
    hidden, where = hidden_states(model, params["model"], rule, traces, semantics)
    scores = token_scores(model, params["model"], rule, traces, hidden, where.before, drawn)
    seen_by = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
    value = ValueHead().apply(
        {"params": params["value"]}, seen_by, trace_features(where.before, traces.limits)
    )
    return scores.logprobs, scores.entropy, jnp.asarray(value)


def measure(
    model: ModelConfig,
    rule: EditRule,
    semantics: Semantics,
    config: PolicyConfig,
    num_groups: int,
    params: dict,
    traces: Traces,
    reward: Array,
    group: Array,
    sampled: Array,
    stale: bool = False,
    read: bool = True,
) -> tuple[Measured, dict[str, Term]]:
    """Advantages of a batch.

    Args:
      read: whether the model reads the traces. If not there are no values, and the ratio of the
        policy gradient is to the probabilities that the sampler recorded.
      stale: the traces were drawn by earlier parameters. The ratio of the policy gradient is then
        to the probabilities that the sampler recorded; values are those of today.
      reward: [B] float32, NaN where the critic could not judge.
      group: [B] int32: rows of a group share prompt, forced ids and knobs.
      sampled: [B, T] float32 log-probabilities that the sampler recorded,
        for the gap and the correction.
    """
    behavior, value = sampled, jnp.zeros_like(sampled)
    if read:
        behavior, _, value = read_traces(model, params, rule, traces, semantics, config.max_drawn)
    scored = jnp.isfinite(reward)
    reward = jnp.where(scored, reward, 0.0)
    action = traces.is_action & scored[:, None]
    baseline = config.chosen.baseline
    groups = group_advantages(
        reward, scored, group, num_groups, baseline=baseline or "standardized"
    )
    if baseline is None:
        advantage, returns = generalized_advantages(
            terminal_rewards(reward, action), value, action, config.gae_lambda
        )
        advantage = whiten(advantage, action)
    else:
        advantage = jnp.where(action, groups.advantage[:, None], 0.0)
        returns = jnp.zeros_like(advantage)
    if config.retracted_advantage == "drop_positive":
        erased = layout_of(rule, traces, semantics).erased < NEVER
        advantage = jnp.where(erased, jnp.minimum(advantage, 0.0), advantage)
    gap = jnp.where(action, behavior - sampled, 0.0)
    if stale:
        behavior = jnp.where(action, sampled, behavior)
    elif model.dtype == "bfloat16":
        advantage *= jnp.minimum(jnp.exp(gap), config.correction_cap)
    metrics = {"zero_variance": groups.zero_variance}
    if read:
        metrics["sampler_gap"] = masked_term(jnp.abs(gap), action)
    return Measured(behavior, behavior, value, returns, advantage, action), metrics


def kl_terms(rule: EditRule, traces: Traces, measured: Measured) -> dict[str, Term]:
    """KL to the reference at drawn ids, apart for content and control ids."""
    action, control = measured.action, rule.is_control(traces.tokens)
    logprobs, reference = (
        jnp.where(action, x, 0.0) for x in (measured.behavior, measured.reference)
    )
    kl = kl_estimate(logprobs, reference)
    return {
        "kl_content": masked_term(kl, action & ~control),
        "kl_control": masked_term(kl, action & control),
    }


def policy_terms(
    model: ModelConfig,
    rule: EditRule,
    semantics: Semantics,
    config: PolicyConfig,
    params: dict,
    batch: PolicyBatch,
) -> dict[str, Term]:
    """unpack -> forward -> log-probabilities -> loss terms, each with its denominator."""
    traces, m, guidance = batch
    logprobs, entropy, value = read_traces(model, params, rule, traces, semantics, config.max_drawn)
    _, normalization, clip_high = config.chosen
    policy, clipped = clipped_surrogate(
        logprobs, m.behavior, m.advantage, m.action, config.clip, normalization,
        clip_high=clip_high, ratio=config.ratio, most=config.max_drawn,
    )  # fmt: skip
    terms = {
        "policy": policy,
        "guidance": supervised_nll(
            model, params["model"], rule, guidance, semantics, config.directive_weight
        ),
        "entropy": masked_term(entropy, m.action),
        "clipped": clipped,
    }
    if config.algorithm == "ppo":
        terms["value"] = value_loss(value, m.value, m.returns, m.action, config.value_clip)
    if config.kl_weight:
        ours, theirs = (jnp.where(m.action, x, 0.0) for x in (logprobs, m.reference))
        kl = kl_estimate(ours, theirs, config.kl_estimator)
        terms["kl"] = masked_term(kl, m.action)
    return terms


def policy_weights(config: PolicyConfig) -> dict[str, float]:
    """Weight of each loss term; terms not named here are metrics."""
    weights = {"policy": 1.0, "guidance": config.sft_weight, "entropy": -config.entropy_weight}
    if config.algorithm == "ppo":
        weights["value"] = config.value_weight
    if config.kl_weight:
        weights["kl"] = config.kl_weight
    return {name: weight for name, weight in weights.items() if weight}


def policy_denominators(
    rule: EditRule, config: PolicyConfig, batch: PolicyBatch
) -> dict[str, Array]:
    """Denominators of a whole batch, whatever its microbatches."""
    actions = jnp.sum(batch.measured.action, dtype=jnp.float32)
    rows = jnp.sum(jnp.any(batch.measured.action, axis=1), dtype=jnp.float32)
    most = config.max_drawn or batch.measured.action.shape[1]
    of_policy = {"token": actions, "constant": rows * most}
    return {
        "policy": of_policy.get(config.chosen.normalization, rows),
        "guidance": total_weight(batch.guidance, rule, config.directive_weight),
        "entropy": actions,
        "value": actions,
        "kl": actions,
    }


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """A policy gradient on traces of one model under one rule: its loss, and its measurements."""

    model: ModelConfig
    rule: EditRule
    semantics: Semantics
    config: PolicyConfig

    @property
    def objective(self) -> Objective:
        """L = -J + lambda_SFT L_guidance (+ value, KL, entropy) over `PolicyBatch`es."""
        model, rule, semantics, config = self.model, self.rule, self.semantics, self.config
        return Objective(
            lambda params, batch: policy_terms(model, rule, semantics, config, params, batch),
            lambda batch: policy_denominators(rule, config, batch),
            policy_weights(config),
        )

    def measuring(
        self, groups: int, mesh: Mesh, stale: bool = False, read: bool = True
    ) -> Callable[..., tuple[Measured, dict[str, Term]]]:
        """Jitted (params, traces, reward, group, sampled) -> `measure`, rows over the mesh."""
        model, rule, semantics, config = self.model, self.rule, self.semantics, self.config

        def measured(params, traces, reward, group, sampled):
            return measure(
                model, rule, semantics, config, groups, params, traces, reward, group, sampled,
                stale, read,
            )  # fmt: skip

        return jax.jit(
            traced_for(mesh, measured), out_shardings=(batch_sharding(mesh), replicated(mesh))
        )

    def comparing(self, mesh: Mesh) -> Callable[..., tuple[Measured, dict[str, Term]]]:
        """Jitted (reference params, traces, measured) -> (measured with the reference's
        log-probabilities, KL terms)."""
        model, rule, semantics, drawn = (
            self.model,
            self.rule,
            self.semantics,
            self.config.max_drawn,
        )

        def compared(reference, traces, batch: Measured):
            read = score(model, reference, rule, traces, semantics, drawn)
            batch = batch._replace(reference=read.logprobs)
            return batch, kl_terms(rule, traces, batch)

        return jax.jit(
            traced_for(mesh, compared), out_shardings=(batch_sharding(mesh), replicated(mesh))
        )
