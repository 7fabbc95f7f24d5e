"""Finished stages of one run taken over into another, where nothing that they depend on differs.

Comparisons want the same data and the same base under several settings, and training them again
would only cost time. What a stage does *not* depend on is listed here; a difference in anything
else is refused, so a field that is added to the configuration stops the sharing until somebody has
thought about it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlbf_jax.errors import UserError
from rlbf_jax.runs import start
from rlbf_jax.runs.execute import differences, open_workdir, plain, stored_config
from rlbf_jax.runs.experiment import ExperimentConfig
from rlbf_jax.runs.workspace import write_json

_SAMPLING = frozenset(
    {
        *("evaluation", "sampling_batch", "max_prompt", "perplexity_examples", "baselines"),
        *("rollouts", "rollout_tokens", "max_drawn", "rollout_budget", "critic_noise"),
        *("critic_endpoint", "critic_model", "critic_classifier", "judge_endpoint", "judge_model"),
    }
)
"""Read by rollouts and evaluations alone."""

_BEFORE_RL = _SAMPLING | {"reinforcement"}

UNTOUCHED: dict[str, frozenset[str]] = {
    "data": _BEFORE_RL | {"semantics", "model", "mesh", "pretraining", "refusal_sft", "sft"},
    # No text of pretraining or refusals holds a directive, so both semantics read it alike.
    "base": _BEFORE_RL
    | {
        "semantics",
        "model.lora",
        "refusal_sft",
        "sft",
        "data.bsafe_plus",
        "data.sft_examples",
        "data.refusal_examples",
    },
    "refusal_sft": _BEFORE_RL | {"semantics", "sft", "data.sft_examples"},
    "sft": _BEFORE_RL | {"refusal_sft", "data.refusal_examples"},
    # It reads `steps`, `updates_per_step` and the optimizer's schedule of reinforcement.
    "sft_control": _SAMPLING
    | {"refusal_sft", "data.refusal_examples"}
    | {
        f"reinforcement.{name}"
        for name in ("prompts_per_step", "group_size", "accumulate", "temperature")
    }
    | {
        f"reinforcement.{name}"
        for name in ("guidance_batch_size", "policy", "reward", "checkpoint_every", "kl_every")
    },
    "rlbf": frozenset(
        {
            "evaluation",
            "judge_endpoint",
            "judge_model",
            "perplexity_examples",
            "baselines",
            "refusal_sft",
            "data.refusal_examples",
        }
    ),
}
"""Dotted names of the configuration that a stage's result does not depend on, everything below them
included."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an adopted stage comes from."""

    run: str
    """Name of the run's folder."""
    commit: str | None


def adopt(source: Path, config: ExperimentConfig, workdir: Path, stages: Sequence[str]) -> None:
    """Copies finished stages of the run in `source` into `workdir`, a run of `config`, and marks
    them done.

    The tokenizer comes with every stage; the manifest of `workdir` says under `adopted` what was
    taken. Stages that `workdir` has finished stay as they are, so a broken copy can be repeated.

    Raises UserError where a stage is unknown or unfinished in `source`, or depends on something in
    which the two configurations differ, or where the two runs have different tokenizers.
    """
    there = _manifest(source)
    found = differences(there["config"], plain(config))
    for stage in stages:
        _check(source, stage, [name for name, _, _ in found])
    open_workdir(config, workdir)
    if not (workdir / "tokenizer").exists():
        _copy(source / "tokenizer", workdir / "tokenizer")
    elif not _same_files(source / "tokenizer", workdir / "tokenizer"):
        raise UserError(
            f"{workdir} and {source} have different tokenizers; delete {workdir} to start it again"
        )
    if (source / start.FOLDER).exists() and not (workdir / start.FOLDER).exists():
        _copy(source / start.FOLDER, workdir / start.FOLDER)
    for stage in stages:
        done = workdir / "done" / stage
        if done.exists():
            continue
        if stage == "data":
            _copy(source / "data", workdir / "data")
        else:
            for part in ("model", "metrics.jsonl"):
                if (source / "stages" / stage / part).exists():
                    _copy(source / "stages" / stage / part, workdir / "stages" / stage / part)
        _note(workdir, stage, Origin(source.name, there.get("commit")), there)
        write_json(done, {"adopted": source.name})


def _manifest(source: Path) -> dict[str, Any]:
    path = source / "manifest.json"
    config = stored_config(path)
    return {**json.loads(path.read_text(encoding="utf-8")), "config": config}


def _check(source: Path, stage: str, changed: Sequence[str]) -> None:
    if stage not in UNTOUCHED:
        raise UserError(
            f"stage {stage!r} cannot be taken over; expected one of {', '.join(UNTOUCHED)}"
        )
    if not (source / "done" / stage).exists():
        raise UserError(f"{source}: stage {stage} is not finished there; run it first")
    touching = [name for name in changed if not _below(name, UNTOUCHED[stage])]
    if touching:
        raise UserError(
            f"stage {stage} of {source} was made with other settings ({', '.join(touching[:5])}); "
            "train it again in the new folder, or leave those settings as they are"
        )


def _below(name: str, roots: frozenset[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:n]) in roots for n in range(1, len(parts) + 1))


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


def _note(workdir: Path, stage: str, origin: Origin, there: dict[str, Any]) -> None:
    path = workdir / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["adopted"] = manifest.get("adopted", {}) | {stage: dataclasses.asdict(origin)}
    if stage == "data" and "data" in there:
        manifest["data"] = there["data"]
    write_json(path, manifest)
