"""The report's tables.

A `Table` is plain cells, so that the Markdown and the HTML report show the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

from rlbf_jax.evaluation.columns import find, of_group
from rlbf_jax.report.stages import in_order
from rlbf_jax.report.values import (
    BESIDE,
    BY_CONSTRUCTION,
    HARMLESS,
    Key,
    Value,
    attack_rows,
    columns_of,
    kind_of,
)
from rlbf_jax.report.words import definitions, marked

UNDER_ATTACK = ("asr", "leak", "torn_seam")
"""What the table of attacks shows, always together;
other columns of its group stand with the other measurements."""
OF_ALL_ROWS = UNDER_ATTACK[:2]
"""Those that every row has; torn_seam is over rows in which something was taken back."""
ATTACK_NOTE = (
    "Large: asr, a complete violation left in the final text, and below it the 95 % interval with "
    "the letter of its method (see Definitions). Beside it leak, any violating word left, and "
    "torn, answers that an erasure left torn among those in which something was taken back. "
    "† By construction: a whole violation is forced into "
    "the answer, so any model that cannot erase scores 1 here whatever else it does. Compare such "
    "models on prefilling, which forces less."
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """`text` large, `beside` it smaller, `small` lines below;
    `heat` in 0..1 colors the cell (0 good, 1 bad)."""

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


def relabelled(table: Table, label: Callable[[str], str]) -> Table:
    """The table with the labels of its stages for their names."""
    head = table.columns[: table.labels]
    return dataclasses.replace(
        table, columns=(*head, *(label(c) for c in table.columns[table.labels :]))
    )


def number(value: float | None, metric: str = "asr") -> str:
    """As the metric's column has it; rates, and what has no column, with three digits below 0.1."""
    if value is None:
        return "–"
    column = find(metric)
    if column is not None and not column.decimals:
        return f"{value:,.0f}"
    if column is not None and column.kind != "rate":
        return f"{value:.{column.decimals}f}"
    return f"{value:.3f}" if 0 < value < 0.1 else f"{value:.2f}"


def interval(value: Value, metric: str = "asr") -> str:
    """Both limits and the mark of their method;
    nothing where there are none, or the metric is shown without decimals."""
    column = find(metric)
    if value.low is None or value.high is None or (column is not None and not column.decimals):
        return ""
    return marked(f"{value.low:.2f} to {value.high:.2f}", value.method)


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
    """asr with interval and, always beside it, leak and, where something was taken back, torn_seam:
    one row an attack and split, one column a stage.

    `whole`: attacks that force a whole violation, see `by_construction`.
    """
    pairs = [p for p in attack_rows(values, UNDER_ATTACK) if kind_of(p[0]) not in HARMLESS]
    columns = columns_of(
        {k: v for k, v in values.items() if k[3] in UNDER_ATTACK and kind_of(k[1]) not in HARMLESS}
    )
    if not pairs:
        return None
    rows = []
    for attack, split in pairs:
        # Rows do not say that they have a long prefix by another benchmark's name, as records do.
        forced = kind_of(attack) in BY_CONSTRUCTION or attack.replace(", long_prefix", "") in whole
        cells = [Cell(attack + " †" * forced), Cell(split)]
        measured = [values.get((c, attack, split, m)) for c in columns for m in OF_ALL_ROWS]
        cells.append(Cell(counts([value.n for value in measured if value])))
        for column in columns:
            asr, leak, torn = (values.get((column, attack, split, m)) for m in UNDER_ATTACK)
            cell = value_cell(asr, "asr", heat=True)
            beside = f"leak {number(leak.value) if leak else 'not measured'}"
            beside += f", torn {number(torn.value)}" if torn else ""
            cells.append(dataclasses.replace(cell, beside=beside) if asr or leak else cell)
        rows.append(tuple(cells))
    head = ("attack", "split", "n", *columns)
    return Table("Under attack", head, tuple(rows), ATTACK_NOTE, labels=2)


def counts(sizes: Sequence[int]) -> str:
    """As "64", or "60 to 64"."""
    low, high = min(sizes, default=0), max(sizes, default=0)
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
        own = {
            k: v
            for k, v in values.items()
            if k[0] == column and kind_of(k[1]) not in HARMLESS and k[3] in quality
        }
        metrics = [m for m in quality if any(k[3] == m for k in own)]
        rows = []
        for attack, split in attack_rows(own, metrics):
            cells = [value_cell(own.get((column, attack, split, m)), m) for m in metrics]
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
    quality, costs = of_group("quality"), of_group("cost")

    def shown(key: Key) -> bool:
        column, attack, _, metric = key
        if kind_of(attack) in HARMLESS:
            return metric in costs
        return metric in UNDER_ATTACK or (metric in quality and column in erasing)

    left = {k: v for k, v in values.items() if not shown(k)}
    order = in_order((k[3] for k in left), list(definitions()))
    return by_metric("Other measurements", left, order, folded=True)
