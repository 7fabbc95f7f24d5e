"""Runs a recipe in a folder: stages in order, finished ones skipped, broken ones resumed, a report at the end."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import json
import platform
import subprocess
import time
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import rlbf_jax
from rlbf_jax.data.world import Pool
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.report import write_report
from rlbf_jax.methods.config import ExperimentConfig
from rlbf_jax.methods.own_data import OWN_DATA
from rlbf_jax.methods.recipes import Recipe
from rlbf_jax.methods.rlbf import rlbf
from rlbf_jax.methods.toy import TOY
from rlbf_jax.methods.workspace import Workspace, write_json
from rlbf_jax.sampling.request import Generation, Request
from rlbf_jax.sampling.sampler import Sampler
from rlbf_jax.tokenizers import SentencePieceTokenizer
from rlbf_jax.training.progress import say

RECIPES: dict[str, Recipe] = {"rlbf": rlbf}
"""The one list to which a new method's file is added."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "sentencepiece", "grain", "numpy")


def run(config: ExperimentConfig, workdir: Path) -> None:
    """Runs an experiment to its report. Raises UserError for what a user can mend."""
    if config.method not in RECIPES:
        raise UserError(f"method {config.method!r}: no such recipe; there are {', '.join(RECIPES)}")
    stages = RECIPES[config.method](config)
    work = open_workspace(config, workdir)
    _ = work.world  # a data file that cannot be used leaves no folder behind
    open_workdir(config, workdir)
    began = time.perf_counter()
    for number, stage in enumerate(stages, 1):
        done = workdir / "done" / stage.name
        if done.exists():
            continue
        started = time.perf_counter()
        stage.run(work)
        write_json(done, {"seconds": round(time.perf_counter() - started, 1)})
        if not stage.name.startswith("evaluate"):
            say(f"[{number}/{len(stages)}] {stage.name}: {time.perf_counter() - started:.1f} s")
    write_report(workdir)
    say(f"finished in {time.perf_counter() - began:.0f} s; open {workdir / 'report.html'}")


def open_workspace(config: ExperimentConfig, workdir: Path) -> Workspace:
    """The run's parts: of the user's own data where the configuration names a file, of the toy world otherwise."""
    return Workspace(config, workdir, OWN_DATA if config.data.path else TOY)


def plain(value: Any) -> Any:
    """A configuration as JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def open_workdir(config: ExperimentConfig, workdir: Path) -> None:
    """Writes the manifest, or checks that the folder's is of this configuration.

    Raises UserError if the folder belongs to another experiment or cannot be written.
    """
    path = workdir / "manifest.json"
    resolved = plain(config)
    if path.exists():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))["config"]
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{path}: not a manifest ({error}); move the folder away or choose another --workdir"
            ) from None
        changed = [name for name, old, new in differences(there, resolved)]
        if changed:
            raise UserError(
                f"{workdir} holds a run with other settings ({', '.join(changed[:5])}); "
                "choose another --workdir, or delete it to start again"
            )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, manifest(config))
    except OSError as error:
        raise UserError(f"{workdir}: cannot be written ({error.strerror}); choose another --workdir") from None


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted names at which two plain configurations differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in sorted(old.keys() | new.keys()):
            found += differences(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name)
        return found
    return [] if old == new else [(prefix, old, new)]


def manifest(config: ExperimentConfig) -> dict[str, Any]:
    """What a run depends on: configuration, versions, commit, devices, seeds."""
    return {
        "config": plain(config),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"rlbf_jax": rlbf_jax.__version__, "python": platform.python_version()},
        "commit": commit(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "seeds": {"training": config.seed, "evaluation": config.evaluation.seed},
    }


def commit() -> str | None:
    """Commit of the checkout this package runs from, `+` when it was changed; None outside one."""
    root = Path(rlbf_jax.__file__).parent.parent
    try:
        say_git = ["git", "-C", str(root)]
        head = subprocess.run([*say_git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*say_git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if changed.strip() else "")


# Using a finished run ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A stage of a run, ready to sample."""

    sampler: Sampler
    params: dict
    tokenizer: SentencePieceTokenizer
    config: ExperimentConfig

    def sample(self, requests: Sequence[Request], seed: int = 0) -> list[Generation]:
        return self.sampler(self.params, list(requests), seed)


def open_run(workdir: Path) -> Workspace:
    """The workspace of an existing run, from its manifest. Raises UserError if there is none."""
    path = workdir / "manifest.json"
    if not path.exists():
        raise UserError(f"{workdir}: no run here (manifest.json is missing); make one with `rlbf run`")
    stored = json.loads(path.read_text(encoding="utf-8"))["config"]
    return open_workspace(restore(ExperimentConfig, stored), workdir)


def restore(kind: Any, stored: Any) -> Any:
    """The inverse of `plain`, by type hints."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = {field.name for field in dataclasses.fields(kind)}
        return kind(**{name: restore(hints[name], value) for name, value in stored.items() if name in known})
    if origin in (typing.Union, types.UnionType):
        if stored is None:
            return None
        return restore(next(arg for arg in args if arg is not type(None)), stored)
    if origin is tuple and isinstance(stored, list):
        return tuple(restore(args[0], value) for value in stored)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(stored)
    return stored


def load(workdir: Path, stage: str) -> Loaded:
    """A finished stage of a run. Raises UserError if the run or the stage is missing."""
    work = open_run(workdir)
    params = work.params(stage)
    return Loaded(work.sampler, params, work.tokenizer, work.config)


def evaluate_stage(workdir: Path, stage: str, data: Pool | None = None, n_prompts: int | None = None) -> None:
    """Evaluates a stage again, on another pool or with more prompts, and rewrites the report."""
    work = open_run(workdir)
    suite = work.config.evaluation
    suite = dataclasses.replace(suite, pool=data or suite.pool, n=suite.n if n_prompts is None else n_prompts)
    work.config = dataclasses.replace(work.config, evaluation=suite)
    from rlbf_jax.methods.rlbf import method_name

    work.evaluate(stage, method_name(work.config, stage))
    write_report(workdir)
