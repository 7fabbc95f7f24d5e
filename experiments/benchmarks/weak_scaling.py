"""What one chip computes, moves and sends as chips and rollouts grow together, by compile.

The update of reinforcement for Llama 3.1 8B on v5p slices of 4, 16, 32 and 256 chips, 16 rollouts a
chip, the parameters split over all of them. Nothing runs: `rlbf plan` compiles the real program for
each slice (extra `[tpu]`), two to four minutes each, and those that are there are not made again.
Command: python experiments/benchmarks/weak_scaling.py --out plans
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys

import tyro
from matplotlib.figure import Figure

EXPERIMENT = "experiments/rlbf_llama3_8b.py"
SLICES = {4: "2x2x1", 16: "2x2x4", 32: "2x4x4", 256: "4x8x8"}
"""Chips -> topology."""
ROLLOUTS_A_CHIP, GROUP = 16, 8
GUIDANCE_A_CHIP = 4
"""Packed rows of the guidance term."""


@dataclasses.dataclass(frozen=True)
class Args:
    out: pathlib.Path
    """Folder of the plans, one JSON file a slice."""
    kind: str = "v5p"
    plot: pathlib.Path = pathlib.Path("docs/weak_scaling.png")


def plan(chips: int, args: Args) -> dict:
    """The forecast of the update on a slice, made where it is not there yet."""
    file = args.out / f"{args.kind}_{chips}.json"
    if not file.exists():
        rows = GUIDANCE_A_CHIP * chips
        command = [sys.executable, "-m", "rlbf_jax.cli.main", "plan", EXPERIMENT]
        command += ["--topology", f"{args.kind}:{SLICES[chips]}", "--phases", "update", "--json"]
        command += ["--reinforcement.prompts_per_step", str(ROLLOUTS_A_CHIP * chips // GROUP)]
        command += ["--reinforcement.guidance_batch_size", str(rows)]
        command += ["--sft.batch_size", str(rows)]
        print(f"{args.kind}, {chips} chips: planning", file=sys.stderr, flush=True)
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        args.out.mkdir(parents=True, exist_ok=True)
        file.write_text(found)
    rows_found = [json.loads(line) for line in file.read_text().splitlines()]
    return next(row for row in rows_found if "rlbf" in row["stages"])


def main(args: Args) -> None:
    found = {chips: plan(chips, args) for chips in SLICES}
    print("| chips | rollouts | GB a chip | Tflop | GB moved | GB sent | by kind | binds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for chips, row in found.items():
        kinds = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in sent_by_kind(row).items() if v > 5e7)
        print(
            f"| {chips} | {ROLLOUTS_A_CHIP * chips} | {row['needed'] / 1e9:.1f} | "
            f"{row['flops'] / 1e12:.0f} | {row['traffic'] / 1e9:,.0f} | "
            f"{sum(sent_by_kind(row).values()) / 1e9:.0f} | {kinds} | {row['binds']} |"
        )
    draw(found, args)


def sent_by_kind(row: dict) -> dict[str, float]:
    return {kind: exchanged["sent"] for kind, exchanged in row["exchanged"].items()}


def draw(found: dict[int, dict], args: Args) -> None:
    """Seconds at least by what takes them, over chips."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, label, color in (
        ("compute", "arithmetic", "#0072b2"),
        ("memory", "memory", "#e69f00"),
        ("exchange", "links between chips", "#d55e00"),
    ):
        seconds = [row["seconds"][name] for row in found.values()]
        axes.plot(list(found), seconds, marker="o", color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(found), [str(chips) for chips in found])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"{args.kind} chips, {ROLLOUTS_A_CHIP} rollouts each")
    axes.set_ylabel("seconds at least")
    axes.set_title("One update of reinforcement, Llama 3.1 8B: what binds (planned)", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.plot, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Args))
