"""docs/results.md from what the pieces have written, and the picture of the bias sweep."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from rlbf_jax.storage import write_whole

from . import sections
from .kept import Kept
from .pieces import ATTACKED_SHARES
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
construction. Intervals are at 95 %, by bootstrap over prompts, which are drawn once for all \
training seeds, as all
answer the same ones (W: Wilson's for as many rows as there are prompts, where all rows are \
alike); seeds are held
fixed, so what another seed would do is to be read from the seeds' own differences. Differences
are paired by seed and attempt, over the attempts at which both sides have the number. \
Bold: the interval excludes 0;
among twenty such comparisons of equals one is bold by chance, and nothing is corrected for that. \
In parentheses the
minimum detectable effect: the smallest true difference that a comparison of this size finds at \
5 % with 80 % power
(Connor's formula for paired rates with one pair a prompt, otherwise 2.80 standard errors of the \
bootstrap). *p*:
McNemar's exact test, mid-p; pairs of one prompt change sides together."""


def write_document(kept: Kept, out: Path) -> None:
    """Writes the document and, where the sweep has run, OUT_bias.png beside it.
    Unfinished pieces are named."""
    results = Results(kept)
    picture = out.with_name(f"{out.stem}_bias.png")
    points = sections.bias_points(results)
    if points:
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(bias_plot(points))
    parts = [INTRO, _facts(kept)]
    parts += [
        _section(section)
        for section in _sections(results, points, picture.name)
        if section is not None
    ]
    write_whole(out, "\n\n".join(parts) + "\n")


def _sections(results: Results, points: Sequence[BiasPoint], picture: str) -> list[Section | None]:
    def ablation(title: str, *groups: str, **how: str) -> Section | None:
        return sections.ablation(results, title, groups, **how)

    coverages = ("plain_sft", "coverage_narrow", "coverage_wide")
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
        ablation("What rollouts start from", "plain_contexts", "own_mistakes"),
        ablation("Reward terms", "category_price", "harmless_price", "torn"),
        ablation("Loss variants", "grpo", "dr_grpo", "dapo", "rloo"),
        ablation("Without SFT guidance", "no_guidance"),
        ablation("A critic that errs", "noise", "noise_category"),
        ablation("Share of attacked rollouts", *shares),
        ablation("What SFT sees, after SFT", *coverages, stage="sft"),
        ablation("What SFT sees, after reinforcement", *coverages),
    ]


def _section(section: Section) -> str:
    return "\n\n".join([f"## {section.title}", section.intro, *section.tables, section.sentence])


def _facts(kept: Kept) -> str:
    done = [piece for piece in kept.pieces if piece.finished]
    missing = [piece.name for piece in kept.pieces if not piece.finished]
    minutes = sum(piece.seconds for piece in done) / 60
    listed = {
        "command": f"`{kept.command}`",
        "commit": ", ".join(dict.fromkeys(piece.commit for piece in done)) or "unknown",
        "training seeds": ", ".join(map(str, dict.fromkeys(piece.seed for piece in kept.pieces)))
        + f"; ablations: {', '.join(map(str, kept.ablation_seeds))}",
        "pool": kept.suite,
        "wall clock": f"{minutes:.0f} minutes of training and evaluation "
        f"in all, on {kept.cores} cores",
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
