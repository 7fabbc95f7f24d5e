"""Runs a recipe in a folder: stages in order, finished ones skipped, broken ones resumed, a report
at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib.metadata
import json
import platform
import subprocess
import time
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

import rlbf_jax
from rlbf_jax.critics.language import http_critic
from rlbf_jax.data.world import Pool
from rlbf_jax.errors import Preempted, UserError
from rlbf_jax.methods.rlbf import rlbf
from rlbf_jax.models.config import upgraded
from rlbf_jax.progress import say
from rlbf_jax.report.document import write_report
from rlbf_jax.runs.experiment import ExperimentConfig
from rlbf_jax.runs.model_critic import check_model
from rlbf_jax.runs.settings.own_data import OWN_DATA
from rlbf_jax.runs.settings.toy import TOY
from rlbf_jax.runs.stage import Recipe, Stage
from rlbf_jax.runs.tradeoff import tradeoff_file, write_tradeoff
from rlbf_jax.runs.workspace import Workspace, write_json
from rlbf_jax.sampling.request import Generation, Request
from rlbf_jax.sampling.sampler import Sampler
from rlbf_jax.storage import held, sweep
from rlbf_jax.tokenizers import Tokenizer

RECIPES: dict[str, Recipe] = {"rlbf": rlbf}
"""The one list to which a new method's file is added."""

CHANGEABLE = frozenset(
    f"{option}.{name}"
    for option in (http_critic.OPTION, http_critic.JUDGE_OPTION)
    for name in http_critic.CHANGEABLE
)
"""Settings that no result depends on: a run may go on with others, as with a larger budget for its
critic."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "sentencepiece", "grain", "numpy")


def run(config: ExperimentConfig, workdir: Path, only: Collection[str] | None = None) -> None:
    """Runs an experiment to its report. Raises UserError for what a user can mend, Preempted after
    a signal.

    `only`: names of the stages to run, the others being there already (`reuse.adopt`) or not
      wanted; None: all.
    """
    if config.method not in RECIPES:
        raise UserError(f"method {config.method!r}: no such recipe; there are {', '.join(RECIPES)}")
    stages = [
        stage for stage in RECIPES[config.method](config) if only is None or stage.name in only
    ]
    work = open_workspace(config, workdir)
    _ = work.world  # a data file that cannot be used leaves no folder behind
    if config.critic_classifier.path:
        _ = work.critic  # nor does a classifier that cannot be read
    for option, folder in (
        ("critic_model", config.critic_model),
        ("judge_model", config.judge_model),
    ):
        if folder:
            check_model(folder, option)
    open_workdir(config, workdir)
    began, name = time.perf_counter(), ""
    try:
        with alone_in(workdir):
            for number, stage in enumerate(stages, 1):
                name = stage.name
                run_stage(work, stage, f"[{number}/{len(stages)}]")
            name = "report"
            write_report(workdir)
    except KeyboardInterrupt:
        kept = "finished stages and checkpoints are kept"
        raise Preempted(
            f"stopped in stage {name}; {kept}" if name else f"stopped; {kept}"
        ) from None
    say(f"finished in {time.perf_counter() - began:.0f} s; open {workdir / 'report.html'}")


def run_stage(work: Workspace, stage: Stage, number: str) -> None:
    """Runs a stage unless it is done. The marker in done/ comes last: all that it stands for is on
    disk by then."""
    done = work.folder / "done" / stage.name
    if done.exists():
        return
    started = time.perf_counter()
    stage.run(work)
    seconds = time.perf_counter() - started
    write_json(done, {"seconds": round(seconds, 1)})
    if not stage.name.startswith("evaluate"):
        say(f"{number} {stage.name}: {seconds:.1f} s")


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """Keeps a second run out of the folder, and clears away what killed ones left half-written.

    Raises UserError if another process is running there.
    """
    if (
        jax.process_index() != 0
    ):  # the processes of one run share its folder; the first one answers for it
        yield
        return
    (workdir / "done").mkdir(exist_ok=True)
    with held(workdir / "done", wait=False) as mine:
        if not mine:
            raise UserError(
                f"{workdir}: another process is running here; let it end, or choose another "
                "--workdir"
            )
        sweep(workdir)
        yield


def open_workspace(config: ExperimentConfig, workdir: Path) -> Workspace:
    """The run's parts: of the user's own data where the configuration names a file, of the toy
    world otherwise."""
    return Workspace(config, workdir, OWN_DATA if config.data.path else TOY)


def plain(value: Any) -> Any:
    """A configuration as JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
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
        changed = [d for d in differences(stored_config(path), resolved) if d[0] not in CHANGEABLE]
        if changed and nothing_done(workdir):
            write_json(path, manifest(config))
        elif changed:
            shown = ", ".join(
                f"{name} is {brief(old)} there, {brief(new)} here" for name, old, new in changed[:3]
            )
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"{workdir} holds a run with other settings ({shown}{more}); "
                "choose another --workdir, or delete it to start again"
            )
        return
    if workdir.exists() and not workdir.is_dir():
        raise UserError(
            f"{workdir}: a file is there, and a folder is expected; choose another --workdir"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, manifest(config))
    except OSError as error:
        raise UserError(
            f"{workdir}: cannot be written ({error.strerror}); choose another --workdir"
        ) from None


def nothing_done(workdir: Path) -> bool:
    """Whether a run came to nothing: mending a setting that made its first stage fail needs no
    other folder then."""
    return not any(
        any(workdir.glob(pattern))
        for pattern in ("done/*", "stages/*", "evaluation/*", "results.json")
    )


def brief(value: Any) -> str:
    """A setting for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def stored_config(path: Path) -> dict[str, Any]:
    """The plain configuration in a run's manifest. Raises UserError where there is none, or it is
    not a manifest."""
    if not path.exists():
        raise UserError(
            f"{path.parent}: no run here (manifest.json is missing); make one with `rlbf run`"
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["config"]
        if not isinstance(stored, dict):
            raise TypeError(f"config is a {type(stored).__name__}, expected an object")
        if isinstance(stored.get("model"), dict):
            stored["model"] = upgraded(stored["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a manifest ({error}); put the right one back, or choose another --workdir"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return stored


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted names at which two plain configurations differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in sorted(old.keys() | new.keys()):
            found += differences(
                old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name
            )
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
        head = subprocess.run(
            [*say_git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changed = subprocess.run(
            [*say_git, "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if changed.strip() else "")


# Using a finished run ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A stage of a run, ready to sample."""

    sampler: Sampler
    params: dict
    tokenizer: Tokenizer
    config: ExperimentConfig

    def sample(self, requests: Sequence[Request], seed: int = 0) -> list[Generation]:
        return self.sampler(self.params, list(requests), seed)


def open_run(workdir: Path) -> Workspace:
    """The workspace of an existing run, from its manifest. Raises UserError if there is none."""
    return open_workspace(config_of_run(workdir), workdir)


def config_of_run(workdir: Path) -> ExperimentConfig:
    """What an existing run was made with. Raises UserError if there is none, or it is of another
    version."""
    path = workdir / "manifest.json"
    try:
        return restore(ExperimentConfig, stored_config(path))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: config does not fit this version of the program ({error})"
        ) from error


def restore(kind: Any, stored: Any) -> Any:
    """The inverse of `plain`, by type hints."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = {field.name for field in dataclasses.fields(kind)}
        return kind(
            **{name: restore(hints[name], value) for name, value in stored.items() if name in known}
        )
    if origin in (typing.Union, types.UnionType):
        if stored is None:
            return None
        return restore(next(arg for arg in args if arg is not type(None)), stored)
    if origin is tuple and isinstance(stored, list):
        return tuple(restore(args[0], value) for value in stored)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(stored)
    accepted = (int, float) if kind is float else kind
    if kind in (bool, int, float, str) and not isinstance(stored, accepted):
        raise ValueError(f"{stored!r} where {kind.__name__} is expected")
    return stored


def load(workdir: Path, stage: str) -> Loaded:
    """A finished stage of a run. Raises UserError if the run or the stage is missing."""
    work = open_run(workdir)
    params = work.params(stage)
    return Loaded(work.sampler, params, work.tokenizer, work.config)


def evaluate_stage(
    workdir: Path, stage: str, data: Pool | None = None, n_prompts: int | None = None
) -> None:
    """Evaluates a stage again, on another pool or with more prompts, and rewrites the report."""
    work, method = _to_evaluate(workdir, stage, data, n_prompts)
    work.evaluate(stage, method)
    write_report(workdir)


def tradeoff_stage(
    workdir: Path, stage: str, data: Pool | None = None, n_prompts: int | None = None
) -> Path:
    """Measures a stage's trade-off curve; returns the file that holds it."""
    work, method = _to_evaluate(workdir, stage, data, n_prompts)
    write_tradeoff(work, stage, method)
    return workdir / tradeoff_file(stage)


def _to_evaluate(
    workdir: Path, stage: str, data: Pool | None, n_prompts: int | None
) -> tuple[Workspace, str]:
    """A run with its suite changed, and the `method` of the stage's records."""
    work = open_run(workdir)
    suite = work.config.evaluation
    suite = dataclasses.replace(
        suite, pool=data or suite.pool, n=suite.n if n_prompts is None else n_prompts
    )
    work.config = dataclasses.replace(work.config, evaluation=suite)
    from rlbf_jax.methods.rlbf import method_name

    return work, method_name(work.config, stage)
