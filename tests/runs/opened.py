"""Parts of a run by its experiment, as the commands make them."""

from __future__ import annotations

import types
from pathlib import Path

from rlbf_jax.critics.base import Critic
from rlbf_jax.models.families import styled
from rlbf_jax.runs.evaluate import EvaluationSettings, Evaluator
from rlbf_jax.runs.execute import parts_of, recipe, view
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.runs.manifest import open_workdir
from rlbf_jax.runs.run import Run


def run_of(e: Experiment, folder: Path) -> Run:
    return Run(parts_of(e, folder))


def critic_of(e: Experiment, folder: Path) -> Critic:
    return run_of(e, folder).critic(e.method.critic)


def evaluator_of(e: Experiment, folder: Path, stage: str = "base") -> Evaluator:
    return Evaluator(run_of(e, folder), EvaluationSettings.of(e, stage, ""))


def judge_of(e: Experiment, folder: Path) -> Critic:
    return evaluator_of(e, folder).judge


def do(e: Experiment, folder: Path, name: str) -> Run:
    """Does one stage, in a folder of the experiment; returns the run as commands see it."""
    make_folder(e, folder)
    stages = recipe(e)
    stage = next(stage for stage in stages if stage.name == name)
    whole = run_of(e, folder)
    stage.do(view(whole, stages, stage), stage.config)
    return whole


def keep(run: Run, stage: str, params: dict) -> None:
    """Keeps parameters as those of a finished stage."""
    run.seen_by(stage, ["tokenizer"]).keep(run.model, params)


def make_folder(e: Experiment, folder: Path) -> None:
    open_workdir(e, recipe(e), folder)


def check_shapes(e: Experiment, shards: int = 1) -> None:
    """The checks of all stages before anything is made, for a mesh with so many row shards."""
    mesh = types.SimpleNamespace(
        shape={"slice": 1, "data": shards, "fsdp": 1, "tensor": 1}, size=shards
    )
    for stage in recipe(e):
        seen = types.SimpleNamespace(mesh=mesh, data=e.data, base_model=styled(e.base.model))
        stage.check(seen, stage.config)
