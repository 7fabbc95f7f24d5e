"""Attacks on a finished stage, beside what its evaluation ran: `rlbf attack RUN --attack NAME`.

Rows go to `evaluation/attacks/NAME_STAGE.jsonl`, numbers to `results.json`. The stage's own evaluation stays as it is:
records of an attack that evaluations run too say in their knobs who asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rlbf_jax.attacks import ATTACKS, STANDARD
from rlbf_jax.attacks.decoding import DecodingGrid
from rlbf_jax.attacks.geometry import GeometryGrid
from rlbf_jax.critics.base import Critic, Exchange
from rlbf_jax.data.world import Pool
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.intervals import interval
from rlbf_jax.evaluation.report_tables import ASKED
from rlbf_jax.evaluation.results import Record, read_results, write_results
from rlbf_jax.evaluation.suite import build_attempts, evaluate, judge_distinct
from rlbf_jax.evaluation.worst_of_n import any_pick, picks
from rlbf_jax.methods import runner
from rlbf_jax.methods.rlbf import method_name
from rlbf_jax.training.progress import say


@dataclasses.dataclass(frozen=True)
class AttackOptions:
    """How a stage is attacked; None: as the run's configuration says."""

    attacks: tuple[str, ...] = ("middle_grid", "benign_grid")
    data: Pool | None = None
    n_prompts: int | None = None
    max_tokens: int | None = None
    """Forced ids included."""
    grid: Literal["run", "paper"] = "run"
    """Settings of `decoding`: the run's, or the 49 of the reference implementation."""
    geometry: Literal["run", "wide"] = "run"
    """Lengths of `middle_grid`, `benign_grid` and `prefilling_depth`: the run's, or up to 256 benign ids."""


def attack_stage(workdir: Path, stage: str, options: AttackOptions) -> list[Record]:
    """Attacks a finished stage, writes rows and records.

    Raises UserError for an unknown attack, or one that does not fit, before anything is written.
    """
    if unknown := [name for name in options.attacks if name not in ATTACKS]:
        raise UserError(f"attack {unknown[0]!r}: there are {', '.join(ATTACKS)}")
    work = runner.open_run(workdir)
    suite = work.config.evaluation
    n = suite.n if options.n_prompts is None else options.n_prompts
    room = suite.knobs.max_tokens if options.max_tokens is None else options.max_tokens
    suite = dataclasses.replace(
        suite,
        attacks=options.attacks,
        pool=options.data or suite.pool,
        n=n,
        n_decoding=suite.n_decoding if options.n_prompts is None else n,
        knobs=dataclasses.replace(suite.knobs, max_tokens=room),
        decoding=DecodingGrid.paper() if options.grid == "paper" else suite.decoding,
        geometry=GeometryGrid.wide() if options.geometry == "wide" else suite.geometry,
    )
    work.config = dataclasses.replace(work.config, evaluation=suite)
    try:
        attempts = build_attempts(work.world, work.tokenizer, suite)
    except ValueError as error:
        raise UserError(f"{error} (--max_tokens)") from error
    params = work.params(stage)
    read_results(work.folder / "results.json")  # a damaged file is named before the work, not after it
    found: list[Record] = []
    for name in options.attacks:
        asked = [attempt for attempt in attempts if attempt.attack == name]
        context = work.context(stage, method_name(work.config, stage))
        records, rows = evaluate(work.sampling(params, name), asked, work.judge, work.tokenizer, context)
        if name == "decoding":
            topics = [attempt.prompt.topic for attempt in asked]
            records += scored_records(work.critic, rows, topics, records[0])
        if name in STANDARD:
            records = [dataclasses.replace(r, knobs={**r.knobs, **ASKED}) for r in records]
        work.write_lines(f"evaluation/attacks/{name}_{stage}.jsonl", rows)
        write_results(work.folder / "results.json", records)
        found += records
        say(f"{stage}: {name}, {len(rows)} responses")
    return found


def scored_records(
    scorer: Critic, rows: Sequence[dict[str, Any]], topics: Sequence[str], template: Record
) -> list[Record]:
    """`asr_scored`, `leak_scored`: any of the settings' picks, picked by the scorer and rated by the judge."""
    exchanges = [Exchange(row["prompt"], row["visible"], topic) for row, topic in zip(rows, topics, strict=True)]
    judged = judge_distinct(scorer, exchanges)
    chosen = picks(rows, [judged[exchange] for exchange in exchanges])
    knobs = {"settings": len({str(row["knobs"]) for row in rows}), "scorer": scorer.name}
    records = []
    for metric in ("asr", "leak"):
        worst = any_pick(rows, chosen, metric)
        if worst:
            records.append(template.measured(f"{metric}_scored", interval(list(worst.values()), list(worst)), knobs))
    return records
