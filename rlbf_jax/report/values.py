"""From the records of `results.json` to one `Value` a (column, attack, split, metric).

A column is a stage, or one of the methods of a stage, or a stage of one of several runs.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlbf_jax.attacks import ATTACKS
from rlbf_jax.attacks import BENIGN as HARMLESS
from rlbf_jax.attacks import WHOLE as BY_CONSTRUCTION
from rlbf_jax.report.stages import stages_of

__all__ = ["BY_CONSTRUCTION", "HARMLESS", "Key", "Record", "Value", "index"]

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
    method: str = ""
    """Of the interval, see `intervals.METHODS`; empty where a record does not say."""


def index(
    records: Sequence[Record],
    column_of: Callable[[Record], str] | None = None,
    data: str = "",
    main: str = "",
    stages: Sequence[str] = (),
) -> dict[Key, Value]:
    """One value for every (column, attack, split, metric). Records of several seeds are averaged.

    A stage with several methods becomes several columns, unless `column_of` names each record's
    column; an attack measured under several knobs, in another benchmark than `main`, or on other
    data than `data` (where that is given), becomes several attacks, "attack, what differs". The
    interval of an average spans those of its seeds. An empty `main` is the benchmark of most
    records. Columns come in the order of `stages`, or, without them, as the records have it.
    """
    main = main or _main_benchmark(records)
    methods: dict[str, set[str]] = {}
    for r in records:
        methods.setdefault(str(r.get("stage")), set()).add(str(r.get("method")))
    labels = knob_labels(records, main)
    groups: dict[Key, list[Record]] = {}
    order = stages or stages_of({}, records).order
    for r in records:
        if not isinstance(r.get("value"), int | float) or not math.isfinite(r["value"]):
            continue
        stage, metric = str(r.get("stage")), str(r.get("metric"))
        column = f"{stage} ({r.get('method')})" if len(methods[stage]) > 1 else stage
        name = _attack_name(r, main, data, labels[*_attack_of(r, main), _knobs_key(r)])
        where = column_of(r) if column_of else column
        groups.setdefault((where, name, str(r.get("split", "all")), metric), []).append(r)
    place = {stage: i for i, stage in enumerate(order)}
    ranked = sorted(groups.items(), key=lambda g: place.get(str(g[1][0].get("stage")), len(place)))
    return {key: _mean(group) for key, group in ranked}


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
    """(attack, benchmark, knobs as JSON) -> what tells them from other knobs of both,
    as "p 16 v 4 b 0", or nothing.

    A knob is named where its values differ within the attack and benchmark.
    Where that leaves two records of one number alike (a knob that only one of them has),
    every knob that not all have alike is named.
    """
    knobs: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    rivals: dict[tuple, set[str]] = {}
    for r in records:
        attack, key = _attack_of(r, main), _knobs_key(r)
        knobs.setdefault(attack, {})[key] = _knobs_of(r)
        rivals.setdefault((attack, _cell_of(r)), set()).add(key)
    labels: dict[tuple[str, str, str], str] = {}
    for attack, variants in knobs.items():
        names = dict.fromkeys(name for each in variants.values() for name in each)
        seen = {
            name: {json.dumps(each[name]) for each in variants.values() if name in each}
            for name in names
        }
        differing = [name for name in names if len(seen[name]) > 1]
        named = {key: _knob_label(each, differing) for key, each in variants.items()}
        if any(
            len({named[k] for k in keys}) < len(keys)
            for (owner, _), keys in rivals.items()
            if owner == attack
        ):
            differing = [
                n
                for n in names
                if len(seen[n]) > 1 or any(n not in each for each in variants.values())
            ]
            named = {key: _knob_label(each, differing) for key, each in variants.items()}
        labels |= {(*attack, key): label for key, label in named.items()}
    return labels


def _attack_of(r: Record, main: str) -> tuple[str, str]:
    """A record's or row's attack and benchmark, which rows with a long prefix
    share with the others."""
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
    """Names of attacks, as `index` tells them apart, that force a whole violation
    in every one of some rows."""
    main = main or _main_benchmark(records)
    labels = knob_labels(records, main)
    whole: dict[str, bool] = dict.fromkeys(BY_CONSTRUCTION, True)
    for row in rows:
        attack = _attack_of(row, main)
        knobs = {**_knobs_of(row), **(row.get("cell") or {})}
        tried = [{**knobs, **ASKED}, knobs] if "asked" in row else [knobs]
        keys = [key for each in tried if (*attack, key := _knobs_key({"knobs": each})) in labels]
        if attack[0] not in BY_CONSTRUCTION and keys:
            name = _attack_name(row, main, data, labels[*attack, keys[0]])
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
        method=str(group[0].get("ci_method") or "") if len(group) == 1 else "span",
    )


def columns_of(values: Mapping[Key, Value]) -> list[str]:
    """The columns that have a value, in the order that `index` gave them."""
    return list(dict.fromkeys(key[0] for key in values))


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
