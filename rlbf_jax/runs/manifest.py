"""RUN/manifest.json: the resolved experiment, its stages with fingerprints, versions, devices.

{"format": 2, "config": {...}, "stages": [{"name", "after", "method", "label", "evaluated",
 "retracts", "headline", "config", "fingerprint"}, ...], "shared": {...}, "data": {...},
 "versions": ..., ...}

`config` holds the experiment's and the method's settings side by side, as flags do.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import rlbf_jax
from rlbf_jax.errors import UserError
from rlbf_jax.models.config import upgraded
from rlbf_jax.plain import differences, field_names, plain, restore, same_path
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.runs.files import read_json, write_json
from rlbf_jax.runs.stage import Shared, Stage, fingerprint
from rlbf_jax.storage import held

FORMAT = 2
"""Version of manifests; those of rlbf_jax 0.1 say none."""
PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint"),
    *("sentencepiece", "grain", "numpy"),
)


@dataclasses.dataclass(frozen=True)
class StoredMethod:
    """What a manifest says of a method; its own settings stay in `Manifest.config`."""

    name: str
    rule: str


@dataclasses.dataclass(frozen=True)
class StageEntry:
    """A stage as a manifest holds it."""

    name: str
    fingerprint: str
    config: dict[str, Any]
    after: tuple[str, ...] = ()
    method: str = ""
    label: str = ""
    evaluated: bool = False
    retracts: bool = False
    headline: bool = False


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a run's folder says of it."""

    path: Path
    config: dict[str, Any]
    stages: tuple[StageEntry, ...]
    shared: dict[str, Any]
    commit: str | None = None

    def stage(self, name: str) -> StageEntry | None:
        """The entry of a stage; None where the recipe has none of this name."""
        return next((entry for entry in self.stages if entry.name == name), None)

    def experiment(self) -> Experiment[StoredMethod]:
        """The experiment without its method's own settings, which no command after a run needs.

        Raises UserError where it does not fit this version of the program.
        """
        method = StoredMethod(str(self.config.get("method")), str(self.config.get("rule")))
        try:
            return experiment_from(self.config, method)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise UserError(
                f"{self.path}: config does not fit this version of the program ({error})"
            ) from error


def experiment_from(config: dict[str, Any], method: Any) -> Experiment:
    """An experiment from its stored settings.

    Args:
      method: the method, or the class of its configuration.

    Raises ValueError, TypeError or KeyError for settings that do not fit.
    """
    if isinstance(method, type):
        method = restore(method, config)
    hints = typing.get_type_hints(Experiment)
    values = {}
    for field in dataclasses.fields(Experiment):
        if field.name == "method":
            values["method"] = method
        elif field.metadata.get("flat"):
            values[field.name] = restore(hints[field.name], config)
        elif field.name in config:
            values[field.name] = restore(hints[field.name], config[field.name])
    return Experiment(**values)


def shared_by(e: Experiment) -> Shared:
    """What all stages of an experiment depend on."""
    data = plain(e.data, decisive=True)
    del data["rules"]  # the tokenizer's stage has them resolved
    return {"seed": e.seed, "data": data}


def make_manifest(e: Experiment, stages: Sequence[Stage]) -> dict[str, Any]:
    """What a run depends on: configuration, stages, versions, commit, devices, seeds."""
    shared = shared_by(e)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions |= {"rlbf_jax": rlbf_jax.__version__, "python": platform.python_version()}
    return {
        "format": FORMAT,
        "config": e.stored(),
        "stages": [
            {
                "name": stage.name,
                "after": list(stage.after),
                "method": stage.method,
                "label": stage.label,
                "evaluated": stage.evaluated,
                "retracts": stage.retracts,
                "headline": stage.headline,
                "fingerprint": fingerprint(stages, stage.name, shared),
                "config": {**plain(stage.config, decisive=True), "does": stage.does},
            }
            for stage in stages
        ],
        "shared": shared,
        "versions": versions,
        "commit": commit(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "seeds": {"training": e.seed, "evaluation": e.evaluation.seed},
    }


def read_manifest(workdir: Path) -> Manifest:
    """A run's manifest. Raises UserError where there is none, it is damaged, or of rlbf_jax 0.1."""
    path = workdir / "manifest.json"
    if not path.exists():
        raise UserError(
            f"{workdir}: no run here (manifest.json is missing); make one with `rlbf run`"
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        config = stored["config"]
        if not isinstance(config, dict):
            raise TypeError(f"config is a {type(config).__name__}, expected an object")
        if stored.get("format") != FORMAT:
            made_by = (stored.get("versions") or {}).get("rlbf_jax", "an unknown version")
            raise UserError(
                f"{path}: made by rlbf_jax {made_by}, whose runs this version "
                f"({rlbf_jax.__version__}) does not read; use that version, "
                "or run again in another --workdir"
            )
        if isinstance(config.get("model"), dict):
            config["model"] = upgraded(config["model"])
        if isinstance(config.get("mesh"), dict):
            config["mesh"].setdefault("slice", 1)  # older runs knew three axes
        if isinstance(config.get("reinforcement"), dict):
            config["reinforcement"].setdefault("staleness", 0)  # and were on-policy
        entries = tuple(
            StageEntry(**{**entry, "after": tuple(entry["after"])}) for entry in stored["stages"]
        )
        return Manifest(path, config, entries, stored["shared"], stored.get("commit"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a manifest ({error}); put the right one back, or choose another --workdir"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def open_workdir(e: Experiment, stages: Sequence[Stage], workdir: Path) -> None:
    """Writes the manifest, or checks that the folder's is of this experiment.

    Raises UserError if the folder belongs to another experiment or cannot be written.
    """
    path = workdir / "manifest.json"
    if path.exists():
        there = read_manifest(workdir)
        changed = changed_settings(e, there.config)
        if changed and not _taken_over(e, stages, workdir, there):
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
        write_json(path, make_manifest(e, stages))
    except OSError as error:
        raise UserError(
            f"{workdir}: cannot be written ({error.strerror}); choose another --workdir"
        ) from None


def changed_settings(e: Experiment, stored: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings in which an experiment differs from a stored one: (name, old, new).

    Those that decide nothing are left out.
    """
    kinds = (type(e), type(e.method), type(e.base), *_flat_kinds(e.method))
    harmless = {name for kind in kinds for name in field_names(kind, decides_nothing=True)}
    paths = {name for kind in kinds for name in field_names(kind, paths=True)}
    return [
        (name, old, new)
        for name, old, new in differences(stored, e.stored())
        if name not in harmless and not (name in paths and same_path(old, new))
    ]


def _flat_kinds(method: Any) -> list[type]:
    return [
        type(getattr(method, field.name))
        for field in dataclasses.fields(method)
        if field.metadata.get("flat")
    ]


def _taken_over(e: Experiment, stages: Sequence[Stage], workdir: Path, there: Manifest) -> bool:
    """Makes a folder one of this experiment where no other setting has counted yet: nothing is
    trained, and what is prepared is what these settings would make. Mending a setting that failed
    before the first training needs no other folder then.

    Returns whether it did.
    """
    begun = ("stages/*", "evaluation/*", "results.json")
    if any(any(workdir.glob(pattern)) for pattern in begun):
        return False
    shared, known = shared_by(e), {stage.name for stage in stages}
    for name in (path.name for path in workdir.glob("done/*")):
        entry = there.stage(name)
        if entry is None or name not in known:
            return False
        if entry.fingerprint != fingerprint(stages, name, shared):
            return False
    (workdir / "done").mkdir(exist_ok=True)
    with held(workdir / "done", wait=False) as free:
        if free:
            path = workdir / "manifest.json"
            old = read_json(path)
            kept = {name: old[name] for name in ("data", "adopted") if name in old}
            write_json(path, make_manifest(e, stages) | kept)
        return free


def brief(value: Any) -> str:
    """A setting for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def commit() -> str | None:
    """Commit of the checkout this package runs from, `+` when it was changed; None outside one."""
    git = ["git", "-C", str(Path(rlbf_jax.__file__).parent.parent)]

    def ask(*words: str) -> str:
        command = [*git, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        head, changed = ask("rev-parse", "HEAD"), ask("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if changed.strip() else "")
