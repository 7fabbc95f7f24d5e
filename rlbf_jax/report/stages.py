"""The stages of a run: their order, what the report calls them, and which make the headline.

A manifest that lists its `stages` says all of it. Without the list (runs of earlier versions) the
order is that of `KNOWN` and then of first appearance in `results.json`, and the headline is the
first stage, the last, and `sft` between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KNOWN = ("base", "refusal_sft", "sft", "sft_control")
"""What recipes call the stages that they share, in order."""


@dataclasses.dataclass(frozen=True)
class Stages:
    """Names are those of records and rows."""

    order: tuple[str, ...] = ()
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Name -> what the report calls it, where that is something else."""
    headline: frozenset[str] = frozenset()
    """Stages that the manifest marks; empty where it marks none."""

    def label(self, column: str) -> str:
        """A column's name with its stage's label: "stage", "stage (method)" or "stage · run"."""
        stage = stage_of(column)
        return self.labels.get(stage, stage) + column[len(stage) :]

    def main(self, columns: Sequence[str]) -> list[str]:
        """The columns of the headline, in their order."""
        present = list(dict.fromkeys(map(stage_of, columns)))
        chosen = self.headline & set(present) or {*present[:1], *present[-1:], "sft"}
        return [column for column in columns if stage_of(column) in chosen]


def stage_of(column: str) -> str:
    """The stage of a column: `stage (method)` and `stage · run` begin with it."""
    return column.split(" ")[0]


def in_order(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Unique names: those of `order` first, then others as they come."""
    unique = list(dict.fromkeys(names))
    return [n for n in order if n in unique] + [n for n in unique if n not in order]


def stages_of(
    manifest: Mapping[str, Any], records: Iterable[Mapping[str, Any]], others: Iterable[str] = ()
) -> Stages:
    """A run's stages.

    Args:
      manifest: its `stages`, if there, is a list of {"name", "label", "headline"}; an entry without
        a name is passed over, label and headline may be missing.
      records: in the order of `results.json`.
      others: stages that have rows or curves, with or without records.
    """
    listed = manifest.get("stages")
    stated = {
        entry["name"]: entry
        for entry in (listed if isinstance(listed, list) else ())
        if isinstance(entry, Mapping) and isinstance(entry.get("name"), str)
    }
    appearing = (str(record.get("stage")) for record in records)
    names = in_order((*stated, *appearing, *others), [*stated] or KNOWN)
    return Stages(
        tuple(names),
        {
            name: entry["label"]
            for name, entry in stated.items()
            if isinstance(entry.get("label"), str) and entry["label"]
        },
        frozenset(name for name, entry in stated.items() if entry.get("headline") is True),
    )


def merged(orders: Iterable[Sequence[str]]) -> list[str]:
    """One order for several runs: a stage that earlier runs lack follows its predecessor."""
    names: list[str] = []
    for order in orders:
        place = -1
        for name in order:
            if name in names:
                place = names.index(name)
            else:
                place += 1
                names.insert(place, name)
    return names
