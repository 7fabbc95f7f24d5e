"""From records to the report's tables.

A `Table` is plain cells, so that the Markdown and the HTML report show the same numbers. `index`
turns the records of `results.json` into one `Value` a (column, attack, split, metric); a column is
a stage.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from rlbf_jax.attacks import ATTACKS
from rlbf_jax.attacks import BENIGN as HARMLESS
from rlbf_jax.attacks import WHOLE as BY_CONSTRUCTION
from rlbf_jax.evaluation.columns import find, of_group
from rlbf_jax.report.words import definitions

STAGES = ("base", "refusal_sft", "sft", "sft_control", "rlbf")
SPLITS = ("sft", "rl", "unseen", "all")
ASKED = {"asked": "rlbf attack"}
"""The knob that tells an attack command's records from those of the stage's own evaluation."""
BESIDE = " · "
"""Between stage and run in the name of a column, where runs stand side by side."""
Record = Mapping[str, Any]
Key = tuple[str, str, str, str]
"""(column, attack, split, metric)."""


@dataclasses.dataclass(frozen=True)
class Value:
    """A measured number with its interval; the mean over seeds where there are several."""

    value: float
    low: float | None
    high: float | None
    n: int
    num_prompts: int
    seeds: int = 1


@dataclasses.dataclass(frozen=True)
class Cell:
    """`text` large, `beside` it smaller, `small` lines below; `heat` in 0..1 colors the cell (0
    good, 1 bad)."""

    text: str
    small: tuple[str, ...] = ()
    heat: float | None = None
    beside: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    labels: int = 1
    """How many columns at the left are row labels."""
    folded: bool = False
    """Shown closed in HTML."""


def in_order(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Unique names: those of `order` first, then others as they come."""
    found = list(dict.fromkeys(names))
    return [n for n in order if n in found] + [n for n in found if n not in order]


def index(
    records: Sequence[Record],
    column_of: Callable[[Record], str] | None = None,
    data: str = "",
    main: str = "",
) -> dict[Key, Value]:
    """One value for every (column, attack, split, metric). Records of several seeds are averaged.

    A stage with several methods becomes several columns, unless `column_of` names each record's
    column; an attack measured under several knobs, in another benchmark than `main`, or on other
    data than `data` (where that is given), becomes several attacks, "attack, what differs". The
    interval of an average spans those of its seeds. An empty `main` is the benchmark of most
    records.
    """
    main = main or _main_benchmark(records)
    methods: dict[str, set[str]] = {}
    for r in records:
        methods.setdefault(str(r.get("stage")), set()).add(str(r.get("method")))
    labels = knob_labels(records, main)
    groups: dict[Key, list[Record]] = {}
    for r in records:
        if not isinstance(r.get("value"), int | float) or not math.isfinite(r["value"]):
            continue
        stage, metric = str(r.get("stage")), str(r.get("metric"))
        column = f"{stage} ({r.get('method')})" if len(methods[stage]) > 1 else stage
        name = _attack_name(r, main, data, labels[*_asked(r, main), _knobs_key(r)])
        where = column_of(r) if column_of else column
        groups.setdefault((where, name, str(r.get("split", "all")), metric), []).append(r)
    return {key: _mean(group) for key, group in groups.items()}


def _main_benchmark(records: Sequence[Record]) -> str:
    counted = collections.Counter(str(r.get("benchmark")) for r in records)
    return next((name for name, _ in counted.most_common(1)), "")


def _attack_name(r: Record, main: str, data: str, label: str) -> str:
    """A record's or row's attack and what differs: benchmark, data, knobs."""
    benchmark, measured_on = str(r.get("benchmark", main)), str(r.get("data", data))
    differs = [benchmark.removeprefix(f"{main}_")] if benchmark != main else []
    differs += [measured_on] if data and measured_on != data else []
    return ", ".join([str(r.get("attack")), *differs, *filter(None, [label])])


def knob_labels(records: Sequence[Record], main: str = "") -> dict[tuple[str, str, str], str]:
    """(attack, benchmark, knobs as JSON) -> what tells them from other knobs of both, as "p 16 v 4
    b 0", or nothing.

    A knob is named where its values differ within the attack and benchmark. Where that leaves two
    records of one number alike (a knob that only one of them has), every knob that not all have
    alike is named.
    """
    knobs: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    rivals: dict[tuple, set[str]] = {}
    for r in records:
        asked, key = _asked(r, main), _knobs_key(r)
        knobs.setdefault(asked, {})[key] = _knobs_of(r)
        rivals.setdefault((asked, _cell_of(r)), set()).add(key)
    labels: dict[tuple[str, str, str], str] = {}
    for asked, found in knobs.items():
        names = dict.fromkeys(name for told in found.values() for name in told)
        seen = {
            name: {json.dumps(told[name]) for told in found.values() if name in told}
            for name in names
        }
        differing = [name for name in names if len(seen[name]) > 1]
        named = {key: _knob_label(told, differing) for key, told in found.items()}
        if any(
            len({named[k] for k in keys}) < len(keys)
            for (a, _), keys in rivals.items()
            if a == asked
        ):
            differing = [
                n
                for n in names
                if len(seen[n]) > 1 or any(n not in told for told in found.values())
            ]
            named = {key: _knob_label(told, differing) for key, told in found.items()}
        labels |= {(*asked, key): label for key, label in named.items()}
    return labels


def _asked(r: Record, main: str) -> tuple[str, str]:
    """A record's or row's attack and benchmark, which rows with a long prefix share with the
    others."""
    return str(r.get("attack")), str(r.get("benchmark", main)).removesuffix("_long_prefix")


def _cell_of(r: Record) -> tuple:
    return tuple(
        str(r.get(k)) for k in ("stage", "split", "metric", "method", "benchmark", "seed", "data")
    )


def _knobs_of(r: Record) -> Mapping[str, Any]:
    knobs = r.get("knobs") or {}
    return knobs if isinstance(knobs, Mapping) else {"knobs": knobs}


def _knobs_key(r: Record) -> str:
    return json.dumps(_knobs_of(r), sort_keys=True)


def by_construction(
    records: Sequence[Record], rows: Iterable[Record], data: str = "", main: str = ""
) -> frozenset[str]:
    """Names of attacks, as `index` tells them apart, that force a whole violation in every one of
    some rows."""
    main = main or _main_benchmark(records)
    labels = knob_labels(records, main)
    whole: dict[str, bool] = dict.fromkeys(BY_CONSTRUCTION, True)
    for row in rows:
        asked = _asked(row, main)
        knobs = {**_knobs_of(row), **(row.get("cell") or {})}
        tried = [{**knobs, **ASKED}, knobs] if "asked" in row else [knobs]
        keys = [key for told in tried if (*asked, key := _knobs_key({"knobs": told})) in labels]
        if asked[0] not in BY_CONSTRUCTION and keys:
            name = _attack_name(row, main, data, labels[*asked, keys[0]])
            whole[name] = whole.get(name, True) and bool(row.get("by_construction"))
    return frozenset(name for name, forced in whole.items() if forced)


def _knob_label(knobs: Mapping[str, Any], names: Sequence[str]) -> str:
    return " ".join(
        f"{name} {v if isinstance(v := knobs[name], str | int | float) else json.dumps(v)}"
        for name in names
        if name in knobs
    )


def _mean(group: Sequence[Record]) -> Value:
    lows = [r["ci_low"] for r in group if isinstance(r.get("ci_low"), int | float)]
    highs = [r["ci_high"] for r in group if isinstance(r.get("ci_high"), int | float)]
    return Value(
        value=sum(float(r["value"]) for r in group) / len(group),
        low=min(lows) if lows else None,
        high=max(highs) if highs else None,
        n=sum(int(r.get("n") or 0) for r in group),
        num_prompts=max(int(r.get("n_prompts") or 0) for r in group),
        seeds=len({str(r.get("seed")) for r in group}),
    )


def columns_of(values: Mapping[Key, Value]) -> list[str]:
    """Stages in their order; `rlbf (rlbf_ppo)` stands where `rlbf` does."""
    columns = list(dict.fromkeys(key[0] for key in values))
    return sorted(
        columns,
        key=lambda c: STAGES.index(c.split(" ")[0]) if c.split(" ")[0] in STAGES else len(STAGES),
    )


def kind_of(attack: str) -> str:
    """The attack without what differs: `middle_filling` of `middle_filling, long_prefix`."""
    return attack.split(",")[0]


def attack_rows(values: Mapping[Key, Value], metrics: Sequence[str]) -> list[tuple[str, str]]:
    """(attack, split) pairs that have any of the metrics, in their order."""
    pairs, order = {(a, s) for _, a, s, m in values if m in metrics}, list(ATTACKS)

    def rank(pair: tuple[str, str]) -> tuple:
        attack, split = pair
        kind = kind_of(attack)
        place = order.index(kind) if kind in order else len(order)
        # "k 5" stands before "k 40": numbers in a name count as numbers.
        parts = [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", attack)]
        return (place, parts, SPLITS.index(split) if split in SPLITS else len(SPLITS), split)

    return sorted(pairs, key=rank)


def number(value: float | None, metric: str = "asr") -> str:
    """As the metric's column has it; a rate, and what has no column, with three digits below 0.1."""
    if value is None:
        return "–"
    column = find(metric)
    if column is not None and not column.decimals:
        return f"{value:,.0f}"
    if column is not None and column.kind != "rate":
        return f"{value:.{column.decimals}f}"
    return f"{value:.3f}" if 0 < value < 0.1 else f"{value:.2f}"


def interval(value: Value, metric: str = "asr") -> str:
    """Both limits; nothing where there are none, or the metric is shown without decimals."""
    column = find(metric)
    if value.low is None or value.high is None or (column is not None and not column.decimals):
        return ""
    return f"{value.low:.2f} to {value.high:.2f}"


def heated(metric: str) -> bool:
    """Whether a cell of costs is colored: rates of mistakes."""
    column = find(metric)
    return column is not None and (column.kind, column.better) == ("rate", "low")


def value_cell(value: Value | None, metric: str, heat: bool = False) -> Cell:
    if value is None:
        return Cell("–")
    small = tuple(filter(None, [interval(value, metric)]))
    return Cell(number(value.value, metric), small, value.value if heat else None)


def attack_table(
    values: Mapping[Key, Value], whole: Collection[str] = BY_CONSTRUCTION
) -> Table | None:
    """asr with interval and, always beside it, leak: one row an attack and split, one column a
    stage.

    `whole`: attacks that force a whole violation, see `by_construction`.
    """
    pairs = [p for p in attack_rows(values, ("asr", "leak")) if kind_of(p[0]) not in HARMLESS]
    columns = columns_of(
        {
            k: v
            for k, v in values.items()
            if k[3] in ("asr", "leak") and kind_of(k[1]) not in HARMLESS
        }
    )
    if not pairs:
        return None
    rows = []
    for attack, split in pairs:
        # Rows do not say that they have a long prefix by another benchmark's name, as records do.
        forced = kind_of(attack) in BY_CONSTRUCTION or attack.replace(", long_prefix", "") in whole
        cells = [Cell(attack + " †" * forced), Cell(split)]
        found = [
            v for c in columns for m in ("asr", "leak") if (v := values.get((c, attack, split, m)))
        ]
        cells.append(Cell(counts([v.n for v in found])))
        for column in columns:
            asr, leak = (
                values.get((column, attack, split, "asr")),
                values.get((column, attack, split, "leak")),
            )
            cell = value_cell(asr, "asr", heat=True)
            leak_text = f"leak {number(leak.value) if leak else 'not measured'}"
            cells.append(dataclasses.replace(cell, beside=leak_text) if asr or leak else cell)
        rows.append(tuple(cells))
    note = (
        "Large: asr, a complete violation left in the final text, and below it the 95 % interval. "
        "Beside it leak, any "
        "violating word left. † By construction: a whole violation is forced into the answer, so "
        "any model that cannot "
        "erase scores 1 here whatever else it does. Compare such models on prefilling, which "
        "forces less."
    )
    return Table("Under attack", ("attack", "split", "n", *columns), tuple(rows), note, labels=2)


def counts(found: Sequence[int]) -> str:
    """As "64", or "60 to 64"."""
    low, high = min(found, default=0), max(found, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def cost_table(
    values: Mapping[Key, Value], bases: Mapping[Key, Value] | None = None
) -> Table | None:
    """What the ability costs where nothing is wrong; perplexity also as a ratio to base.

    `bases`: values among which the base columns are, if not among these.
    """
    note = (
        "On none: a harmless prompt, nothing forced. The benign twins, benign_prefill and "
        "benign_middle, force "
        "harmless words with the geometry of the attacks, so a model that erases whenever words "
        "were forced shows. "
        "trigger: a harmless prompt with words that a search found to provoke a directive."
    )
    costs = of_group("cost")
    chosen = {k: v for k, v in values.items() if kind_of(k[1]) in HARMLESS and k[3] in costs}
    return by_metric("What it costs", chosen, costs, note, bases=bases)


def by_metric(
    title: str,
    values: Mapping[Key, Value],
    metrics: Sequence[str],
    note: str = "",
    folded: bool = False,
    bases: Mapping[Key, Value] | None = None,
) -> Table | None:
    """One row a metric, attack and split, one column a stage; None where nothing was measured."""
    columns = columns_of({key: v for key, v in values.items() if key[3] in metrics})
    rows = []
    for metric in metrics:
        described = find(metric)
        groups = described.groups if described else ()
        for attack, split in attack_rows(values, (metric,)):
            cells = []
            for column in columns:
                value = values.get((column, attack, split, metric))
                cell = value_cell(value, metric, heat="cost" in groups and heated(metric))
                base = (bases or values).get((base_of(column), attack, split, metric))
                cells.append(_with_ratio(cell, value, base) if metric == "perplexity" else cell)
            rows.append((Cell(metric), Cell(attack), Cell(split), *cells))
    if not rows:
        return None
    return Table(
        title, ("metric", "on", "split", *columns), tuple(rows), note, labels=3, folded=folded
    )


def base_of(column: str) -> str:
    """The column of the base model that a column's perplexity is divided by: that of its run."""
    run = column.partition(BESIDE)[2]
    return f"base{BESIDE}{run}" if run else "base"


def _with_ratio(cell: Cell, value: Value | None, base: Value | None) -> Cell:
    if value is None or base is None or base.value <= 0:
        return cell
    return dataclasses.replace(cell, small=(*cell.small, f"{value.value / base.value:.3f} × base"))


def _erasing(values: Mapping[Key, Value]) -> list[str]:
    """Columns of models that backtrack at all."""
    return [
        c
        for c in columns_of(values)
        if any(k[0] == c and k[3] in ("x_exact", "x_coverage") for k in values)
    ]


def quality_tables(values: Mapping[Key, Value]) -> list[Table]:
    """How well each stage that backtracks does it; the last one open, the others folded."""
    erasing, quality = _erasing(values), of_group("quality")
    tables = []
    for column in erasing:
        mine = {
            k: v
            for k, v in values.items()
            if k[0] == column and kind_of(k[1]) not in HARMLESS and k[3] in quality
        }
        metrics = [m for m in quality if any(k[3] == m for k in mine)]
        rows = []
        for attack, split in attack_rows(mine, metrics):
            cells = [value_cell(mine.get((column, attack, split, m)), m) for m in metrics]
            rows.append((Cell(attack), Cell(split), *cells))
        title = f"How {column} backtracks"
        tables.append(
            Table(
                title,
                ("attack", "split", *metrics),
                tuple(rows),
                "",
                2,
                folded=column != erasing[-1],
            )
        )
    return tables[::-1]


def other_table(values: Mapping[Key, Value]) -> Table | None:
    """Every number that no other table shows."""
    erasing = _erasing(values)
    under_attack, quality, costs = map(of_group, ("attack", "quality", "cost"))

    def shown(key: Key) -> bool:
        column, attack, _, metric = key
        if kind_of(attack) in HARMLESS:
            return metric in costs
        return metric in under_attack or (metric in quality and column in erasing)

    left = {k: v for k, v in values.items() if not shown(k)}
    order = in_order((k[3] for k in left), list(definitions()))
    return by_metric("Other measurements", left, order, folded=True)
