"""Recipes: a method is a list of stages. `RECIPES` is the one list that a new method's file is
added to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from rlbf_jax.runs.experiment import ExperimentConfig
from rlbf_jax.runs.workspace import Workspace


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a recipe. `run` may be called again after a crash and goes on from its own
    checkpoints."""

    name: str
    run: Callable[[Workspace], None]


class Recipe(Protocol):
    """configuration -> ordered stages."""

    def __call__(self, config: ExperimentConfig) -> list[Stage]: ...
