"""An existing run, opened from its folder: its stages as policies, and what was asked of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rlbf_jax.critics.base import Critic
from rlbf_jax.errors import UserError
from rlbf_jax.gguf_file import is_gguf
from rlbf_jax.plain import restore
from rlbf_jax.runs.critics import CriticConfig
from rlbf_jax.runs.evaluate import EvaluationSettings, Evaluator
from rlbf_jax.runs.execute import parts_of
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.runs.manifest import Manifest, StoredMethod, read_manifest
from rlbf_jax.runs.run import Run
from rlbf_jax.sampling.policy import Policy


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run that somebody made, whatever its method."""

    run: Run
    experiment: Experiment[StoredMethod]
    manifest: Manifest

    @property
    def last_stage(self) -> str:
        """The last stage of the recipe that has kept a model.

        Raises UserError where none has.
        """
        names = [s.name for s in self.manifest.stages if s.evaluated]
        there = [n for n in names if (self.run.stage_folder(n) / "model").exists()]
        if not there:
            raise UserError(f"{self.run.folder}: no stage of it is finished; run it first")
        return there[-1]

    def evaluator(self, stage: str = "") -> Evaluator:
        """A finished stage with the run's own questions and judge; empty: the last stage."""
        stage = stage or self.last_stage
        entry = self.manifest.stage(stage)
        method, retracts = (entry.method, entry.retracts) if entry else ("", False)
        settings = EvaluationSettings.of(self.experiment, stage, method, retracts)
        return Evaluator(self.run, settings)

    def policy(self, stage: str = "") -> Policy:
        """A finished stage as something that answers; empty: the last stage.

        Raises UserError if it is not finished.
        """
        e = self.experiment
        return self.run.policy(stage or self.last_stage, e.rule, e.semantics)

    @property
    def training_critic(self) -> Critic:
        """The critic that the run trains with, or that it would."""
        config = CriticConfig()
        for entry in self.manifest.stages:
            if "critic_noise" in entry.config:
                config = restore(CriticConfig, self.manifest.config)
        return self.run.critic(config)


def open_run(workdir: str | Path) -> OpenRun:
    """An existing run, from its manifest. Raises UserError if there is none."""
    workdir = Path(workdir)
    manifest = read_manifest(workdir)
    experiment = manifest.experiment()
    return OpenRun(Run(parts_of(experiment, workdir)), experiment, manifest)


def load(folder: str | Path, stage: str = "") -> Policy:
    """A policy from a run's folder, from a stage's (RUN/stages/STAGE), or from a checkpoint's.

    Args:
      folder: a run, a stage of one, or a checkpoint as published or as `rlbf import` writes it, or
        a GGUF file.
      stage: of a run; empty: its last one.

    Raises UserError for a folder that holds none of these, or a stage of what is no run.
    """
    folder = Path(folder)
    if (folder / "manifest.json").exists():
        return open_run(folder).policy(stage)
    if stage:
        raise UserError(
            f"{folder}: no run, hence no stage {stage!r} of it (manifest.json is missing)"
        )
    if (folder / "model").is_dir() and (folder.parent.parent / "manifest.json").exists():
        return open_run(folder.parent.parent).policy(folder.name)
    if not is_gguf(folder) and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no run here (manifest.json is missing), no stage of one and no checkpoint "
            "(config.json is missing); make one with `rlbf run`"
        )
    from rlbf_jax.runs.checkpoint_policy import open_model

    return open_model(folder).policy
