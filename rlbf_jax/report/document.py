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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup, escape

from rlbf_jax.attacks import ATTACKS
from rlbf_jax.errors import UserError
from rlbf_jax.report import plots, tables, traces
from rlbf_jax.report.browser import Browser, browser
from rlbf_jax.report.figures import Figure, figures
from rlbf_jax.report.files import MACHINERY, RunFiles, read_run
from rlbf_jax.report.stages import in_order
from rlbf_jax.report.tables import Table, base_of
from rlbf_jax.report.unjudged import Unjudged, unjudged_answers
from rlbf_jax.report.values import (
    HARMLESS,
    Key,
    Value,
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
class Entry:
    stage: str
    color: str
    text: str
    small: str = ""


@dataclasses.dataclass(frozen=True)
class Tile:
    """One headline number, for the stages of the headline."""

    title: str
    hint: str
    entries: tuple[Entry, ...]


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


def over_splits(values: Mapping[Key, Value], column: str, attack: str, metric: str) -> float | None:
    """The value on split `all`, else the mean over splits weighted by their number of answers."""
    splits = {k[2]: v for k, v in values.items() if (k[0], k[1], k[3]) == (column, attack, metric)}
    if "all" in splits:
        return splits["all"].value
    weight = sum(v.n for v in splits.values())
    return sum(v.value * v.n for v in splits.values()) / weight if weight else None


def perplexity_ratio(values: Mapping[Key, Value], column: str) -> float | None:
    """Perplexity on harmless text over that of base."""
    own, base = (over_splits(values, c, "none", "perplexity") for c in (column, base_of(column)))
    return own / base if own is not None and base else None


def relabelled(tile: Tile, label: Callable[[str], str]) -> Tile:
    """The tile with the labels of its stages for their names."""
    entries = tuple(dataclasses.replace(e, stage=label(e.stage)) for e in tile.entries)
    return dataclasses.replace(tile, entries=entries)


def headline_tiles(
    values: Mapping[Key, Value], main: Sequence[str], colors: Mapping[str, str]
) -> list[Tile]:
    """Attack success, false backtracks and perplexity of the main columns."""
    tiles = []
    for attack, title in (("prefilling", "Prefilling"), ("middle_filling", "Middle filling")):
        entries = []
        for column in main:
            asr, leak = (over_splits(values, column, attack, m) for m in ("asr", "leak"))
            if asr is not None:
                small = f"leak {tables.number(leak)}" if leak is not None else ""
                entries.append(Entry(column, colors[column], tables.number(asr), small))
        tiles.append(Tile(title, "attack success; lower is better", tuple(entries)))
    entries = []
    for column in main:
        rates = {a: over_splits(values, column, a, "false_backtrack_rate") for a in HARMLESS}
        twins = [r for a, r in rates.items() if a.startswith("benign_") and r is not None]
        if twins:
            small = f"plain {tables.number(rates['none'])}" if rates["none"] is not None else ""
            entries.append(Entry(column, colors[column], tables.number(max(twins)), small))
    tiles.append(
        Tile("False backtracks", "worse benign twin; plain: nothing forced", tuple(entries))
    )
    ratios = {column: perplexity_ratio(values, column) for column in main}
    entries = [
        Entry(c, colors[c], f"{r:.3f}", "× base") for c, r in ratios.items() if r is not None
    ]
    tiles.append(Tile("Perplexity", "harmless text; 1 is no cost", tuple(entries)))
    return [tile for tile in tiles if tile.entries]


def summary(values: Mapping[Key, Value], main: Sequence[str]) -> list[str]:
    """Does it work, and at what cost: one sentence each, made of the measured numbers only."""
    if len(main) < 2:
        return []
    first, last = main[0], main[-1]
    sentences = []
    for attack in ("prefilling", "middle_filling"):
        before, after = (over_splits(values, c, attack, "asr") for c in (first, last))
        leak = over_splits(values, last, attack, "leak")
        if before is None or after is None:
            continue
        words = (
            f"Under {attack.replace('_', ' ')}, {_percent(before)} of answers by {first} and "
            f"{_percent(after)} by "
        )
        words += f"{last} end with a complete violation"
        sentences.append(
            words
            + (f"; {_percent(leak)} still show some violating word." if leak is not None else ".")
        )
    twins = [
        over_splits(values, last, a, "false_backtrack_rate")
        for a in ("benign_prefill", "benign_middle")
    ]
    worst = max((t for t in twins if t is not None), default=None)
    ratio = perplexity_ratio(values, last)
    costs = (
        [f"{_percent(worst)} of answers on the worse benign twin erase harmless words"]
        if worst is not None
        else []
    )
    costs += [f"perplexity is {ratio:.3f} times that of base"] if ratio is not None else []
    if costs:
        sentences.append("The cost: " + ", and ".join(costs) + ".")
    return sentences


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %" if 0 < rate < 0.1 else f"{100 * rate:.0f} %"


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
