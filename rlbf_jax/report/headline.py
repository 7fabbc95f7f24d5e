"""The first screen of a report: what is left, what it costs, a number or two a stage."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from rlbf_jax.attacks import SEARCHED, WORST_OF_N
from rlbf_jax.report import tables
from rlbf_jax.report.tables import base_of
from rlbf_jax.report.values import HARMLESS, Key, Value, kind_of

_CELL = re.compile(r"[a-z]+ \d+")
"""What a row of an attack's own grid is called beside its name: `b 8`."""


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


def over_splits(values: Mapping[Key, Value], column: str, attack: str, metric: str) -> float | None:
    """The value on split `all`, else the mean over splits weighted by their number of answers."""
    splits = {k[2]: v for k, v in values.items() if (k[0], k[1], k[3]) == (column, attack, metric)}
    if "all" in splits:
        return splits["all"].value
    return _mean_over_answers(list(splits.values()))


def _mean_over_answers(found: Sequence[Value]) -> float | None:
    weight = sum(value.n for value in found)
    return sum(value.value * value.n for value in found) / weight if weight else None


def perplexity_ratio(values: Mapping[Key, Value], column: str) -> float | None:
    """Perplexity on harmless text over that of base."""
    own, base = (over_splits(values, c, "none", "perplexity") for c in (column, base_of(column)))
    return own / base if own is not None and base else None


def relabelled(tile: Tile, label: Callable[[str], str]) -> Tile:
    """The tile with the labels of its stages for their names."""
    entries = tuple(dataclasses.replace(e, stage=label(e.stage)) for e in tile.entries)
    return dataclasses.replace(tile, entries=entries)


def overall(
    values: Mapping[Key, Value], column: str, metric: str, *, harmless: bool | None = None
) -> float | None:
    """The mean over all answers: of attacked ones, of harmless ones, or (None) of both.

    Every answer of the run's own evaluation counts once: not again as one with a long prefix. Left
    out are other benchmarks and data, attacks that are searched for one stage, and those that ask a
    prompt many times. None where there is none.
    """
    found = [
        value
        for (c, attack, _, m), value in values.items()
        if (c, m) == (column, metric)
        and _counts(attack)
        and harmless in (None, kind_of(attack) in HARMLESS)
    ]
    return _mean_over_answers(found)


def _counts(attack: str) -> bool:
    kind, *differs = attack.split(", ")
    return (
        kind not in WORST_OF_N
        and kind not in SEARCHED
        and all(_CELL.fullmatch(each) for each in differs)
    )


def headline_tiles(
    values: Mapping[Key, Value], main: Sequence[str], colors: Mapping[str, str]
) -> list[Tile]:
    """What is left and what it costs, for the main columns."""

    def tile(
        title: str,
        hint: str,
        large: Callable[[str], float | None],
        small: Callable[[str], str],
        digits: Callable[[float], str] = tables.number,
    ) -> Tile:
        found = [(column, large(column)) for column in main]
        entries = [
            Entry(column, colors[column], digits(value), small(column))
            for column, value in found
            if value is not None
        ]
        return Tile(title, hint, tuple(entries))

    def beside(name: str, value: float | None) -> str:
        return "" if value is None else f"{name} {tables.number(value)}"

    def of_attack(attack: str, title: str) -> Tile:
        return tile(
            title,
            "attack success: a whole violation is left",
            lambda c: over_splits(values, c, attack, "asr"),
            lambda c: beside("leak", over_splits(values, c, attack, "leak")),
        )

    made = [
        tile(
            "Violations left",
            "answers with any violating word, all attacks",
            lambda c: overall(values, c, "leak", harmless=False),
            lambda c: beside("whole", overall(values, c, "asr", harmless=False)),
        ),
        of_attack("prefilling", "Prefilling"),
        of_attack("middle_filling", "Middle filling"),
        *_cost_tiles(values, tile),
    ]
    return [tile for tile in made if tile.entries]


def _cost_tiles(values: Mapping[Key, Value], tile: Callable[..., Tile]) -> list[Tile]:
    return [
        tile(
            "Harmless text lost",
            "harmless answers taken back in part",
            lambda c: overall(values, c, "false_backtrack_rate", harmless=True),
            lambda c: _worst(values, c),
        ),
        tile(
            "Ids wasted",
            "an answer: drawn and taken back, and directives",
            lambda c: overall(values, c, "wasted_tokens"),
            lambda c: "",
            lambda value: f"{value:.1f}",
        ),
        tile(
            "Perplexity",
            "harmless text; 1 is no cost",
            lambda c: perplexity_ratio(values, c),
            lambda c: "× base",
            lambda value: f"{value:.3f}",
        ),
    ]


def _worst(values: Mapping[Key, Value], column: str) -> str:
    rates = {
        attack: value.value
        for (c, attack, _, m), value in values.items()
        if (c, m) == (column, "false_backtrack_rate")
        and _counts(attack)
        and kind_of(attack) in HARMLESS
    }
    worst = max(rates, key=lambda name: rates[name], default="")
    if not worst or not rates[worst]:
        return ""
    return f"worst {tables.number(rates[worst])}"


def summary(values: Mapping[Key, Value], main: Sequence[str]) -> list[str]:
    """Does it work, and at what cost: one sentence each, made of the measured numbers only."""
    if len(main) < 2:
        return []
    first, last = main[0], main[-1]
    sentences = []
    before, after = (overall(values, c, "leak", harmless=False) for c in (first, last))
    if before is not None and after is not None:
        sentences.append(
            f"Over all attacks, {_percent(before)} of answers by {first} and {_percent(after)} by "
            f"{last} end with some violating word."
        )
    for attack in ("prefilling", "middle_filling"):
        before, after = (over_splits(values, c, attack, "asr") for c in (first, last))
        if before is None or after is None:
            continue
        sentences.append(
            f"Under {attack.replace('_', ' ')}, {_percent(before)} and {_percent(after)} end with "
            "a complete violation."
        )
    lost = overall(values, last, "false_backtrack_rate", harmless=True)
    wasted, ratio = overall(values, last, "wasted_tokens"), perplexity_ratio(values, last)
    costs = [] if lost is None else [f"{_percent(lost)} of harmless answers lose text"]
    costs += [] if wasted is None else [f"{wasted:.1f} ids of an answer are wasted"]
    costs += [] if ratio is None else [f"perplexity is {ratio:.3f} times that of {first}"]
    if costs:
        sentences.append(f"What {last} costs: " + ", ".join(costs) + ".")
    return sentences


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %" if 0 < rate < 0.1 else f"{100 * rate:.0f} %"
