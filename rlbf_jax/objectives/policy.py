"""Policy-gradient pieces: group and generalized advantages,
the clipped surrogate, value and KL terms.

Arrays are [B, T] over emitted streams; `action` [B, T] marks the ids the model drew itself, the
only ones that count. Retracted ids are actions too: the model chose them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int

from rlbf_jax.objectives.masked import Term, masked_sum, masked_term, per_row_mean

Normalization = Literal["trajectory", "sequence", "token", "constant"]
"""How a surrogate weighs ids. `trajectory`: summed over a response, mean over responses, as in the
gradient of an expected return; `sequence`: mean over a response's ids, then over responses (GRPO as
published); `token`: mean over all ids (DAPO); `constant`: summed over all ids, over responses times
the most ids that one may have (Dr. GRPO)."""
Baseline = Literal["standardized", "centered", "leave_one_out"]
"""What a group's rewards are compared to: see `group_advantages`."""
Ratio = Literal["token", "sequence"]
"""Of which probabilities a surrogate's ratio is: each id's, or the geometric mean of a response's
(GSPO)."""
KlEstimator = Literal["k1", "k2", "k3"]
"""See `kl_estimate`."""


class GroupAdvantages(NamedTuple):
    """GRPO's advantages of a batch of responses."""

    advantage: Float32[Array, " B"]
    """Exactly 0 for unscored members and in groups of zero variance."""
    zero_variance: Term
    """Share of groups whose scored members all got the same reward: they teach nothing."""


def group_advantages(
    reward: Float32[Array, " B"],
    scored: Bool[Array, " B"],
    group: Int[Array, " B"],
    num_groups: int,
    eps: float = 1e-4,
    baseline: Baseline = "standardized",
) -> GroupAdvantages:
    """Rewards of a group's n scored members against each other:

    standardized    (r - mean) / (standard deviation + eps)     GRPO, Shao et al. 2024, eq. 3
    centered        r - mean                                    Dr. GRPO, Liu et al. 2025
    leave_one_out   r - mean of the others = n / (n - 1) (r - mean)     RLOO, Ahmadian et al. 2024

    Args:
      reward: [B] float32.
      scored: [B] bool; unscored members leave mean and deviation.
      group: [B] int32 in 0..num_groups.
    """
    weight = scored.astype(jnp.float32)

    def per_group(x: Array) -> Array:
        return jax.ops.segment_sum(x, group, num_groups)

    reward = jnp.where(scored, reward, 0.0)
    count = per_group(weight)
    mean = per_group(reward) / jnp.maximum(count, 1)
    centered = jnp.where(scored, reward - mean[group], 0.0)
    deviation = jnp.sqrt(per_group(jnp.square(centered)) / jnp.maximum(count, 1))
    # The mean of equal rewards may differ from them in the last bit, which `eps` would blow up.
    most = jax.ops.segment_max(jnp.where(scored, reward, -jnp.inf), group, num_groups)
    least = jax.ops.segment_min(jnp.where(scored, reward, jnp.inf), group, num_groups)
    flat = ((deviation < 1e-6) | (most == least)) & (count > 0)
    zero = Term(jnp.sum(flat, dtype=jnp.float32), jnp.sum(count > 0, dtype=jnp.float32))
    advantage = centered
    if baseline == "standardized":
        advantage = centered / (deviation[group] + eps)
    elif baseline == "leave_one_out":
        advantage = centered * (count / jnp.maximum(count - 1, 1))[group]
    advantage = jnp.where(flat[group], 0.0, advantage)
    return GroupAdvantages(advantage, zero)


def terminal_rewards(
    reward: Float32[Array, " B"], action: Bool[Array, "B T"]
) -> Float32[Array, "B T"]:
    """[B, T] with each row's reward [B] on its last action, 0 elsewhere."""
    time = jnp.arange(action.shape[1])
    last = jnp.max(jnp.where(action, time, -1), axis=1)
    return jnp.where(time[None] == last[:, None], reward[:, None], 0.0)


def generalized_advantages(
    reward: Float32[Array, "B T"],
    value: Float32[Array, "B T"],
    action: Bool[Array, "B T"],
    lam: float,
) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
    """GAE (Schulman et al. 2016) in emission order with gamma = 1;
    holes between actions are skipped.

    Args:
      reward: [B, T] float32.
      value: [B, T] float32: column t is V of the state that action t was drawn
        in (its query is t - 1).
      action: [B, T] bool.

    Returns:
      advantages and returns (advantage + value), [B, T], 0 outside actions.
    """

    def back(carry, column):
        advantage, next_value = carry
        r, v, acts = column
        here = r + next_value - v + lam * advantage
        return (jnp.where(acts, here, advantage), jnp.where(acts, v, next_value)), jnp.where(
            acts, here, 0.0
        )

    zero = jnp.zeros(reward.shape[0], jnp.float32)
    _, advantage = jax.lax.scan(back, (zero, zero), (reward.T, value.T, action.T), reverse=True)
    return advantage.T, jnp.where(action, advantage.T + value, 0.0)


_ENDS = ((jnp.max, -jnp.inf), (jnp.min, jnp.inf))


def whiten(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Zero mean and unit variance over the batch where mask holds, 0 elsewhere; exactly 0
    everywhere if all that counts is equal."""
    most, least = (fold(jnp.where(mask, x, none)) for fold, none in _ENDS)
    varies = mask & (most != least)
    mean = masked_term(x, mask).mean
    variance = masked_term(jnp.square(x - mean), mask).mean
    return jnp.where(varies, (x - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def clipped_surrogate(
    logprobs: Float32[Array, "B T"],
    behavior: Float32[Array, "B T"],
    advantage: Float32[Array, "B T"],
    action: Bool[Array, "B T"],
    clip: float,
    normalization: Normalization,
    *,
    clip_high: float | None = None,
    ratio: Ratio = "token",
    most: int | None = None,
) -> tuple[Term, Term]:
    """PPO's clipped objective as a loss, and the share of clipped ids.

    -E min(ratio A, clip(ratio, 1 - clip, 1 + clip_high) A), ratio = exp(logprobs - behavior).

    Args:
      clip_high: None: as `clip`; above it, DAPO's clip-higher.
      ratio: `sequence`: s = exp(mean of a row's log-ratios) at each of its ids, with the gradient
        s grad log p of that id (GSPO-token, Zheng et al. 2025).
      most: ids that a row may have, of normalization `constant`; None: T.
    """
    high = clip if clip_high is None else clip_high
    log_ratio = jnp.where(action, logprobs - behavior, 0.0)
    if ratio == "sequence":
        mean = jax.lax.stop_gradient(per_row_mean(log_ratio, action))[:, None]
        log_ratio = mean + jnp.where(action, logprobs - jax.lax.stop_gradient(logprobs), 0.0)
    r = jnp.exp(log_ratio)
    loss = -jnp.minimum(r * advantage, jnp.clip(r, 1 - clip, 1 + high) * advantage)
    outside = (r < 1 - clip) | (r > 1 + high)
    clipped = masked_term(outside.astype(jnp.float32), action)
    if normalization == "token":
        return masked_term(loss, action), clipped
    rows = jnp.sum(jnp.any(action, axis=1), dtype=jnp.float32)
    if normalization == "sequence":
        return Term(jnp.sum(per_row_mean(loss, action)), rows), clipped
    if normalization == "constant":
        rows *= action.shape[1] if most is None else most
    return Term(masked_sum(loss, action), rows), clipped


def value_loss(
    value: Float32[Array, "B T"],
    old_value: Float32[Array, "B T"],
    returns: Float32[Array, "B T"],
    action: Bool[Array, "B T"],
    clip: float,
) -> Term:
    """Half the squared error, clipped around the old value as in PPO (clip 0: plain)."""
    error = jnp.square(value - returns)
    if clip > 0:
        near = old_value + jnp.clip(value - old_value, -clip, clip)
        error = jnp.maximum(error, jnp.square(near - returns))
    return masked_term(0.5 * error, action)


def kl_estimate(
    logprobs: Float[Array, "*shape"],
    reference: Float[Array, "*shape"],
    estimator: KlEstimator = "k3",
) -> Float[Array, "*shape"]:
    """Estimate of KL(policy || reference) at drawn ids, d = log p_ref - log p (Schulman 2020):

    k1  -d                  unbiased, of either sign; as a loss its gradient is zero on average
    k2  d^2 / 2             biased and non-negative; as a loss its gradient is the KL's
    k3  exp(d) - 1 - d      unbiased and non-negative; GRPO's
    """
    log_ratio = reference - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return jnp.square(log_ratio) / 2
    return jnp.exp(log_ratio) - 1 - log_ratio
