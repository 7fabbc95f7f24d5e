"""Finished stages of one run taken over into another, where nothing that they depend on differs.

Comparisons want the same data and the same base under several settings, or several methods, and
training them again would only cost time. Whether a stage may be taken over is no list of names: two
stages of one fingerprint have one result (`stage.dependencies`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlbf_jax.errors import UserError
from rlbf_jax.plain import differences
from rlbf_jax.runs import start
from rlbf_jax.runs.execute import recipe
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.runs.files import read_json, write_json
from rlbf_jax.runs.manifest import (
    Manifest,
    experiment_from,
    open_workdir,
    read_manifest,
    shared_by,
)
from rlbf_jax.runs.run import TOKENIZER
from rlbf_jax.runs.stage import Stage, dependencies, fingerprint, lineage


def adopt(source: Path, e: Experiment, workdir: Path, stages: Sequence[str]) -> None:
    """Copies finished stages of the run in `source` into `workdir`,
    a run of `e`, and marks them done.

    The tokenizer comes with every stage; the manifest of `workdir` says under `adopted` what was
    taken. Stages that `workdir` has finished stay as they are, so a broken copy can be repeated.

    Raises UserError where a stage is unknown or unfinished in `source`, or depends on something in
    which the two runs differ, or where the two runs have different tokenizers.
    """
    there, every = read_manifest(source), recipe(e)
    for stage in stages:
        _check(source, there, e, every, stage)
    open_workdir(e, every, workdir)
    prepared = {stage.name for stage in every if stage.prepares}
    if not (workdir / TOKENIZER).exists():
        _copy(source / TOKENIZER, workdir / TOKENIZER)
    elif not _same_files(source / TOKENIZER, workdir / TOKENIZER):
        raise UserError(
            f"{workdir} and {source} have different tokenizers; delete {workdir} to start it again"
        )
    if (source / start.FOLDER).exists() and not (workdir / start.FOLDER).exists():
        _copy(source / start.FOLDER, workdir / start.FOLDER)
    for stage in dict.fromkeys((TOKENIZER, *stages)):
        done = workdir / "done" / stage
        if done.exists() or not (source / "done" / stage).exists():
            continue
        files = next(s.files for s in every if s.name == stage)
        _take(source, workdir, stage, stage in prepared, files)
        _note(workdir, source, stage, {"run": source.name, "commit": there.commit})
        write_json(done, {"adopted": source.name})


NOTED = (TOKENIZER, "start_from", "file")
"""What the stage of the tokenizer notes in the manifest's `data`."""


def _take(source: Path, workdir: Path, stage: str, prepares: bool, files: Sequence[str]) -> None:
    """Copies what a stage has made."""
    dataset = stage.removesuffix("_data")
    if prepares and (source / "data" / dataset).exists():
        _copy(source / "data" / dataset, workdir / "data" / dataset)
        report = workdir / "data" / "report.json"
        counts = read_json(source / "data" / "report.json").get(dataset, {})
        write_json(report, read_json(report) | {dataset: counts})
    for part in ("model", "metrics.jsonl", *files):
        if (source / "stages" / stage / part).exists():
            _copy(source / "stages" / stage / part, workdir / "stages" / stage / part)


def _check(source: Path, there: Manifest, e: Experiment, every: Sequence[Stage], name: str) -> None:
    stage = next((s for s in every if s.name == name), None)
    if stage is None or not _holds_a_result(stage):
        known = ", ".join(s.name for s in every if _holds_a_result(s))
        raise UserError(f"stage {name!r} cannot be taken over; expected one of {known}")
    entry = there.stage(name)
    if entry is None or not (source / "done" / name).exists():
        raise UserError(f"{source}: stage {name} is not finished there; run it first")
    if entry.fingerprint == fingerprint(every, name, shared_by(e)):
        return
    names = ", ".join(_differing(there, e, every, name)[:5])
    raise UserError(
        f"stage {name} of {source} was made with other settings ({names}); train it again in the "
        "new folder, or leave those settings as they are"
    )


def _holds_a_result(stage: Stage) -> bool:
    return stage.prepares or stage.evaluated or bool(stage.files)


def _differing(there: Manifest, e: Experiment, every: Sequence[Stage], name: str) -> list[str]:
    """Flags of the settings that decide a stage's result and that differ.

    These are the ones which, taken alone as the other run has them, make another fingerprint; names
    of dependencies where there is no such flag.
    """
    mine, stored = fingerprint(every, name, shared_by(e)), e.stored()
    flags = [
        dotted
        for dotted, old, _ in differences(there.config, stored)
        if _holds(there.config, dotted) and _fingerprint_with(e, name, dotted, old) != mine
    ]
    if flags:
        return flags
    entries = {n: there.stage(n) for n in lineage(every, name)}
    configs = {n: entry.config for n, entry in entries.items() if entry}
    needs = dependencies(every, name, shared_by(e))
    return [dotted for dotted, _, _ in differences({**there.shared, "stages": configs}, needs)]


def _fingerprint_with(e: Experiment, name: str, dotted: str, value: Any) -> str:
    """Fingerprint of a stage with one setting as a manifest holds it; empty if that makes no
    experiment with such a stage."""
    stored = part = e.stored()
    *parents, last = dotted.split(".")
    try:
        for parent in parents:
            part = part[parent]
        part[last] = value
        other = experiment_from(stored, type(e.method))
        return fingerprint(recipe(other), name, shared_by(other))
    except (UserError, ValueError, TypeError, KeyError):
        return ""


def _holds(config: dict[str, Any], dotted: str) -> bool:
    """Whether a plain configuration has a setting."""
    first, _, rest = dotted.partition(".")
    if first not in config or not rest:
        return first in config
    return isinstance(config[first], dict) and _holds(config[first], rest)


def _copy(source: Path, target: Path) -> None:
    """A whole copy or none: beside the target first, then moved there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    if source.is_dir():
        shutil.copytree(source, temporary)
        shutil.rmtree(target, ignore_errors=True)
    else:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def _note(workdir: Path, source: Path, stage: str, origin: dict[str, Any]) -> None:
    path = workdir / "manifest.json"
    manifest = read_json(path)
    manifest["adopted"] = manifest.get("adopted", {}) | {stage: origin}
    names = NOTED if stage == TOKENIZER else (stage.removesuffix("_data"),)
    there = read_json(source / "manifest.json").get("data", {})
    taken = {name: there[name] for name in names if name in there}
    manifest["data"] = manifest.get("data", {}) | taken
    write_json(path, manifest)
