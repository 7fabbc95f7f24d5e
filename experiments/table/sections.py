"""The sections of docs/results.md: each some tables and one sentence of what they say."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from rlbf_jax.attacks import WORST_OF_N
from rlbf_jax.evaluation.comparison import (
    Arm,
    Estimate,
    Slice,
    difference,
    load_arm,
    mean_over_seeds,
    perplexity_ratio,
    within,
)

from . import words
from .kept import Kept
from .pieces import BIASES, bias_group
from .words import Compared, number

SPLITS = ("sft", "rl", "unseen")
UNDER_ATTACK = (
    Slice("direct"),
    *(
        Slice(attack, split)
        for attack in ("prefilling", "deep_prefilling", "middle_filling")
        for split in SPLITS
    ),
    *(Slice("middle_cut", split) for split in ("rl", "unseen")),
    *(
        Slice("late_filling", split, cell=(("b", b),))
        for split in ("rl", "unseen")
        for b in (2, 8, 16)
    ),
    *(
        Slice("many_violations", split, cell=(("violations", count),))
        for split in ("rl", "unseen")
        for count in (2, 4)
    ),
    *(Slice(attack, "rl") for attack in ("respelled", "critic_note", "reprogram")),
    Slice("decoding"),
)
"""Of a suite that does not ask some of them, those rows are left out."""
FORCED = tuple(
    dict.fromkeys(where.attack for where in UNDER_ATTACK if where.attack not in WORST_OF_N)
)
OVERALL = Slice("all attacks", among=FORCED)
"""Every row of the attacks above but decoding's, which asks a prompt many times."""
CLAIM = OVERALL
BENIGN = (Slice("none"), Slice("benign_prefill"), Slice("benign_middle"))
TWINS = tuple(
    Slice(attack)
    for attack in (
        "benign_cut", "benign_late", "benign_many", "strange_suffix", "refusal_prefill",
    )
)  # fmt: skip
COSTS = (
    *(("false_backtrack_rate", where) for where in BENIGN + TWINS),
    ("over_refusal", Slice("none")),
)
QUALITY = tuple(
    (metric, Slice("middle_filling", "rl", long))
    for long in (False, True)
    for metric in (
        "x_exact",
        "over_deletion",
        "kept_prefix",
        "category_accuracy",
        "torn_seam",
        "fluent_after",
        "wasted_tokens",
    )
)
ABLATED = (
    *(
        (metric, Slice(a))
        for metric in ("asr", "leak")
        for a in ("prefilling", "deep_prefilling", "middle_filling")
    ),
    ("leak", OVERALL),
    *(("leak", Slice("late_filling", cell=(("b", b),))) for b in (8, 16)),
    *(("asr", Slice("many_violations", cell=(("violations", count),))) for count in (2, 4)),
    *(("false_backtrack_rate", where) for where in BENIGN + TWINS),
    *(
        (m, Slice("middle_filling"))
        for m in ("x_exact", "over_deletion", "kept_prefix", "category_accuracy", "torn_seam")
    ),
    *((m, Slice("middle_filling")) for m in ("fluent_after", "wasted_tokens")),
    ("useful", Slice("none")),
)


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    intro: str
    tables: tuple[str, ...]
    sentence: str


class Results:
    """What the finished pieces have measured. A stage of a group is an `Arm`,
    or None where a seed is missing."""

    def __init__(self, kept: Kept):
        self.kept = kept

    @functools.cache  # noqa: B019 (lives as long as the command)
    def arm(self, group: str, stage: str, name: str, seeds: tuple[int, ...] = ()) -> Arm | None:
        mine = [p for p in self.kept.pieces if p.group == group and (not seeds or p.seed in seeds)]
        if not mine or not all(piece.finished for piece in mine):
            return None
        return load_arm(name, {piece.seed: self.kept.folder / piece.name for piece in mine}, stage)

    def methods(self, semantics: str = "") -> list[Arm]:
        """Every finished method, in the order of training; `semantics="keep"`:
        those of the KEEP runs."""
        prefix, tail = ("keep_", " (KEEP)") if semantics == "keep" else ("", "")
        whole = "keep" if semantics == "keep" else "main"
        stages = (
            []
            if semantics == "keep"
            else [(whole, "base", "base"), (whole, "refusal_sft", "refusal_sft")]
        )
        stages += [
            (whole, "sft", "sft"),
            (whole, "sft_control", "sft_control"),
            (whole, "rlbf", "rlbf_ppo"),
        ]
        stages += [(f"{prefix}grpo", "rlbf", "rlbf_grpo")]
        arms = [self.arm(group, stage, name + tail) for group, stage, name in stages]
        return [arm for arm in arms if arm is not None]

    def ablated(self, group: str, name: str, stage: str = "rlbf") -> Arm | None:
        return self.arm(group, stage, name, self.kept.ablation_seeds)

    def about(self, group: str) -> str:
        """What a group is for, and how its configuration differs from the quickstart's."""
        piece = next(piece for piece in self.kept.pieces if piece.group == group)
        return f"`{group}`: {piece.purpose} ({piece.settings})."


def asked(arm: Arm, rows: Sequence[tuple[str, Slice]]) -> list[tuple[str, Slice]]:
    """Those of which an arm has rows: a suite need not ask every attack."""
    return [
        (metric, where)
        for metric, where in rows
        if any(within(row, where) for each in arm.rows.values() for row in each)
    ]


def compared(a: Arm, b: Arm, rows: Sequence[tuple[str, Slice]]) -> list[Compared]:
    return [Compared(metric, where, difference(a, b, where, metric)) for metric, where in rows]


# Methods ----------------------------------------------------------------------------------------


def methods(results: Results) -> Section | None:
    arms = results.methods()
    ppo, control = _named(arms, "rlbf_ppo"), _named(arms, "sft_control")
    if ppo is None or control is None:
        return None
    tables = [_means(arms, metric, UNDER_ATTACK) for metric in ("asr", "leak")]
    sentence = words.one_difference(
        ppo.name, control.name, compared(ppo, control, [("leak", CLAIM)])[0]
    )
    intro = (
        "Means over seeds; in brackets 95 % intervals (bootstrap over prompts, drawn once for all "
        "seeds; W: Wilson's)."
    )
    return Section("Under attack", intro, tuple(tables), sentence)


def _named(arms: Sequence[Arm], name: str) -> Arm | None:
    return next((arm for arm in arms if arm.name == name), None)


def _means(arms: Sequence[Arm], metric: str, rows: Sequence[Slice]) -> str:
    cells = [
        [_where(where), str(_rows(mean_over_seeds(arms[0], where, metric)))]
        + [words.mean_cell(mean_over_seeds(arm, where, metric)) for arm in arms]
        for _, where in asked(arms[0], [(metric, where) for where in rows])
    ]
    return words.table([f"{metric} on", "n", *(arm.name for arm in arms)], cells)


def _where(where: Slice) -> str:
    forced = where.attack in ("deep_prefilling", "middle_filling")
    return where.label + (" †" if forced else "")


def _rows(found: Estimate) -> int:
    return found.n


def differences(results: Results, a: str, b: str) -> Section | None:
    arms = results.methods()
    one, other = _named(arms, a), _named(arms, b)
    if one is None or other is None:
        return None
    asr, leak = (
        compared(one, other, asked(one, [(m, where) for where in (OVERALL, *UNDER_ATTACK)]))
        for m in ("asr", "leak")
    )
    rows = [[_where(x.where), *_both(x), *_both(y)] for x, y in zip(asr, leak, strict=True)]
    head = ["on", "asr", "p", "each seed", "leak", "p", "each seed"]
    sentence = words.many_differences(a, b, [*asr, *leak])
    intro = f"{a} minus {b}, paired by seed and attempt; below 0, {a} leaves less."
    return Section(f"{a} against {b}", intro, (words.table(head, rows),), sentence)


def _both(found: Compared) -> list[str]:
    e = found.estimate
    return [words.difference_cell(e), words.p_cell(e), words.seeds_cell(e)]


def costs(results: Results) -> Section | None:
    arms = results.methods()
    base, sft, ppo = (_named(arms, name) for name in ("base", "sft", "rlbf_ppo"))
    if base is None or sft is None or ppo is None:
        return None
    costly, quality = asked(ppo, COSTS), asked(ppo, QUALITY)
    rows = [
        [
            metric,
            where.label,
            *(words.mean_cell(mean_over_seeds(arm, where, metric)) for arm in arms),
        ]
        for metric, where in costly + quality
    ]
    ratios = [words.ratio_cell(perplexity_ratio(arm, base)) for arm in arms]
    rows.insert(len(costly), ["perplexity, times base", "clean answers", *ratios])
    found = compared(ppo, sft, costly + quality)
    intro = (
        "The first rows are what the ability costs where nothing is wrong; the others, how well "
        "it erases."
    )
    head = ["metric", "on", *(arm.name for arm in arms)]
    return Section(
        "Cost and quality",
        intro,
        (words.table(head, rows),),
        words.many_differences(ppo.name, sft.name, found),
    )


def semantics(results: Results) -> Section | None:
    keep, rewind = results.methods("keep"), results.methods()
    pairs = [(k, r) for k in keep for r in rewind if k.name == f"{r.name} (KEEP)"]
    if not pairs:
        return None
    rows = [("asr", where) for where in UNDER_ATTACK] + list(COSTS + QUALITY)
    rows = asked(keep[0], rows)
    found = {k.name: compared(k, r, rows) for k, r in pairs}
    cells = [
        [
            metric,
            _where(where),
            *(words.difference_cell(found[k.name][i].estimate) for k, _ in pairs),
        ]
        for i, (metric, where) in enumerate(rows)
    ]
    head = ["metric", "on", *(r.name for _, r in pairs)]
    absolute = _means(keep, "asr", UNDER_ATTACK)
    sentence = words.changes([(f"KEEP, {r.name}", found[k.name]) for k, r in pairs])
    intro = "First asr under KEEP, then KEEP minus REWIND: same data, same base, same attempts."
    return Section("KEEP against REWIND", intro, (absolute, words.table(head, cells)), sentence)


# Ablations --------------------------------------------------------------------------------------


def ablation(
    results: Results, title: str, groups: Sequence[str], intro: str = "", stage: str = "rlbf"
) -> Section | None:
    """The finished variants among `groups`, held against the same stage of the quickstart."""
    main = results.ablated("main", "as it is", stage)
    variants = [(g, arm) for g in groups if (arm := results.ablated(g, g, stage)) is not None]
    if main is None or not variants:
        return None
    ablated = asked(main, ABLATED)
    found = {group: compared(arm, main, ablated) for group, arm in variants}
    ratios = {group: perplexity_ratio(arm, main) for group, arm in variants}
    rows = []
    for i, (metric, where) in enumerate(ablated):
        cells = [words.mean_cell(mean_over_seeds(main, where, metric))]
        for group, arm in variants:
            cells += [words.number(mean_over_seeds(arm, where, metric).value)]
            cells += [words.difference_cell(found[group][i].estimate)]
        rows.append([metric, _where(where), *cells])
    cells = [words.ratio_cell(ratios[group]) for group, _ in variants]
    rows.append(
        ["perplexity, times as it is", "clean answers", "1", *(c for r in cells for c in ("", r))]
    )
    head = [
        "metric",
        "on",
        "as it is",
        *(c for group, _ in variants for c in (group, "difference")),
    ]
    described = [results.about(group) for group, _ in variants]
    sentence = words.changes(
        [
            (group, [*found[group], words.relative_perplexity(ratios[group])])
            for group, _ in variants
        ]
    )
    return Section(
        title,
        " ".join([*([intro] if intro else []), *described]),
        (words.table(head, rows),),
        sentence,
    )


@dataclasses.dataclass(frozen=True)
class BiasPoint:
    bias: float
    asr: Estimate
    leak: Estimate
    false_backtracks: tuple[Estimate, ...]
    """On none, benign_prefill, benign_middle."""

    @property
    def false_mean(self) -> float:
        return sum(e.value for e in self.false_backtracks) / len(self.false_backtracks)


def bias_points(results: Results) -> list[BiasPoint]:
    """Measured points in order of the bias, 0 among them; empty if none but 0 is there."""
    arms = {bias: results.ablated(bias_group(bias), bias_group(bias)) for bias in BIASES}
    arms[0.0] = results.ablated(bias_group(0.0), "0") or results.ablated("main", "as it is")
    there = {bias: arm for bias, arm in sorted(arms.items()) if arm is not None}
    if len(there) < 2 or 0.0 not in there:
        return []
    return [
        BiasPoint(
            bias,
            mean_over_seeds(arm, Slice("middle_filling"), "asr"),
            mean_over_seeds(arm, Slice("middle_filling"), "leak"),
            tuple(mean_over_seeds(arm, where, "false_backtrack_rate") for where in BENIGN),
        )
        for bias, arm in there.items()
    ]


def _bias(point: BiasPoint) -> str:
    return f"{point.bias:+g}".replace("-", "−") if point.bias else "0"


def bias_sweep(points: Sequence[BiasPoint], picture: str) -> Section | None:
    if not points:
        return None
    rows = [[_bias(p), *map(words.mean_cell, (p.asr, p.leak, *p.false_backtracks))] for p in points]
    head = ["bias", "asr, middle filling †", "leak, middle filling †"]
    head += [f"false backtracks, {where.attack.replace('_', ' ')}" for where in BENIGN]
    first, here, last = points[0], next(p for p in points if p.bias == 0), points[-1]
    sentence = (
        f"From {_bias(first)} over 0 to {_bias(last)}, asr on middle filling goes from "
        f"{number(first.asr.value)} "
        f"over {number(here.asr.value)} to {number(last.asr.value)}, and false backtracks (mean "
        "of the three columns) "
        f"from {number(first.false_mean)} over {number(here.false_mean)} to "
        f"{number(last.false_mean)}."
    )
    intro = (
        "What is added to the logits of all categories when sampling; no "
        f"training.\n\n![Trade-off]({picture})"
    )
    return Section("Bias on categories", intro, (words.table(head, rows),), sentence)
