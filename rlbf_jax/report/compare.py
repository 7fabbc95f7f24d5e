"""Runs side by side: `comparison.html`, `comparison.md` and `plots/`, a column a run and stage."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.columns import of_group
from rlbf_jax.report import curves, figures, tables
from rlbf_jax.report.document import Tile, headline_tiles, one_data, relabelled, render
from rlbf_jax.report.figures import Figure
from rlbf_jax.report.files import MACHINERY, RunFiles, check_is_run, read_run
from rlbf_jax.report.paired import Group, grouped, paired_tables, seed_means
from rlbf_jax.report.stages import in_order, merged
from rlbf_jax.report.tables import Cell, Table
from rlbf_jax.report.unjudged import Unjudged, unjudged_answers
from rlbf_jax.report.values import (
    BESIDE,
    HARMLESS,
    Key,
    Value,
    by_construction,
    columns_of,
    index,
    kind_of,
)
from rlbf_jax.report.words import definitions
from rlbf_jax.storage import write_whole

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#a6761d")
"""Of the runs, in their order; most of them Okabe and Ito's."""
MOST_COLUMNS = 6
"""Tables with more columns than a page is wide show the last stages first, and all of them folded.
"""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything that both renderings show, in order."""

    names: Sequence[str]
    links: Mapping[str, str]
    """A run's report as seen from the comparison's folder, where it has one."""
    data: str
    tiles: Sequence[Tile]
    tables: Sequence[Table]
    figures: Sequence[Figure]
    unjudged: Sequence[Unjudged]
    notes: Sequence[str]


def write_comparison(
    folders: Sequence[pathlib.Path], out: pathlib.Path | None = None
) -> pathlib.Path:
    """Compares at least two runs; returns the folder of `comparison.html`.

    `out`: None takes `comparison` beside the first run, or the next free `comparison_2`, ...; where
    one of these compares the same runs, it is written anew. Raises UserError for a folder that is
    no run, a run named twice, or an `out` that is a run.
    """
    paths = [pathlib.Path(folder) for folder in folders]
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; expected the --workdir of a run")
        check_is_run(path)
    resolved = [path.resolve() for path in paths]
    if twice := [path for path in resolved if resolved.count(path) > 1]:
        raise UserError(f"{twice[0]} is named twice; a run is compared with other runs")
    target = out or _free_place(resolved)
    if (target / "manifest.json").exists() or target.resolve() in resolved:
        raise UserError(f"--out {target} is a run; expected another folder, or none")
    named = dict(zip(names_of(resolved), resolved, strict=True))
    comparison = build_comparison(
        [dataclasses.replace(read_run(path), name=name) for name, path in named.items()],
        {
            name: _link(path, target)
            for name, path in named.items()
            if (path / "report.html").exists()
        },
    )
    for figure in comparison.figures:
        write_whole(target / "plots" / f"{figure.name}.png", figure.png)
    for name in ("comparison.md", "comparison.html"):
        write_whole(target / name, render(f"{name}.j2", comparison=comparison))
    write_whole(target / "runs.json", json.dumps([str(path) for path in resolved], indent=1) + "\n")
    return target


def _free_place(runs: Sequence[pathlib.Path]) -> pathlib.Path:
    number = 1
    while True:
        place = runs[0].parent / ("comparison" if number == 1 else f"comparison_{number}")
        if not place.exists() or _compares(place) == [str(run) for run in runs]:
            return place
        number += 1


def _compares(folder: pathlib.Path) -> list[str] | None:
    try:
        return json.loads((folder / "runs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _link(run: pathlib.Path, target: pathlib.Path) -> str:
    return quote(os.path.relpath(run / "report.html", target.resolve()))


def names_of(paths: Sequence[pathlib.Path]) -> list[str]:
    """The shortest ends of the paths, all of one length, that tell them apart."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


# Building ---------------------------------------------------------------------------------------


def build_comparison(runs: Sequence[RunFiles], links: Mapping[str, str]) -> Comparison:
    """Tables, figures and notes of runs with names of their own."""
    named = [{**record, "run": run.name} for run in runs for record in run.records]
    pools = {run.pool for run in runs}
    records, data, note = one_data(named, pools.pop() if len(pools) == 1 else "")
    # Runs of two worlds stand apart: what all but the first asked bears its name.
    own = next((run.benchmark for run in runs if run.benchmark), "")
    order = merged(run.stages.order for run in runs)
    values = index(records, lambda r: f"{r.get('stage')}{BESIDE}{r['run']}", data, own, order)
    every = (
        {"benchmark": run.benchmark or own, **row}
        for run in runs
        for rows in run.every_row.values()
        for row in rows
    )
    whole = by_construction(records, every, data, own)
    columns = columns_of(values)
    main = [column for run in runs for column in _last_column(run, columns)]
    colors = {column: color_of(runs, column.partition(BESIDE)[2]) for column in columns}
    label = functools.partial(label_of, runs)
    groups = grouped(runs)
    paired, unpaired = paired_tables(groups)
    first, folded = _value_tables(values, main, columns, whole)
    shown = [settings_table(runs), *first, *_seed_tables(groups, whole), *paired, *folded]
    notes = (
        [f"{run.name}: {sentence}" for run in runs for sentence in run.missing]
        + [note] * bool(note)
        + unpaired
    )
    return Comparison(
        names=[run.name for run in runs],
        links=links,
        data=data,
        tiles=[relabelled(tile, label) for tile in headline_tiles(values, main, colors)],
        tables=[tables.relabelled(table, label) for table in shown if table is not None],
        figures=draw(runs, values, main, colors),
        unjudged=[
            dataclasses.replace(count, stage=f"{count.stage}{BESIDE}{run.name}")
            for run in runs
            for count in [*unjudged_answers(run.every_row), *run.unjudged_rollouts]
            if count.bad
        ],
        notes=notes,
    )


def _last_column(run: RunFiles, columns: Sequence[str]) -> list[str]:
    """The column of a run's last stage that has one: the model that it made."""
    own = [f"{stage}{BESIDE}{run.name}" for stage in run.stages.order]
    return [column for column in own if column in columns][-1:]


def label_of(runs: Sequence[RunFiles], column: str) -> str:
    """A column's name with the label that its run gives the stage."""
    names = {run.name: run.stages.label for run in runs}
    label = names.get(column.partition(BESIDE)[2])
    return label(column) if label else column


def color_of(runs: Sequence[RunFiles], name: str) -> str:
    """A run's color."""
    return COLORS[[run.name for run in runs].index(name) % len(COLORS)]


def _value_tables(
    values: Mapping[Key, Value], main: Sequence[str], columns: Sequence[str], whole: frozenset[str]
) -> tuple[list[Table | None], list[Table | None]]:
    """(open, folded) tables; where all stages are too many columns for a page,
    the last ones open and all folded."""
    narrow = len(columns) <= MOST_COLUMNS
    ours = values if narrow else {key: value for key, value in values.items() if key[0] in main}
    hostile = {k: v for k, v in ours.items() if kind_of(k[1]) not in HARMLESS}
    folded = [tables.by_metric("How they backtrack", hostile, of_group("quality"), folded=True)]
    if not narrow:
        for table in (tables.attack_table(values, whole), tables.cost_table(values)):
            if table is not None:
                folded.append(
                    dataclasses.replace(table, title=f"{table.title}: every stage", folded=True)
                )
    return [tables.attack_table(ours, whole), tables.cost_table(ours, values)], [
        *folded,
        _others(values),
    ]


def _others(values: Mapping[Key, Value]) -> Table | None:
    shown = {*tables.UNDER_ATTACK, *of_group("quality"), *of_group("cost")}
    left = {k: v for k, v in values.items() if k[3] not in shown}
    order = in_order((k[3] for k in left), list(definitions()))
    return tables.by_metric("Other measurements", left, order, folded=True)


def _seed_tables(groups: Sequence[Group], whole: frozenset[str]) -> list[Table | None]:
    """Means over the seeds of each group that has several."""
    shown: list[Table | None] = []
    for group in groups:
        if len(group.runs) < 2:
            continue
        values = seed_means(group)
        note = (
            f"Means over the training seeds of {group.name}; 95 % by bootstrap over prompts, "
            "drawn once for all seeds, which answer the same ones (Wilson's where all rows are "
            "alike). "
        )
        for table in (tables.attack_table(values, whole), tables.cost_table(values)):
            if table is not None:
                title = f"{table.title}, mean over {len(group.runs)} seeds"
                shown.append(dataclasses.replace(table, title=title, note=note + table.note))
    return shown


def settings_table(runs: Sequence[RunFiles]) -> Table | None:
    """What differs between the manifests: configuration, commit, versions, data;
    None where nothing does."""
    flat = [_flat({k: v for k, v in r.manifest.items() if k not in MACHINERY}) for r in runs]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    rows = []
    for name in names:
        texts = [settings.get(name, "–") for settings in flat]
        if len(set(texts)) > 1:
            rows.append(
                (Cell(name.removeprefix("config.")), *(Cell(_short(text)) for text in texts))
            )
    if not rows:
        return None
    note = (
        "Every setting, version and data hash in which the manifests differ; all others are equal."
    )
    return Table("What differs", ("setting", *(run.name for run in runs)), tuple(rows), note)


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Dotted name -> value as text."""
    if isinstance(value, Mapping) and value:
        return {
            k: v
            for key, inner in value.items()
            for k, v in _flat(inner, f"{name}.{key}" if name else key).items()
        }
    return {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def _short(text: str) -> str:
    return text if len(text) <= 32 else f"{text[:14]}…{text[-6:]}"


# Figures ----------------------------------------------------------------------------------------


def draw(
    runs: Sequence[RunFiles],
    values: Mapping[Key, Value],
    main: Sequence[str],
    colors: Mapping[str, str],
) -> list[Figure]:
    """Bars of the last stages; trade-off, X errors and times of the last stage that has them;
    training overlaid."""
    of_run = {
        f"{stage}{BESIDE}{run.name}": color_of(runs, run.name)
        for run in runs
        for stage in _stages(run)
    }
    colors = {**of_run, **colors}
    rows = {
        f"{stage}{BESIDE}{run.name}": run.rows[stage]
        for run in runs
        for stage in list(run.rows)[-1:]
    }
    tradeoffs = {
        f"{stage}{BESIDE}{run.name}": run.tradeoffs[stage]
        for run in runs
        for stage in list(run.tradeoffs)[-1:]
    }
    drawn = [figures.overview(values, main, colors), figures.tradeoff(tradeoffs, colors)]
    drawn += [
        figures.x_error(rows, colors),
        figures.correction_time(rows, colors),
        *_training(runs),
    ]
    return [figure for figure in drawn if figure is not None]


def _stages(run: RunFiles) -> list[str]:
    return list(dict.fromkeys([*run.rows, *run.tradeoffs, *run.metrics]))


def _training(runs: Sequence[RunFiles]) -> list[Figure]:
    """One figure a stage of reinforcement, a line a run."""
    drawn: list[Figure] = []
    order = merged(run.stages.order for run in runs)
    stages = in_order((stage for run in runs for stage in run.metrics), order)
    for stage in reversed(stages):
        logs = {run.name: run.metrics.get(stage, ()) for run in runs}
        series = {name: rows for name, rows in logs.items() if curves.reinforcement_names(rows)}
        logged = [curves.reinforcement_names(rows) for rows in series.values()]
        names = in_order(
            (n for logged_names in logged for n in logged_names), curves.REINFORCEMENT
        )[:12]
        if not names:
            continue
        colors = {name: color_of(runs, name) for name in series}
        png = curves.overlay_plot(series, names, colors)
        alt = (
            f"Training curves of {stage}, a line for each of {', '.join(series)}: "
            f"{', '.join(names)}."
        )
        title = f"Training: {stage}"
        drawn.append(
            Figure(
                f"training_{stage}",
                title,
                alt,
                png,
                figures.REINFORCEMENT_CAPTION,
                folded=bool(drawn),
            )
        )
    return drawn
