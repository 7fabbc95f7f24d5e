"""The report: `report.md`, a self-contained `report.html` and `plots/*.png`,
from what a run has written so far.

Reads `manifest.json`, `results.json`, the rows below `evaluation/` and
`stages/<stage>/metrics.jsonl`; whatever is missing is named in the report instead of failing it.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup, escape

from rlbf_jax.attacks import ATTACKS
from rlbf_jax.errors import UserError
from rlbf_jax.report import plots, tables, traces
from rlbf_jax.report.browser import Browser, browser
from rlbf_jax.report.figures import Figure, figures
from rlbf_jax.report.files import MACHINERY, RunFiles, read_run
from rlbf_jax.report.headline import Tile, headline_tiles, relabelled, summary
from rlbf_jax.report.stages import in_order
from rlbf_jax.report.tables import Table
from rlbf_jax.report.unjudged import Unjudged, unjudged_answers
from rlbf_jax.report.values import (
    by_construction,
    columns_of,
    index,
)
from rlbf_jax.report.words import definitions, of_intervals
from rlbf_jax.storage import write_whole

TEMPLATES = pathlib.Path(__file__).parent / "templates"
TOY_NOTE = (
    "Small models, made-up violations, words from a closed world: this shows that the machinery "
    "works, and where it "
    "does not, at toy scale. It says nothing about how a large model behaves."
)
CHECKPOINT_NOTE = (
    "A published checkpoint, made-up violations of a few templates: this shows whether the model "
    "takes back what such "
    "templates say. It says nothing about harm of other kinds."
)


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that both renderings show, in order."""

    run: RunFiles
    data: str
    summary: Sequence[str]
    tiles: Sequence[Tile]
    tables: Sequence[Table]
    gallery: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
    gallery_stage: str
    browser: Browser | None
    unjudged: Sequence[Unjudged]
    figures: Sequence[Figure]
    facts: Sequence[tuple[str, str]]


def write_report(workdir: pathlib.Path) -> None:
    """Writes `report.md`, `report.html` and `plots/` into `workdir`.
    Raises UserError where there is no such folder."""
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder; expected the --workdir of a run")
    report = build_report(read_run(workdir))
    for figure in report.figures:
        write_whole(workdir / "plots" / f"{figure.name}.png", figure.png)
    config = report.run.manifest.get("config")
    shown = json.dumps(config, indent=2, ensure_ascii=False) if config else ""
    for name in ("report.md", "report.html"):
        write_whole(
            workdir / name,
            render(f"{name}.j2", report=report, config=shown, toy_note=note_of(config)),
        )


def note_of(config: Any) -> str:
    """What the figures of a run with this plain configuration can and cannot show."""
    return CHECKPOINT_NOTE if isinstance(config, Mapping) and config.get("start_from") else TOY_NOTE


# Building ---------------------------------------------------------------------------------------


def build_report(run: RunFiles) -> Report:
    records, data, note = one_data(run.records, run.pool)
    values = index(records, data=data, main=run.benchmark, stages=run.stages.order)
    columns, rows = columns_of(values), run.every_row
    whole = by_construction(
        records, (row for group in rows.values() for row in group), data, run.benchmark
    )
    shown = [
        tables.attack_table(values, whole),
        tables.cost_table(values),
        *tables.quality_tables(values),
        tables.other_table(values),
    ]
    gallery_stage = next((s for s in reversed(list(run.rows)) if run.rows[s]), "")
    if note:
        run = dataclasses.replace(run, missing=[*run.missing, note])
    main, label = run.stages.main(columns), run.stages.label
    colors = plots.palette([*run.drawn, *columns])
    return Report(
        run=run,
        data=data,
        summary=summary(values, main),
        tiles=[relabelled(tile, label) for tile in headline_tiles(values, main, colors)],
        tables=[tables.relabelled(table, label) for table in shown if table is not None],
        gallery=traces.gallery(run.rows.get(gallery_stage, ()), list(ATTACKS)),
        gallery_stage=gallery_stage,
        browser=browser(rows, files=run.row_files),
        unjudged=[*unjudged_answers(rows), *run.unjudged_rollouts],
        figures=figures(run, values, columns, colors),
        facts=facts(run),
    )


def one_data(
    records: Sequence[Mapping[str, Any]], pool: str = ""
) -> tuple[list[Mapping[str, Any]], str, str]:
    """(records to show, the headline's data, a remark on what is not shown).

    The headline's data are `pool`, or test where there are no such records, or whatever there is. A
    number measured on other data is shown only where the headline's data do not have it:
    development and test never share a row.
    """
    kinds = in_order((str(r.get("data", "")) for r in records), ("test", "development"))
    if not kinds:
        return [], "", ""
    headline = pool if pool in kinds else kinds[0]

    def number(r: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(r.get(name)) for name in ("benchmark", "attack", "split", "metric"))

    measured = {number(r) for r in records if str(r.get("data", "")) == headline}
    hidden = [r for r in records if str(r.get("data", "")) != headline and number(r) in measured]
    chosen = [r for r in records if str(r.get("data", "")) == headline or number(r) not in measured]
    others = ", ".join(dict.fromkeys(str(r.get("data", "")) for r in hidden))
    note = (
        f"{len(hidden)} records on {others} data are in results.json and not shown."
        if hidden
        else ""
    )
    return chosen, headline, note


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """Main entries of the manifest, then who judged."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping) and all(
            not isinstance(v, Mapping | list) for v in value.values()
        ):
            return ", ".join(f"{k} {v}" for k, v in value.items())
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    entries = [
        (k, text(v))
        for k, v in run.manifest.items()
        if k != "config" and k not in MACHINERY and len(text(v)) <= 600
    ]
    for name in ("judge", "critic", "semantics", "seed"):
        seen = dict.fromkeys(str(r[name]) for r in run.records if r.get(name) not in (None, ""))
        if seen:
            entries.append((f"{name} (of results)", ", ".join(seen)))
    return entries


# Rendering --------------------------------------------------------------------------------------


def render(template: str, **values: Any) -> str:
    """A template of `templates/` with these values. HTML templates escape every one;
    the page's policy lets a browser run `browser.js` and nothing else,
    whatever a text of a model should look like."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: bool(name) and ".html" in str(name),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["png_uri"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    env.filters["breakable"] = lambda name: Markup(escape(name).replace("_", Markup("_<wbr>")))
    env.filters["md"] = traces.markdown_escape
    env.filters["md_trace"] = traces.markdown_trace
    env.filters["verdict"] = traces.verdict_label
    style, script = (
        (TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "browser.js")
    )
    text = env.get_template(template).render(
        definitions=definitions(),
        intervals=of_intervals(),
        style=Markup(style),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **{"toy_note": TOY_NOTE, **values},
    )
    # Half of a surrogate pair, which JSON can hold and UTF-8 cannot.
    return text.encode("utf-8", "replace").decode()
