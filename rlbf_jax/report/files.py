"""What a run has written, read for its report; what is missing or damaged is named instead
of failing the report."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from rlbf_jax.errors import UserError
from rlbf_jax.report.stages import Stages, in_order, stages_of
from rlbf_jax.report.unjudged import Unjudged, unjudged_rollouts
from rlbf_jax.report.values import ASKED

T = TypeVar("T")

MACHINERY = ("stages", "shared", "format")
"""Parts of a manifest by which the program tells what may be reused; `config` says it to people."""


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """What a run has written."""

    name: str
    manifest: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    metrics: Mapping[str, Sequence[Mapping[str, Any]]]
    missing: Sequence[str]
    """Sentences about files that are missing or partly unreadable."""
    unjudged_rollouts: Sequence[Unjudged] = ()
    tradeoffs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Contents of `evaluation/tradeoff_<stage>.json`."""
    beside: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    """Rows beside the stages' own evaluations, by file: of attack commands, marked `asked`, and of
    benchmarks, with the `benchmark` that their file is named after."""

    stages: Stages = Stages()
    """Every stage that the manifest, the records, rows or curves name."""

    @property
    def every_row(self) -> dict[str, list[Mapping[str, Any]]]:
        """By stage: `rows`, then those of `beside`."""
        by_stage = {stage: list(rows) for stage, rows in self.rows.items()}
        for rows in self.beside.values():
            for row in rows:
                by_stage.setdefault(str(row["stage"]), []).append(row)
        return _staged(by_stage, self.stages)

    @property
    def drawn(self) -> list[str]:
        """Stages that a figure may show, in order."""
        return in_order([*self.rows, *self.metrics, *self.tradeoffs], self.stages.order)

    @property
    def row_files(self) -> tuple[str, ...]:
        """Where the rows of `every_row` are."""
        return (*(f"evaluation/{stage}.jsonl" for stage in self.rows), *self.beside)

    @property
    def pool(self) -> str:
        """What data the stages' own evaluations asked: as their rows agree,
        or as the manifest says; else empty."""
        pools = {str(row.get("data", "")) for rows in self.rows.values() for row in rows}
        if len(pools) == 1:
            return pools.pop()
        return self._configured("pool")

    @property
    def benchmark(self) -> str:
        """What the stages' own evaluations are called, as the manifest says;
        empty where it does not."""
        return self._configured("benchmark")

    def _configured(self, field: str) -> str:
        """A text of the manifest's `evaluation`, or nothing."""
        value: Any = self.manifest
        for name in ("config", "evaluation", field):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value if isinstance(value, str) else ""


def check_is_run(workdir: pathlib.Path) -> None:
    """Raises UserError for a folder that holds nothing of a run:
    an old report is worth more than an empty one."""
    if workdir.is_dir() and not any(
        (workdir / name).exists() for name in ("manifest.json", "results.json")
    ):
        raise UserError(
            f"{workdir}: no run here (no manifest.json, no results.json); make one with `rlbf run`"
        )


def read_run(workdir: pathlib.Path) -> RunFiles:
    """Everything that a report needs from a run's folder."""
    missing: list[str] = []
    manifest = _read_json(workdir / "manifest.json", dict, missing)
    records = [
        r for r in _read_json(workdir / "results.json", list, missing) if isinstance(r, dict)
    ]
    rows = {
        p.stem: _read_lines(p, missing) for p in sorted((workdir / "evaluation").glob("*.jsonl"))
    }
    metrics = {
        p.parent.name: _read_lines(p, missing)
        for p in sorted((workdir / "stages").glob("*/metrics.jsonl"))
    }
    if not rows:
        missing.append("evaluation/ has no <stage>.jsonl: no traces, no count of unjudged answers.")
    if not metrics:
        missing.append("stages/ has no <stage>/metrics.jsonl: no training curves.")
    rollouts = unjudged_rollouts(workdir / "stages")
    curves = {
        p.stem.removeprefix("tradeoff_"): p
        for p in sorted((workdir / "evaluation").glob("tradeoff_*.json"))
    }
    tradeoffs = {stage: _read_json(path, dict, missing) for stage, path in curves.items()}
    beside = _read_beside(workdir / "evaluation", missing)
    attacked = (row["stage"] for lines in beside.values() for row in lines)
    stages = stages_of(manifest, records, [*rows, *metrics, *tradeoffs, *attacked])
    return RunFiles(
        workdir.resolve().name,
        manifest,
        records,
        _staged(rows, stages),
        _staged(metrics, stages),
        missing,
        rollouts,
        _staged(tradeoffs, stages),
        beside,
        stages,
    )


def _read_beside(folder: pathlib.Path, missing: list[str]) -> dict[str, list[dict[str, Any]]]:
    beside = {}
    for kind in ("attacks", "benchmarks"):
        for path in sorted((folder / kind).glob("*.jsonl")):
            read = _read_lines(path, missing)
            rows = [row for row in read if isinstance(row.get("stage"), str)]
            if len(rows) < len(read):
                missing.append(
                    f"{kind}/{path.name}: {len(read) - len(rows)} rows without a stage left out."
                )
            for row in rows:
                name = path.stem.removesuffix(f"_{row['stage']}")
                row.update(ASKED if kind == "attacks" else {"benchmark": name})
            beside[f"evaluation/{kind}/{path.name}"] = rows
    return beside


def _staged(by_stage: Mapping[str, T], stages: Stages) -> dict[str, T]:
    return {stage: by_stage[stage] for stage in in_order(by_stage, stages.order)}


def _read_json(path: pathlib.Path, kind: type, missing: list[str]) -> Any:
    if not path.is_file():
        missing.append(f"{path.name} is missing: the run has not come so far.")
        return kind()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        missing.append(f"{path.name} is not JSON ({error}).")
        return kind()
    if not isinstance(content, kind):
        missing.append(f"{path.name} holds a {type(content).__name__}, expected a {kind.__name__}.")
        return kind()
    return content


def _read_lines(path: pathlib.Path, missing: list[str]) -> list[dict[str, Any]]:
    rows, bad = [], []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                bad.append(number)
    if bad:
        missing.append(
            f"{path.parent.name}/{path.name}: {len(bad)} unreadable lines left out, first line "
            f"{bad[0]}."
        )
    return rows
