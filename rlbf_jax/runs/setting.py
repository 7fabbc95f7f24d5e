"""Where a run's text comes from and who judges it: the toy world, or a user's own data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlbf_jax.critics.base import Critic
from rlbf_jax.critics.seams import SeamCritic
from rlbf_jax.runs.experiment import DataConfig

if TYPE_CHECKING:
    from rlbf_jax.runs.run import Run


@dataclasses.dataclass(frozen=True)
class Setting:
    """A kind of data, with the critic and the judge that know it."""

    world: Callable[[DataConfig, int], Any]
    """(data, seed) -> a `World` with `document`."""
    critic: Callable[[Run], Critic]
    """Critic of training."""
    judge: Callable[[Run, int], Critic]
    """(run, held-out answers it may measure) -> judge of evaluations,
    another object than the critic."""
    seams: Callable[[Run], SeamCritic]
    """Critic of seams: of evaluations, and of training where its reward asks for one."""
    check: Callable[[Run, int], None]
    """(run, most ids of a prompt). Raises UserError where configuration and text do not fit; called
    once the tokenizer is there."""
