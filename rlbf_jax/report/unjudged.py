"""How many texts could not be judged, and why: in evaluations by the judge,
in rollouts by the critic of training."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Unjudged:
    """A count over the answers of one stage."""

    stage: str
    what: str
    """`answers` of an evaluation, or `rollouts` of training."""
    bad: int
    """Answers with a text that could not be judged."""
    total: int
    reasons: tuple[tuple[str, int], ...] = ()

    @property
    def why(self) -> str:
        """As "endpoint: timeout 3, not whole JSON 1"."""
        return ", ".join(f"{reason} {n}" for reason, n in self.reasons)


def unjudged_answers(rows: Mapping[str, Sequence[Row]]) -> list[Unjudged]:
    """One count a stage, from the rows of `evaluation/<stage>.jsonl`."""
    return [
        _count(
            stage,
            "answers",
            [reason for row in own if (reason := _reason(row)) is not None],
            len(own),
        )
        for stage, own in rows.items()
    ]


def unjudged_rollouts(stages: Path) -> list[Unjudged]:
    """One count a stage that has `rollouts.jsonl` with a rollout that could not be judged.

    Only such lines are taken apart: a long run has very many rollouts.
    """
    counts = []
    for path in sorted(stages.glob("*/rollouts.jsonl")):
        reasons, total = [], 0
        with path.open("rb") as file:
            for line in file:
                total += 1
                if b'"judged": false' in line:
                    reasons.append(_rollout_reason(line))
        if reasons:
            counts.append(_count(path.parent.name, "rollouts", reasons, total))
    return counts


def _count(stage: str, what: str, reasons: Sequence[str], total: int) -> Unjudged:
    named = collections.Counter(reason or "no reason given" for reason in reasons)
    return Unjudged(stage, what, len(reasons), total, tuple(named.most_common()))


def _reason(row: Row) -> str | None:
    """Why a row was not judged; None: it was."""
    for verdict in _verdicts(row):
        if verdict.get("judged") is not True:
            return str(verdict.get("reason") or "")
    return "" if (row.get("metrics") or {}).get("unjudged") else None


def _verdicts(row: Row) -> Iterator[Row]:
    yield row.get("verdict") or {}
    if "verdict_raw" in row:
        yield row["verdict_raw"] or {}
    for edit in row.get("edits") or ():
        if "verdict_before" in edit:
            yield edit["verdict_before"] or {}


def _rollout_reason(line: bytes) -> str:
    try:
        return str(json.loads(line).get("reason") or "")
    except (ValueError, AttributeError):
        return "unreadable line"
