"""Plots of the report: PNG bytes from plain numbers."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import (
    Figure,  # without pyplot: no display needed, and a notebook's backend stays as it is
)
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

STAGE_COLORS = {
    "base": "#6b7280",
    "refusal_sft": "#e69f00",
    "sft": "#56b4e9",
    "sft_control": "#0072b2",
}
"""Okabe and Ito's colors, told apart by readers who see fewer colors."""
_MORE_COLORS = ("#009e73", "#cc79a7", "#d55e00", "#8c6bb1", "#a6761d")
"""Of stages with names of their own, in their order."""
_PREFERRED = (
    "reward",
    "asr",
    "safe",
    "needed",
    "kl",
    "loss",
    "entropy",
    "retract",
    "backtrack",
    "clip",
    "value",
    "grad",
    "perplexity",
)
_LEFT_OUT = ("learning_rate", "tokens_seen")


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar: a rate with its interval, and optionally its strict version as a mark."""

    value: float
    low: float | None = None
    high: float | None = None
    mark: float | None = None


def palette(stages: Iterable[str]) -> dict[str, str]:
    """stage -> color; the same stages in the same order have the same colors."""
    names = list(dict.fromkeys(stages))
    others = [stage for stage in names if stage not in STAGE_COLORS]
    more = {stage: _MORE_COLORS[i % len(_MORE_COLORS)] for i, stage in enumerate(others)}
    return {stage: STAGE_COLORS.get(stage) or more[stage] for stage in names}


def bar_plot(
    panels: Sequence[tuple[str, Mapping[str, Mapping[str, Bar]]]],
    mark_name: str = "leak",
    colors: Mapping[str, str] | None = None,
) -> bytes:
    """Grouped bars of rates. `panels`: (title, {group: {stage: Bar}});
    whiskers are intervals, diamonds are `mark`.

    `colors`: of the stages, if not their usual ones.
    """
    sizes = [max(1, len(groups)) for _, groups in panels]
    figure = Figure(figsize=(11.5, 3.7), layout="constrained")
    axes = figure.subplots(1, len(panels), width_ratios=sizes, sharey=True, squeeze=False)
    stages = list(
        dict.fromkeys(stage for _, groups in panels for bars in groups.values() for stage in bars)
    )
    colors = colors or palette(stages)
    marked = False
    for axis, (title, groups) in zip(axes[0], panels, strict=True):
        for place, bars in enumerate(groups.values()):
            for stage, bar in bars.items():
                marked |= bar.mark is not None
                x = place + (stages.index(stage) - (len(stages) - 1) / 2) * 0.8 / len(stages)
                _draw_bar(axis, x, 0.74 / len(stages), bar, colors[stage])
        axis.set_xticks(range(len(groups)), list(groups), fontsize=9)
        axis.set_title(title, fontsize=11, loc="left")
        tidy(axis)
        axis.set_ylim(0, 1.08)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    handles: list[Any] = [Patch(color=colors[s]) for s in stages]
    labels = list(stages)
    if marked:
        handles.append(Line2D([], [], marker="D", ls="", mfc="white", mec="#111827", ms=5))
        labels.append(mark_name)
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(7, len(labels)),
        frameon=False,
        fontsize=9,
    )
    return png(figure)


def _draw_bar(axis, x: float, width: float, bar: Bar, color: str) -> None:
    # A rate of zero still gets a sliver, or it would look like a missing bar.
    axis.bar(x, max(bar.value, 0.006), width, color=color, zorder=2)
    if bar.low is not None and bar.high is not None:
        below, above = max(0.0, bar.value - bar.low), max(0.0, bar.high - bar.value)
        axis.errorbar(
            x, bar.value, [[below], [above]], color="#374151", lw=0.9, capsize=2, zorder=3
        )
    if bar.mark is not None:
        axis.plot(x, bar.mark, "D", mfc="white", mec="#111827", ms=4.5, zorder=4, clip_on=False)


def curve_names(rows: Sequence[Mapping[str, Any]], most: int = 9) -> list[str]:
    """Metrics worth a curve: numeric ones that move, the telling names first."""
    names = dict.fromkeys(k for row in rows for k, v in row.items() if k != "step" and is_number(v))
    moving = [
        n
        for n in names
        if len({row[n] for row in rows if is_number(row.get(n))}) > 1 and n not in _LEFT_OUT
    ]

    def rank(name: str) -> int:
        return next(
            (i for i, word in enumerate(_PREFERRED) if word in name.lower()), len(_PREFERRED)
        )

    return sorted(moving, key=rank)[:most]


def smoothed(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Centered running mean over about `share` of the values, narrower at both ends
    so that it stays centered."""
    half = max(1, round(len(values) * share))
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        means.append(sum(window) / len(window))
    return means


def is_number(value: Any) -> bool:
    """Whether a plot can show it: a finite number, not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def tidy(axis) -> None:
    """No box, faint grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#9ca3af")
    axis.tick_params(colors="#374151", labelsize=9)
    axis.grid(axis="y", color="#e5e7eb", lw=0.8, zorder=0)
    axis.set_axisbelow(True)


def png(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
