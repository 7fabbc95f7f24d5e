"""docs/results.md from what the pieces have written, and the picture of the bias sweep."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from rlbf_jax.storage import write_whole

from . import sections
from .pieces import ATTACKED_SHARES, Piece
from .running import commits, finished, seconds
from .sections import BiasPoint, Results, Section

INTRO = """# Results at toy scale

Every number is computed from the generations of the runs named below, \
and so is every sentence under a table; none is
written by hand. Small models, made-up violations, words from a closed world: \
this shows what the machinery does, not
how a large model behaves.

*asr*: a complete violation is left in the final text. *leak*: any violating word is left. \
† A whole violation is
forced into the answer by middle filling and deep prefilling, \
so a model that cannot erase has asr 1 there by
construction. Intervals are at 95 %, by bootstrap over prompts within training seeds \
(Wilson's where all rows are
alike); seeds are held fixed, so what another seed would do is to be read from the seeds' \
own differences. Differences
are paired by seed and attempt, over the attempts at which both sides have the number. \
Bold: the interval excludes 0;
among twenty such comparisons of equals one is bold by chance, and nothing is corrected for that."""


def write_document(
    pieces: Sequence[Piece], workdir: Path, ablation_seeds: Sequence[int], out: Path, command: str
):
    """Writes the document and, where the sweep has run, OUT_bias.png beside it.
    Unfinished pieces are named."""
    results = Results(pieces, workdir, ablation_seeds)
    picture = out.with_name(f"{out.stem}_bias.png")
    points = sections.bias_points(results)
    if points:
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(bias_plot(points))
    parts = [INTRO, _facts(pieces, workdir, ablation_seeds, command)]
    parts += [
        _section(section)
        for section in _sections(results, points, picture.name)
        if section is not None
    ]
    write_whole(out, "\n\n".join(parts) + "\n")


def _sections(results: Results, points: Sequence[BiasPoint], picture: str) -> list[Section | None]:
    def ablation(title: str, *groups: str, **how: str) -> Section | None:
        return sections.ablation(results, title, groups, **how)

    shares = [f"attacked_{round(100 * share)}" for share in ATTACKED_SHARES]
    return [
        sections.methods(results),
        sections.differences(results, "rlbf_ppo", "sft_control"),
        sections.differences(results, "rlbf_ppo", "sft"),
        sections.differences(results, "sft_control", "sft"),
        sections.differences(results, "rlbf_grpo", "rlbf_ppo"),
        sections.costs(results),
        sections.semantics(results),
        ablation("Directives forbidden", "forbid_all", "forbid_middle"),
        sections.bias_sweep(points, picture),
        ablation("Without SFT guidance", "no_guidance"),
        ablation("Reward variants", "price", "overlap", "drop_positive"),
        ablation("A critic that errs", "noise", "noise_category"),
        ablation("Share of attacked rollouts", *shares),
        ablation("Coverage of SFT, after SFT", "coverage_narrow", "coverage_wide", stage="sft"),
        ablation("Coverage of SFT, after reinforcement", "coverage_narrow", "coverage_wide"),
    ]


def _section(section: Section) -> str:
    return "\n\n".join([f"## {section.title}", section.intro, *section.tables, section.sentence])


def _facts(
    pieces: Sequence[Piece], workdir: Path, ablation_seeds: Sequence[int], command: str
) -> str:
    done = [piece for piece in pieces if finished(piece, workdir)]
    missing = [piece.name for piece in pieces if piece not in done]
    suite = pieces[0].config.evaluation
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    listed = {
        "command": f"`{command}`",
        "commit": ", ".join(commits(done, workdir)) or "unknown",
        "training seeds": ", ".join(map(str, dict.fromkeys(piece.seed for piece in pieces)))
        + f"; ablations: {', '.join(map(str, ablation_seeds))}",
        "pool": f"{suite.pool}, {suite.n} prompts an attack and form split, "
        f"temperature {suite.knobs.temperature:g}",
        "wall clock": f"{seconds(done, workdir) / 60:.0f} minutes of training and evaluation "
        f"in all, on {cores} cores",
    }
    if missing:
        listed["not run yet"] = ", ".join(missing)
    return "\n".join(f"- {name}: {value}" for name, value in listed.items())


def bias_plot(points: Sequence[BiasPoint]) -> bytes:
    """PNG: rates over the bias, and the trade-off between false backtracks and what is left."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    biases = [p.bias for p in points]
    curves = {
        "asr, middle filling": ([p.asr.value for p in points], "#d55e00", "o-"),
        "leak, middle filling": ([p.leak.value for p in points], "#e69f00", "s-"),
        "false backtracks, harmless": ([p.false_mean for p in points], "#0072b2", "^-"),
    }
    for label, (values, color, style) in curves.items():
        left.plot(biases, values, style, color=color, label=label)
    left.set(xlabel="bias on the categories' logits", ylabel="rate")
    left.legend(frameon=False, fontsize=9)
    for label, color in (("asr", "#d55e00"), ("leak", "#e69f00")):
        values = [getattr(p, label).value for p in points]
        right.plot(
            [p.false_mean for p in points],
            values,
            "o-",
            color=color,
            label=f"{label}, middle filling",
        )
    for p in points:
        right.annotate(f"{p.bias:+g}" if p.bias else "0", (p.false_mean, p.leak.value), fontsize=8,
                       xytext=(4, 4), textcoords="offset points")  # fmt: skip
    right.set(xlabel="false backtracks on harmless prompts and benign twins", ylabel="rate")
    right.margins(x=0.1)
    right.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
