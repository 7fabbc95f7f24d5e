"""Tables of a comparison that need rows: means over training seeds, and paired differences.

Runs whose configurations differ in the seed alone are one group. A difference is paired by seed and
attempt, so two groups are compared on the seeds that both have, and within a group its stages are
compared with each other.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlbf_jax.evaluation.comparison import Arm, Estimate, Slice, difference, mean_over_seeds
from rlbf_jax.evaluation.paired_tests import PairedTest
from rlbf_jax.report import tables
from rlbf_jax.report.files import RunFiles
from rlbf_jax.report.tables import Cell, Table
from rlbf_jax.report.values import BESIDE, Key, Value, attack_rows
from rlbf_jax.report.words import PAIRED, legend, marked, p_value

COMPARED = ("asr", "leak", "backtrack_rate", "false_backtrack_rate")
AVERAGED = (*COMPARED, "torn_seam", "over_refusal", "kept_prefix", "over_deletion")
_NEEDED = ("request_id", "prompt_id", "attack", "split", "long_prefix", "metrics")


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one configuration, by training seed."""

    name: str
    runs: Mapping[int, RunFiles]

    @property
    def stages(self) -> list[str]:
        """Stages with rows in every run."""
        return [
            s
            for s in next(iter(self.runs.values())).rows
            if all(run.rows.get(s) for run in self.runs.values())
        ]

    def arm(self, stage: str, seeds: Sequence[int], name: str = "") -> Arm:
        """A stage on some of the seeds; named "stage · group" by default."""
        return Arm(
            name or f"{stage}{BESIDE}{self.name}",
            {seed: self.runs[seed].rows[stage] for seed in seeds},
        )


def grouped(runs: Sequence[RunFiles]) -> list[Group]:
    """Runs in groups, in their order. A second run of a seed,
    and one that does not say its seed, is on its own."""
    groups: list[tuple[str, dict[int, RunFiles]]] = []
    for place, run in enumerate(runs):
        config = run.manifest.get("config")
        has_seed = isinstance(config, Mapping) and isinstance(config.get("seed"), int)
        seed = int(config["seed"]) if has_seed and isinstance(config, Mapping) else -1 - place
        rest = (
            {k: v for k, v in config.items() if k != "seed"}
            if has_seed and isinstance(config, Mapping)
            else place
        )
        key = json.dumps(rest, sort_keys=True)
        group = next((seeds for other, seeds in groups if other == key and seed not in seeds), None)
        if group is None:
            groups.append((key, {seed: run}))
        else:
            group[seed] = run
    return [Group(", ".join(run.name for run in seeds.values()), seeds) for _, seeds in groups]


def usable(group: Group) -> str:
    """Why a group's rows cannot be paired; empty where they can."""
    for run in group.runs.values():
        for stage, rows in run.rows.items():
            for row in rows:
                if missing := [k for k in _NEEDED if k not in row]:
                    return (
                        f"rows of {run.name}, stage {stage}, have no {missing[0]}; evaluate that "
                        "stage again."
                    )
    return ""


def slices(*arms: Arm) -> list[Slice]:
    """(attack, split) pairs that every seed of every arm has, in the report's order."""
    pairs = [
        {(str(r["attack"]), str(r["split"])) for r in rows}
        for arm in arms
        for rows in arm.rows.values()
    ]
    shared = set.intersection(*pairs) if pairs else set()
    order = attack_rows(
        {("", a, s, "asr"): Value(0, None, None, 0, 0) for a, s in shared}, ("asr",)
    )
    return [Slice(attack, split) for attack, split in order]


def _measured(arm: Arm, metric: str) -> bool:
    return all(metric in row["metrics"] for rows in arm.rows.values() for row in rows)


def seed_means(group: Group) -> dict[Key, Value]:
    """Means over a group's seeds, as values of the columns "stage · group"."""
    values: dict[Key, Value] = {}
    for stage in group.stages:
        arm = group.arm(stage, list(group.runs))
        for where in slices(arm):
            for metric in AVERAGED:
                estimate = mean_over_seeds(arm, where, metric) if _measured(arm, metric) else None
                if estimate is not None and math.isfinite(estimate.value):
                    key = (
                        f"{stage}{BESIDE}seeds {_seeds(group.runs)}",
                        where.attack,
                        where.split or "all",
                        metric,
                    )
                    values[key] = Value(
                        estimate.value,
                        estimate.low,
                        estimate.high,
                        estimate.n,
                        estimate.n_prompts,
                        len(estimate.by_seed),
                        estimate.method,
                    )
    return values


def _seeds(seeds: Mapping[int, Any] | Sequence[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def paired_tables(groups: Sequence[Group]) -> tuple[list[Table], list[str]]:
    """Differences, the most telling table open and the others folded,
    and sentences about what could not be paired."""
    shown: list[Table] = []
    notes = [words for group in groups if (words := usable(group))]
    if not groups or usable(groups[0]):
        return [], notes
    good = [group for group in groups if not usable(group)]
    pairs = _stage_pairs(good[0]) if len(groups) == 1 else _group_pairs(good, notes)
    for one, other, seeds in pairs:
        table, left = difference_table(one, other, seeds, folded=bool(shown))
        shown += [table] if table is not None else []
        notes += left
    return shown, list(dict.fromkeys(notes))


def _stage_pairs(group: Group) -> Iterator[tuple[Arm, Arm, list[int]]]:
    """The last stage with each earlier one, from the latest."""
    seeds, stages = list(group.runs), group.stages
    for stage in reversed(stages[:-1]):
        yield group.arm(stages[-1], seeds, stages[-1]), group.arm(stage, seeds, stage), seeds


def _group_pairs(groups: Sequence[Group], notes: list[str]) -> Iterator[tuple[Arm, Arm, list[int]]]:
    """Every group with the first, stage by stage from the last."""
    for group in groups[1:]:
        seeds = [seed for seed in group.runs if seed in groups[0].runs]
        shared = [stage for stage in group.stages if stage in groups[0].stages]
        if not seeds or not shared:
            lack = "training seed" if not seeds else "stage"
            notes.append(
                f"{group.name} and {groups[0].name} have no {lack} in common, so nothing is paired."
            )
            continue
        for stage in reversed(shared):
            yield group.arm(stage, seeds), groups[0].arm(stage, seeds), seeds


def difference_table(
    one: Arm, other: Arm, seeds: Sequence[int], folded: bool = False
) -> tuple[Table | None, list[str]]:
    """`one` minus `other` on every attack and split both were asked, and why some are left out."""
    metrics = [m for m in COMPARED if _measured(one, m) and _measured(other, m)]
    rows: list[tuple[Cell, ...]] = []
    unpaired: list[str] = []
    methods: set[str] = set()
    for where in slices(one, other):
        try:
            estimates = [difference(one, other, where, metric) for metric in metrics]
        except ValueError:  # other attempts, which is all that can differ here
            unpaired.append(where.label)
            continue
        if any(math.isfinite(t.value) for t in estimates):
            cells = [_difference_cell(t, len(seeds)) for t in estimates]
            methods |= {m for t in estimates if t.test for m in (t.method, t.test.mde_method)}
            pairs = tables.counts([t.n for t in estimates if t.n])
            rows.append((Cell(where.attack), Cell(where.split or "all"), Cell(pairs), *cells))
    notes = []
    if unpaired:
        notes.append(
            f"{one.name} and {other.name} were asked other attempts, so not paired: "
            f"{'; '.join(unpaired)}."
        )
    if not rows:
        return None, notes
    note = (
        f"{one.name} minus {other.name}, paired by training seed and attempt (seeds "
        f"{_seeds(list(seeds))}). Below 0, the first has less. * marks 95 % intervals "
        "without 0; among so many "
        "differences, some are marked by chance. Cells of one attack are pooled. "
        f"{PAIRED}. {legend(methods)}."
    )
    title = f"{one.name} minus {other.name}"
    return Table(
        title, ("attack", "split", "pairs", *metrics), tuple(rows), note, labels=2, folded=folded
    ), notes


def _difference_cell(estimate: Estimate, num_seeds: int) -> Cell:
    if not math.isfinite(estimate.value):
        return Cell("–")
    limits = f"{_signed(estimate.low)} to {_signed(estimate.high)}"
    small = [marked(limits, estimate.method)]
    if num_seeds > 1:
        small.append("seeds: " + ", ".join(_signed(v) for v in estimate.by_seed.values()))
    small += filter(None, [_test_words(estimate.test)] if estimate.test else [])
    return Cell(_signed(estimate.value) + " *" * estimate.excludes_zero, tuple(small))


def _test_words(test: PairedTest) -> str:
    """`p 0.012, MDE 0.15 C`."""
    known = [] if math.isnan(test.p) else [f"p {p_value(test.p)}"]
    if not math.isnan(test.mde):
        known.append(marked(f"MDE {test.mde:.2f}", test.mde_method))
    return ", ".join(known)


def _signed(value: float) -> str:
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")
