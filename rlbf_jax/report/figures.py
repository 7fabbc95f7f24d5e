"""The figures of a report: a PNG each, with the words that go with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from rlbf_jax.report import curves, plots, tables
from rlbf_jax.report.files import RunFiles
from rlbf_jax.report.values import HARMLESS, Key, Value, attack_rows

OVERVIEW_ALT = (
    "Bars: violations left under attack and false backtracks, a bar for each stage. The tables "
    "give the numbers."
)
X_ERROR_CAPTION = (
    "Of the first directive of every row with a forced violation: the requested X minus the exact "
    "X, in ids. Two X are "
    "exact, back to the start of the violation and back to the start of its bridge; the error is "
    "that to the nearer "
    "one, so 0 is what x_exact counts. Below 0 violating words stay, above 0 benign words go."
)
TIME_CAPTION = (
    "Share of the rows with a violation in which a directive has taken it back, at least in part, "
    "within so many ids "
    "after its end (time_to_correction). Rows never corrected count too, so the curves need not "
    "reach 1."
)
TRADEOFF_CAPTION = (
    "The bias is added to the logits of the ids that begin a directive: the one knob that a user "
    "of a finished model has. Left: asr of all harmful attempts (solid) and false backtracks of "
    "all benign ones (dashed), shaded their 95 % intervals (Wilson's with one row a "
    "prompt or where all are alike, else by bootstrap over prompts). "
    "Right: one against the other, a dot a bias; better is lower left."
)
REINFORCEMENT_CAPTION = (
    "Means over a step's rollouts, thin, and smoothed, thick. safe: final text without violation; "
    "backtrack_rate: with "
    "a directive; needed: of those, the ones that took back a violation; emitted: ids sampled a "
    "rollout; kl_content, "
    "kl_control: to the reference, for words and for control tokens; unjudged: the critic could "
    "not say."
)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot and its words."""

    name: str
    """Of the file: `plots/<name>.png`."""
    title: str
    alt: str
    png: bytes
    caption: str = ""
    folded: bool = False
    """Shown closed in HTML."""


def figures(
    run: RunFiles,
    values: Mapping[Key, Value],
    columns: Sequence[str],
    colors: Mapping[str, str],
) -> list[Figure]:
    """Those that the run has data for: `overview`, `tradeoff`, `x_error`, `correction_time`,
    `training_<stage>`. `colors`: of the columns and of every stage of `run.drawn`."""
    drawn = [overview(values, columns, colors), tradeoff(run.tradeoffs, colors)]
    drawn += [x_error(run.rows, colors), correction_time(run.rows, colors)]
    drawn += training(run, colors)
    return [figure for figure in drawn if figure is not None]


def overview(
    values: Mapping[Key, Value], columns: Sequence[str], colors: Mapping[str, str] | None = None
) -> Figure | None:
    """Bars of asr with leak, and of false backtracks; None where neither was measured."""

    def groups(
        pairs: Sequence[tuple[str, str]], metric: str, mark: str
    ) -> dict[str, dict[str, plots.Bar]]:
        bars: dict[str, dict[str, plots.Bar]] = {}
        for attack, split in pairs:
            for column in columns:
                if value := values.get((column, attack, split, metric)):
                    leak = values.get((column, attack, split, mark))
                    bar = plots.Bar(
                        value.value, value.low, value.high, leak.value if leak else None
                    )
                    label = attack.replace("_", "\n") + (f"\n{split}" if split != "all" else "")
                    bars.setdefault(label, {})[column] = bar
        return bars

    attacked = [
        p
        for p in attack_rows(values, ("asr",))
        if p[0] in ("direct", "prefilling", "middle_filling")
    ]
    harmless = [p for p in attack_rows(values, ("false_backtrack_rate",)) if p[0] in HARMLESS]
    panels = [("Violation left in the final text (asr)", groups(attacked, "asr", "leak"))]
    panels.append(("False backtracks", groups(harmless, "false_backtrack_rate", "")))
    panels = [panel for panel in panels if panel[1]]
    return (
        Figure("overview", "Overview", OVERVIEW_ALT, plots.bar_plot(panels, colors=colors))
        if panels
        else None
    )


def tradeoff(tradeoffs: Mapping[str, Mapping], colors: Mapping[str, str]) -> Figure | None:
    """Curves of `tradeoff_<stage>.json` files by label."""
    points = {
        label: curve_points
        for label, curve in tradeoffs.items()
        if (curve_points := curves.tradeoff_points(curve))
    }
    if not points:
        return None
    ends = []
    for label, curve_points in points.items():
        (first, bad0, good0), (last, bad1, good1) = curve_points[0], curve_points[-1]
        ends.append(
            f"{label}: from bias {first:g} to {last:g}, asr goes from {bad0['value']:.2f} to "
            f"{bad1['value']:.2f} and "
            f"false backtracks from {good0['value']:.2f} to {good1['value']:.2f}"
        )
    pools = sorted({str(tradeoffs[label].get("data")) for label in points})
    counts = [int(curve_points[0][1].get("n") or 0) for curve_points in points.values()]
    caption = (
        f"{TRADEOFF_CAPTION} {' and '.join(pools).capitalize()} data, {tables.counts(counts)} "
        "harmful attempts a dot."
    )
    png = curves.tradeoff_plot(points, colors)
    return Figure(
        "tradeoff", "Trade-off", "Trade-off curves. " + "; ".join(ends) + ".", png, caption
    )


def x_error(rows: Mapping[str, Sequence], colors: Mapping[str, str]) -> Figure | None:
    """Histogram of the errors of X, the series of `rows` overlaid."""
    errors = {label: values for label, lines in rows.items() if (values := curves.x_errors(lines))}
    if not errors:
        return None
    shares = []
    for label, values in errors.items():
        exact, short = (
            100 * sum(hits) / len(values)
            for hits in ([e == 0 for e in values], [e < 0 for e in values])
        )
        shares.append(
            f"{label} {exact:.0f} % exact, {short:.0f} % too short, {100 - exact - short:.0f} % "
            "too long"
        )
    alt = "Histogram of requested minus exact X: " + "; ".join(shares) + "."
    return Figure(
        "x_error", "Where directives cut", alt, curves.x_error_plot(errors, colors), X_ERROR_CAPTION
    )


def correction_time(rows: Mapping[str, Sequence], colors: Mapping[str, str]) -> Figure | None:
    """Share corrected over ids; None where no row says when it was corrected."""
    times = {
        label: values for label, lines in rows.items() if (values := curves.correction_times(lines))
    }
    times = {
        label: values for label, values in times.items() if any(math.isfinite(t) for t in values)
    }
    if not times:
        return None
    shares = [
        f"{label} {100 * sum(math.isfinite(t) for t in values) / len(values):.0f} %"
        for label, values in times.items()
    ]
    alt = (
        "Curves of the share of violations corrected over ids since their end; in the end: "
        + ", ".join(shares)
        + "."
    )
    return Figure(
        "correction_time", "Time to correction", alt, curves.time_plot(times, colors), TIME_CAPTION
    )


def training(run: RunFiles, colors: Mapping[str, str]) -> list[Figure]:
    """One figure a stage that has logged something that moves;
    the last stage's open, the others folded."""
    shown: list[Figure] = []
    for stage, rows in reversed(list(run.metrics.items())):
        reinforced = curves.reinforcement_names(rows)
        names = reinforced or plots.curve_names(rows)
        if not names:
            continue
        drawn = curves.overlay_plot({stage: rows}, names, colors)
        alt = f"Training curves of {stage} over {len(rows):,} logged steps: {', '.join(names)}."
        words = REINFORCEMENT_CAPTION if reinforced else ""
        shown.append(
            Figure(f"training_{stage}", f"Training: {stage}", alt, drawn, words, folded=bool(shown))
        )
    return shown
