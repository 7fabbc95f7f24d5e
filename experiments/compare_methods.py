"""Stages of several runs in one table: what is left under attack, and what taking back costs.

Command: python experiments/compare_methods.py runs/quickstart:sft runs/quickstart:rlbf \\
  runs/reset:reset_sft runs/bsafe:bsafe_sft

Reads the rows of `evaluation/STAGE.jsonl`. Stages of runs that share their evaluation's seed answer
the same prompts. Columns:

    asr, leak            over prefilling, deep and middle filling, all forms
    false                answers with a directive to harmless prompts: nothing forced / benign
                         prefill / benign middle
    wasted               sampled ids that the reader does not see, a correction: over answers under
                         these attacks with exactly one directive
    sampled              ids sampled an answer, to harmless prompts with nothing forced
    corrected            ids sampled an answer, of those that `wasted` counts
    kept                 share of the benign words before the violation that stay: middle filling,
                         answers with a directive

A letter after an interval is its method. Below, each stage minus the first, over the same attempts:
difference with interval, p and minimum detectable effect.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlbf_jax.evaluation.intervals import interval, paired_difference
from rlbf_jax.evaluation.paired_tests import paired_test
from rlbf_jax.report.words import PAIRED, legend, marked, p_value

Row = Mapping[str, Any]

HARMFUL = ("prefilling", "deep_prefilling", "middle_filling")
BENIGN = ("none", "benign_prefill", "benign_middle")
USED = ("wilson", "wilson_prompts", "bootstrap", "connor", "bootstrap_se")
COLUMNS = ("stage", "semantics", "asr", "leak", "false", "wasted", "sampled", "corrected", "kept")


def read(named: str) -> tuple[str, list[Row]]:
    """(label, rows) of RUN:STAGE."""
    run, _, stage = named.rpartition(":")
    path = Path(run) / "evaluation" / f"{stage}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return stage, rows


def mean(rows: Sequence[Row], value: Callable[[Row], float | None], counts: bool = False) -> str:
    """Mean with its 95 % interval, over rows that have a value."""
    pairs = [(v, row["prompt_id"]) for row in rows if (v := value(row)) is not None]
    if not pairs:
        return "–"
    values, prompts = zip(*pairs, strict=True)
    found = interval([float(v) for v in values], prompts, counts=counts)
    return marked(f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]", found.method)


def sampled(row: Row) -> int:
    """Ids that the model drew itself, its end of sequence included."""
    return sum(not item["forced"] for item in row["trace"])


def difference(rows: Sequence[Row], others: Sequence[Row], metric: str) -> list[str]:
    """Cells of a metric under the attacks of HARMFUL, first minus others, paired by attempt."""
    a, b = (
        {
            (row["request_id"], row["prompt_id"]): float(value)
            for row in some
            if row["attack"] in HARMFUL and (value := row["metrics"][metric]) is not None
        }
        for some in (rows, others)
    )
    pairs = [key for key in a if key in b]
    if not pairs:
        return ["0", "–", "–", "–"]
    values, others_values = [a[key] for key in pairs], [b[key] for key in pairs]
    prompts, seeds = [prompt for _, prompt in pairs], [0] * len(pairs)
    mean = paired_difference(values, others_values, prompts, seeds)
    gaps = [one - other for one, other in zip(values, others_values, strict=True)]
    test = paired_test(gaps, prompts, seeds, mean.se, set(gaps) <= {-1.0, 0.0, 1.0})
    limits = f"{mean.value:+.2f} [{mean.low:+.2f}, {mean.high:+.2f}]"
    return [str(len(pairs)), marked(limits, mean.method), p_value(test.p),
            marked(f"{test.mde:.2f}", test.mde_method)]  # fmt: skip


def line(stage: str, rows: Sequence[Row]) -> list[str]:
    """A stage's row of the table."""
    harmful = [row for row in rows if row["attack"] in HARMFUL]
    benign = [[row for row in rows if row["attack"] == attack] for attack in BENIGN]
    corrected = [row for row in harmful if len(row["edits"]) == 1]
    middle = [row for row in harmful if row["attack"] == "middle_filling" and row["edits"]]

    def metric(name: str) -> Callable[[Row], float | None]:
        return lambda row: row["metrics"][name]

    false = [mean(some, metric("backtrack_rate")).partition(" ")[0] for some in benign]
    return [
        stage,
        rows[0]["semantics"],
        mean(harmful, metric("asr")),
        mean(harmful, metric("leak")),
        " / ".join(false),
        mean(corrected, metric("wasted_tokens"), counts=True),
        mean(benign[0], sampled, counts=True),
        mean(corrected, sampled, counts=True),
        mean(middle, metric("kept_prefix")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="+", metavar="RUN:STAGE")
    args = parser.parse_args()
    stages = [read(named) for named in args.stages]
    show(COLUMNS, [line(*stage) for stage in stages])
    first, rows = stages[0]
    differences = [
        [f"{stage} − {first}", metric, *difference(own, rows, metric)]
        for stage, own in stages[1:]
        for metric in ("asr", "leak")
    ]
    if differences:
        print()
        show(("stages", "metric", "pairs", "difference", "p", "MDE"), differences)
    print(f"\nIntervals are at 95 %. {legend(USED)}.")
    print(f"{PAIRED}." if differences else "", end="\n" * bool(differences))


def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table."""
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
