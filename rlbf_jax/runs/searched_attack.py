"""Attacks that are made for one stage of a finished run: search, sample, judge. `attack.py`
writes down."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlbf_jax.attacks import ATTACKS
from rlbf_jax.attacks.base import AttackConfig, Attempt, Scene, Victim
from rlbf_jax.attacks.search.optimized import OptimizedConfig
from rlbf_jax.attacks.search.suffix import Found
from rlbf_jax.errors import InputError, UserError
from rlbf_jax.evaluation.intervals import interval
from rlbf_jax.evaluation.results import Record
from rlbf_jax.evaluation.suite import evaluate
from rlbf_jax.runs.evaluate import Evaluator

Measured = tuple[list[Record], list[dict[str, Any]], str]
"""Records, rows, and what to say of them after the attack's name."""


def search_file(folder: Path, stage: str, name: str) -> Path:
    """Where the state of a search is kept, in a run's folder, until its results are written."""
    return folder / "attacks" / f"{name}_{stage}.npz"


def searched(evaluator: Evaluator, name: str, n: int, config: OptimizedConfig) -> Measured:
    """One of `SEARCHED` on n prompts, with pool, splits and knobs of the evaluator's suite.

    Rows are those of an evaluation, each with its search where it has one; records have
    `target_loss` and `start_loss` (nats an id of the objective) beside the usual metrics then.
    Raises UserError where no suffix can be searched.
    """
    run, suite = evaluator.run, evaluator.suite
    sample = evaluator.sampling(name)
    attack_config = AttackConfig(suite.pool, suite.splits[-1], suite.knobs, suite.room)
    # One generator for all harmful attacks: they want the same answers from the same prompts.
    rng = np.random.default_rng([suite.seed, config.search.seed, *b"optimized"])
    mesh = run.mesh if run.mesh.size > 1 else None
    file = search_file(run.folder, evaluator.config.stage, name)
    policy = evaluator.policy
    victim = Victim(run.model, policy.params, sample, mesh, file, policy.rule)
    scene = Scene(run.world, run.tokenizer, rng, attack_config, victim)
    try:
        spec = ATTACKS[name]
        own = isinstance(spec.options, OptimizedConfig)
        made = spec.make(scene, n, config if own else spec.options)
    except InputError as error:
        raise UserError(str(error)) from error
    attempts = [
        dataclasses.replace(a, request=dataclasses.replace(a.request, id=_id(name, i)))
        for i, a in enumerate(made)
    ]
    found, rows = evaluate(
        sample, attempts, evaluator.judge, run.tokenizer, evaluator.context(), evaluator.seams
    )
    if all(attempt.search is not None for attempt in made):
        found += [_loss_record(found[0], metric, made) for metric in ("target_loss", "start_loss")]
    knobs = _search_knobs(config) if own else _plain(spec.options)
    found = [dataclasses.replace(record, knobs={**record.knobs, **knobs}) for record in found]
    lines = [
        row if a.search is None else row | {"search": _search_json(a.search)}
        for row, a in zip(rows, made, strict=True)
    ]
    shown = {
        r.metric: round(r.value, 3) for r in found if r.metric in ("target_loss", "emitted", "asr")
    }
    return found, lines, ": " + ", ".join(f"{metric} {value}" for metric, value in shown.items())


def _search_knobs(config: OptimizedConfig) -> dict[str, Any]:
    """The budget of a search, and what of it differs from the default."""
    default = OptimizedConfig()
    own = {
        f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "search"
    }
    found = {name: value for name, value in own.items() if value != getattr(default, name)}
    for field in dataclasses.fields(config.search):
        value = getattr(config.search, field.name)
        if field.name in ("steps", "search_width") or value != getattr(default.search, field.name):
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return {"candidates": config.search.steps * config.search.search_width, **found}


def _plain(options: Any) -> dict[str, Any]:
    """Options of an attack that searches no suffix."""
    return dataclasses.asdict(options) if dataclasses.is_dataclass(options) else {}  # type: ignore[arg-type]


def _id(name: str, index: int) -> int:
    """Request id of the n-th attempt; the same for every stage."""
    return zlib.crc32(f"optimized/{name}/{index}".encode()) & 0x7FFFFFFF


def _loss_record(like: Record, metric: str, made: Sequence[Attempt]) -> Record:
    values = [a.search.loss if metric == "target_loss" else a.search.start_loss for a in made]
    return like.measured(metric, interval(values, [a.prompt.id for a in made], counts=True))


def _search_json(found: Found) -> dict[str, Any]:
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
