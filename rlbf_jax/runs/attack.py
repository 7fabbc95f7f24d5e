"""Attacks on a finished stage, beside what its evaluation ran: `rlbf attack RUN --attack NAME`.

Attacks that draw their prompts and forced words from the run's world (`DRAWN`), and those that
search a suffix for the stage's checkpoint (`SEARCHED`). Rows go to
`evaluation/attacks/NAME_STAGE.jsonl`, numbers to `results.json`. The stage's own evaluation stays
as it is: records of an attack that evaluations run too say in their knobs who asked. An attack that
is asked of a stage again, by other options too, replaces its rows and all its numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

from rlbf_jax.attacks import ATTACKS, DRAWN, SEARCHED, STANDARD, WORST_OF_N
from rlbf_jax.attacks.base import Attempt
from rlbf_jax.attacks.decoding import DecodingGrid
from rlbf_jax.attacks.forced.geometry import GeometryGrid
from rlbf_jax.attacks.search.optimized import OptimizedConfig
from rlbf_jax.critics.base import Critic
from rlbf_jax.data.world import Pool
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.intervals import interval
from rlbf_jax.evaluation.results import Record, read_results, write_results
from rlbf_jax.evaluation.suite import (
    SuiteConfig,
    build_attempts,
    evaluate,
    exchange_of,
    judge_distinct,
)
from rlbf_jax.evaluation.worst_of_n import any_pick, picks
from rlbf_jax.progress import say
from rlbf_jax.report.values import ASKED
from rlbf_jax.runs.evaluate import Evaluator
from rlbf_jax.runs.load import OpenRun
from rlbf_jax.runs.searched_attack import Measured, search_file, searched


@dataclasses.dataclass(frozen=True)
class AttackOptions:
    """How a stage is attacked; None: as the run's configuration says."""

    attacks: tuple[str, ...] = ("middle_grid", "benign_grid")
    data: Pool | None = None
    n_prompts: int | None = None
    """None: 8 where a suffix is searched."""
    max_tokens: int | None = None
    """Forced ids included."""
    grid: Literal["run", "paper"] = "run"
    """Settings of `decoding`: the run's, or the 49 of the reference implementation."""
    geometry: Literal["run", "wide"] = "run"
    """Lengths of `middle_grid`, `benign_grid` and `prefilling_depth`:
    the run's, or up to 256 benign ids."""
    optimized: OptimizedConfig = OptimizedConfig()
    """Of the attacks that search a suffix."""


def attack_stage(opened: OpenRun, stage: str, options: AttackOptions) -> list[Record]:
    """Attacks a finished stage, writes rows and records: first the attacks that draw,
    then those that search.

    A search that was broken off goes on from `attacks/NAME_STAGE.npz`. Raises UserError for an
    unknown attack, or one that does not fit, before anything is written.
    """
    drawn = tuple(name for name in options.attacks if name in DRAWN)
    if unknown := [name for name in options.attacks if name not in ATTACKS]:
        raise UserError(f"attack {unknown[0]!r}: there are {', '.join(ATTACKS)}")
    run, evaluator = opened.run, opened.evaluator(stage)
    of_evaluations = {*STANDARD, *evaluator.suite.attacks}
    evaluator = evaluator.with_suite(**_suite_changes(evaluator.suite, drawn, options))
    try:
        attempts = build_attempts(run.world, run.tokenizer, evaluator.suite) if drawn else []
    except ValueError as error:
        raise UserError(f"{error} (--max_tokens)") from error
    _ = evaluator.policy
    results = run.folder / "results.json"
    read_results(results)  # a damaged file is named before the work, not after it
    new: list[Record] = []
    for name in (*drawn, *(name for name in options.attacks if name in SEARCHED)):
        if name in SEARCHED:
            n = 8 if options.n_prompts is None else options.n_prompts
            measured = searched(evaluator, name, n, options.optimized)
        else:
            chosen = [a for a in attempts if a.attack == name]
            measured = _drawn(evaluator, name, chosen, opened.training_critic)
        records, rows, remark = measured
        if name in of_evaluations:
            records = [dataclasses.replace(r, knobs={**r.knobs, **ASKED}) for r in records]
        run.write_lines(f"evaluation/attacks/{name}_{stage}.jsonl", rows)
        write_results(results, records, functools.partial(_asked_before, records[0]))
        # Rows and records hold what the search came to.
        search_file(run.folder, stage, name).unlink(missing_ok=True)
        new += records
        say(f"{stage}: {name}{remark}")
    return new


def _asked_before(new: Record, old: Record) -> bool:
    """Whether an old record is of an attack that is asked of its stage again,
    and none of the stage's evaluation."""
    by_command = (record.knobs.get(key) for record in (new, old) for key in ASKED)
    return len({*by_command}) == 1 and all(
        getattr(old, name) == getattr(new, name)
        for name in ("method", "stage", "benchmark", "attack")
    )


def _suite_changes(
    suite: SuiteConfig, drawn: tuple[str, ...], options: AttackOptions
) -> dict[str, Any]:
    """What the options change of the run's suite."""
    n = options.n_prompts
    room = suite.knobs.max_tokens if options.max_tokens is None else options.max_tokens
    return {
        "attacks": drawn or suite.attacks,
        "pool": options.data or suite.pool,
        "n": suite.n if n is None else n,
        "n_decoding": suite.n_decoding if n is None else n,
        "knobs": dataclasses.replace(suite.knobs, max_tokens=room),
        "decoding": DecodingGrid.paper() if options.grid == "paper" else suite.decoding,
        "geometry": GeometryGrid.wide() if options.geometry == "wide" else suite.geometry,
    }


def _drawn(
    evaluator: Evaluator, name: str, attempts: Sequence[Attempt], scorer: Critic
) -> Measured:
    """An attack that searches nothing."""
    sample = evaluator.sampling(name)
    context, tokenizer = evaluator.context(), evaluator.run.tokenizer
    records, rows = evaluate(sample, attempts, evaluator.judge, tokenizer, context, evaluator.seams)
    if name in WORST_OF_N:
        records += scored_records(scorer, rows, attempts, records[0])
    return records, rows, f", {len(rows)} responses"


def scored_records(
    scorer: Critic, rows: Sequence[dict[str, Any]], attempts: Sequence[Attempt], template: Record
) -> list[Record]:
    """`asr_scored`, `leak_scored`: any of the settings' picks,
    picked by the scorer and rated by the judge."""
    exchanges = [
        exchange_of(attempt, row["visible"]) for row, attempt in zip(rows, attempts, strict=True)
    ]
    judged = judge_distinct(scorer, exchanges)
    chosen = picks(rows, [judged[exchange] for exchange in exchanges])
    knobs = {"settings": len({str(row["knobs"]) for row in rows}), "scorer": scorer.name}
    records = []
    for metric in ("asr", "leak"):
        worst = any_pick(rows, chosen, metric)
        if worst:
            records.append(
                template.measured(
                    f"{metric}_scored", interval(list(worst.values()), list(worst)), knobs
                )
            )
    return records
