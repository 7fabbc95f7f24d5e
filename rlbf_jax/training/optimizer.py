"""Optimizers and schedules: optax, configured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import optax

from rlbf_jax.progress import say
from rlbf_jax.ranges import check_at_least, check_between, check_positive


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (or plain SGD) with a schedule and global-norm clipping."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    """Peak rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_share: float = 0.1
    """Share of the peak rate left at the last step."""
    warmup_steps: int = 10
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    clip_norm: float = 1.0
    """0: no clipping."""

    def __post_init__(self):
        check_positive(self, "learning_rate")
        check_at_least(self, 0, "warmup_steps", "weight_decay", "clip_norm")
        check_between(self, 0, 1, "final_share", "b1", "b2")


NO_GROUPS: Mapping[str, OptimizerConfig] = MappingProxyType({})


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Warm-up to the peak, then the schedule down to `final_share` of it at `steps`.

    Update t = 0, 1, ... of `warmup_steps` has (t + 1) / warmup_steps of the peak, so that the first
    one learns something and the last one has the peak.
    """
    rest = max(1, steps - config.warmup_steps)
    peak, end = config.learning_rate, config.learning_rate * config.final_share
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_share),
        "linear": optax.linear_schedule(peak, end, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]

    def warmup(step: Any) -> Any:
        return peak * (step + 1) / max(1, config.warmup_steps)

    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    groups: Mapping[str, OptimizerConfig] = NO_GROUPS,
    name: str = "",
    warn: bool = True,
) -> optax.GradientTransformation:
    """The optax chain for a run of `steps` updates. Says so, unless `warn` is off, where they end
    before the warm-up does.

    Args:
      groups: optimizers of parameters that have their own (a log-partition with a higher rate,
        say), by the first name of their path. Gradient norms are clipped within each group.
      name: of the stage, for what is said.

    Raises ValueError, at the first use, for a group that no parameter belongs to.
    """
    for group, chosen in {"": config, **groups}.items():
        if warn and 0 < steps < chosen.warmup_steps:
            where = " ".join(filter(None, (f"stage {name}:" if name else "", group)))
            share = steps / chosen.warmup_steps
            say(
                f"{where} {steps} updates end inside a warm-up of {chosen.warmup_steps}, at "
                f"{share:.0%} of the learning rate; lower optimizer.warmup_steps".strip()
            )
    if not groups:
        return _chain(config, steps)
    rest = "*"
    chains = {rest: _chain(config, steps)}
    chains |= {name: _chain(group, steps) for name, group in groups.items()}

    def labels(params: Mapping[str, Any]) -> dict[str, str]:
        if unknown := [name for name in groups if name not in params]:
            raise ValueError(f"optimizer group {unknown[0]!r}: parameters are {', '.join(params)}")
        return {name: name if name in groups else rest for name in params}

    return optax.multi_transform(chains, labels)


def _chain(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    schedule = learning_rate(config, steps)
    if config.name == "sgd":
        core = optax.sgd(schedule)
    else:
        core = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
    return optax.chain(*clip, core)
