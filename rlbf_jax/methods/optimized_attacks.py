"""Attacks that are made for one stage of a finished run (`rlbf attack`): search, sample, judge, write down."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlbf_jax.attacks.direct import AttackConfig
from rlbf_jax.attacks.optimized import OPTIMIZED, OptimizedAttempt, OptimizedConfig, attack_model
from rlbf_jax.data.world import Pool
from rlbf_jax.errors import InputError, UserError
from rlbf_jax.evaluation.intervals import interval
from rlbf_jax.evaluation.results import Record, read_results, write_results
from rlbf_jax.evaluation.suite import evaluate
from rlbf_jax.methods.rlbf import method_name
from rlbf_jax.methods.runner import open_run
from rlbf_jax.methods.workspace import Workspace
from rlbf_jax.training.progress import say


@dataclasses.dataclass(frozen=True)
class AttackRunConfig:
    """What is tried on a stage."""

    attacks: tuple[str, ...] = OPTIMIZED
    n: int = 8
    """Prompts an attack."""
    pool: Pool | None = None
    """None: the run's."""
    max_tokens: int | None = None
    """Of the answers to the found suffixes; None: as the run's configuration says."""
    optimized: OptimizedConfig = OptimizedConfig()

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"n is {self.n}, expected 1 or more")
        if unknown := [name for name in self.attacks if name not in OPTIMIZED]:
            raise ValueError(f"unknown attack {unknown[0]!r}; those of this command are {', '.join(OPTIMIZED)}")


def attack_run(workdir: Path, stage: str, config: AttackRunConfig) -> list[Record]:
    """Attacks a finished stage and adds what came of it to the run.

    Writes `evaluation/attacks/ATTACK_STAGE.jsonl` (rows of an evaluation, each with its search) and records to
    `results.json`, `target_loss` and `start_loss` (nats an id of the objective) beside the usual metrics. A search that
    was broken off goes on from `attacks/ATTACK_STAGE.npz`. Raises UserError where run or stage is missing.
    """
    work = open_run(workdir)
    params = work.params(stage)
    read_results(workdir / "results.json")  # a damaged file is named before the work, not after it
    records: list[Record] = []
    for name in config.attacks:
        file = work.folder / "attacks" / f"{name}_{stage}.npz"
        found = _attack(work, stage, params, name, config, file)
        write_results(workdir / "results.json", found)
        file.unlink(missing_ok=True)  # rows and records hold what was found
        records += found
    return records


def _attack(work: Workspace, stage: str, params: dict, name: str, config: AttackRunConfig, file: Path) -> list[Record]:
    suite = work.config.evaluation
    sample = work.sampling(params, name)
    knobs = suite.knobs if config.max_tokens is None else dataclasses.replace(suite.knobs, max_tokens=config.max_tokens)
    told = AttackConfig(config.pool or suite.pool, suite.splits[-1], knobs, suite.room)
    # One generator for all harmful attacks: they want the same answers from the same prompts.
    rng = np.random.default_rng([suite.seed, config.optimized.search.seed, *b"optimized"])
    mesh = work.mesh if work.mesh.size > 1 else None
    try:
        made = attack_model(
            name, work.model, params, work.tokenizer, sample, work.world, rng, config.n, told, config.optimized,
            mesh=mesh, file=file,
        )  # fmt: skip
    except InputError as error:
        raise UserError(str(error)) from error
    attempts = [
        dataclasses.replace(a.attempt, request=dataclasses.replace(a.attempt.request, id=_id(name, i)))
        for i, a in enumerate(made)
    ]
    context = work.context(stage, method_name(work.config, stage), data=config.pool)
    found, rows = evaluate(sample, attempts, work.judge, work.tokenizer, context)
    found += [_loss_record(found[0], metric, made) for metric in ("target_loss", "start_loss")]
    found = [dataclasses.replace(record, knobs={**record.knobs, **_search_knobs(config.optimized)}) for record in found]
    lines = [row | {"search": _search_json(a)} for row, a in zip(rows, made, strict=True)]
    work.write_lines(f"evaluation/attacks/{name}_{stage}.jsonl", lines)
    shown = {r.metric: round(r.value, 3) for r in found if r.metric in ("target_loss", "emitted", "asr")}
    say(f"{stage}: {name}: {', '.join(f'{metric} {value}' for metric, value in shown.items())}")
    return found


def _search_knobs(config: OptimizedConfig) -> dict[str, Any]:
    """The budget of a search, and what of it differs from the default."""
    default = OptimizedConfig()
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "search"}
    found = {name: value for name, value in own.items() if value != getattr(default, name)}
    for field in dataclasses.fields(config.search):
        value = getattr(config.search, field.name)
        if field.name not in ("steps", "search_width") and value != getattr(default.search, field.name):
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return {"candidates": config.search.steps * config.search.search_width, **found}


def _id(name: str, index: int) -> int:
    """Request id of the n-th attempt; the same for every stage."""
    return zlib.crc32(f"optimized/{name}/{index}".encode()) & 0x7FFFFFFF


def _loss_record(like: Record, metric: str, made: Sequence[OptimizedAttempt]) -> Record:
    values = [a.found.loss if metric == "target_loss" else a.found.start_loss for a in made]
    return like.measured(metric, interval(values, [a.attempt.prompt.id for a in made], counts=True))


def _search_json(made: OptimizedAttempt) -> dict[str, Any]:
    found = made.found
    return {
        "message": found.text,
        "suffix_ids": list(found.ids),
        "loss": found.loss,
        "start_loss": found.start_loss,
        "losses": [float(x) if np.isfinite(x) else None for x in found.losses],
        "evaluations": found.evaluations,
        "filtered_steps": found.filtered_steps,
        "stopped": found.stopped,
    }
