"""What the report's further plots show, from rows and files of a run, and the plots themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from rlbf_jax.report.plots import is_number, png, smoothed, tidy

Row = Mapping[str, Any]
X_ERROR_LIMIT = 12
"""Larger errors share the outermost bars."""
REINFORCEMENT = (
    "reward",
    "safe",
    "backtrack_rate",
    "needed",
    "kl_content",
    "kl_control",
    "kl",
    "emitted",
    "entropy",
    "coherent",
    "useful",
    "unjudged",
    "grad_norm",
    "value",
)
"""Metrics of a reinforcement stage, the telling ones first."""


def x_error(row: Row) -> int | None:
    """Requested X minus the exact X of a row's first directive, in ids; None where there is no
    forced violation, no directive, or no X (a reset).

    Two X are exact: back to the start of the forced violation, and back to the start of its bridge;
    the error is that to the nearer one. Positive: it erases too many. 0 just where `x_exact` is 1.
    """
    parts, edits = row.get("forced_parts") or {}, row.get("edits") or []
    if (
        not parts.get("span")
        or row.get("violation") is None
        or not edits
        or edits[0].get("x") is None
    ):
        return None
    visible = 0
    for piece in row.get("trace") or []:
        if piece["kind"] == "retraction":
            break
        visible += piece["kind"] == "content"
    requested = int(edits[0]["x"])
    return min(
        (
            requested - (visible - begin)
            for begin in (parts["prefix"] + parts["bridge"], parts["prefix"])
        ),
        key=abs,
    )


def x_errors(rows: Sequence[Row]) -> list[int]:
    """`x_error` of the rows that have one."""
    return [error for row in rows if (error := x_error(row)) is not None]


def correction_times(rows: Sequence[Row]) -> list[float]:
    """`time_to_correction` of every row with a violation, infinite where nothing took it back."""
    metrics = [row.get("metrics") or {} for row in rows]
    return [
        math.inf if m.get("time_to_correction") is None else float(m["time_to_correction"])
        for m in metrics
        if m.get("corrected") is not None
    ]


def x_error_plot(errors: Mapping[str, Sequence[int]], colors: Mapping[str, str]) -> bytes:
    """Overlaid histograms of errors, as shares of each series, which has at least one."""
    figure = Figure(figsize=(11.5, 3.4), layout="constrained")
    axis = figure.subplots()
    places = range(-X_ERROR_LIMIT, X_ERROR_LIMIT + 1)
    width = 0.84 / len(errors)
    for i, (label, values) in enumerate(errors.items()):
        cut = [max(-X_ERROR_LIMIT, min(X_ERROR_LIMIT, error)) for error in values]
        heights = [cut.count(place) / len(cut) for place in places]
        shift = (i - (len(errors) - 1) / 2) * width
        exact = cut.count(0) / len(cut)
        named = f"{label} (n = {len(values):,}, {100 * exact:.0f} % exact)"
        axis.bar(
            [p + shift for p in places], heights, width, color=colors[label], label=named, zorder=2
        )
    ticks = range(-X_ERROR_LIMIT, X_ERROR_LIMIT + 1, 4)
    axis.set_xticks(ticks, [_signed(t) for t in ticks])
    axis.set_xlabel(
        "requested X minus exact X (ids):  < 0 erases too few,  > 0 too many", fontsize=9
    )
    axis.set_ylabel("share of rows", fontsize=9)
    axis.legend(frameon=False, fontsize=9)
    tidy(axis)
    return png(figure)


def _signed(place: int) -> str:
    if abs(place) == X_ERROR_LIMIT:
        return f"≤ −{X_ERROR_LIMIT}" if place < 0 else f"≥ {X_ERROR_LIMIT}"
    return str(place).replace("-", "−")


def time_plot(times: Mapping[str, Sequence[float]], colors: Mapping[str, str]) -> bytes:
    """Share of violations corrected within t ids, over t; each series has at least one time."""
    figure = Figure(figsize=(11.5, 3.2), layout="constrained")
    axis = figure.subplots()
    last = max([t for values in times.values() for t in values if math.isfinite(t)], default=0)
    for label, values in times.items():
        done = sorted(t for t in values if math.isfinite(t))
        xs = [0.0, *done, last + 1]
        ys = [0.0, *[(i + 1) / len(values) for i in range(len(done))], len(done) / len(values)]
        named = f"{label} (n = {len(values):,}, {100 * len(done) / len(values):.0f} % in the end)"
        axis.step(xs, ys, where="post", color=colors[label], lw=1.8, label=named)
    axis.set_ylim(0, 1.03)
    axis.set_xlim(left=0)
    axis.set_xlabel("ids between the end of the violation and the directive", fontsize=9)
    axis.set_ylabel("share corrected", fontsize=9)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    tidy(axis)
    return png(figure)


def tradeoff_points(curve: Mapping[str, Any]) -> list[tuple[float, Row, Row]]:
    """(bias, asr, false backtracks) of a `tradeoff_<stage>.json`, by bias;
    points without both are left out."""
    points = []
    for point in curve.get("points") or []:
        bad, good = (
            (point.get("harmful") or {}).get("asr"),
            (point.get("benign") or {}).get("false_backtrack_rate"),
        )
        if (
            bad
            and good
            and all(
                is_number(side.get(k)) for side in (bad, good) for k in ("value", "low", "high")
            )
        ):
            points.append((float(point["bias"]), bad, good))
    return sorted(points, key=lambda point: point[0])


def tradeoff_plot(
    curves: Mapping[str, Sequence[tuple[float, Row, Row]]], colors: Mapping[str, str]
) -> bytes:
    """Left: asr (solid) and false backtracks (dashed) over the bias. Right: one against the other,
    a dot a bias."""
    figure = Figure(figsize=(11.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, points in curves.items():
        color, biases = colors[label], [p[0] for p in points]
        for rates, style in (([p[1] for p in points], "-"), ([p[2] for p in points], "--")):
            left.plot(
                biases, [t["value"] for t in rates], style, color=color, lw=1.8, marker="o", ms=3.5
            )
            left.fill_between(
                biases,
                [t["low"] for t in rates],
                [t["high"] for t in rates],
                color=color,
                alpha=0.12,
                lw=0,
            )
        xs, ys = [p[2]["value"] for p in points], [p[1]["value"] for p in points]
        bars = _bars([p[1] for p in points]), _bars([p[2] for p in points])
        right.errorbar(xs, ys, *bars, color=color, ls="", elinewidth=0.8, alpha=0.4)
        right.plot(xs, ys, color=color, lw=1.8, marker="o", ms=4)
        right.plot([], [], color=color, marker="o", label=label)
        for i in {0, len(points) - 1} | {i for i, p in enumerate(points) if p[0] == 0}:
            text = f"{points[i][0]:+g}".replace("-", "−") if points[i][0] else "0"
            right.annotate(
                text, (xs[i], ys[i]), (5, 5), textcoords="offset points", fontsize=8, color=color
            )
    left.plot([], [], "-", color="#374151", label="asr, harmful")
    left.plot([], [], "--", color="#374151", label="false backtracks, benign")
    left.set_xlabel("bias on the logits of a directive's first ids", fontsize=9)
    right.set_xlabel("false backtracks on benign attempts", fontsize=9)
    right.set_ylabel("asr on harmful attempts", fontsize=9)
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=9)
        axis.set_ylim(-0.02, 1.02 if axis is left else None)
        tidy(axis)
    right.set_xlim(left=-0.02)
    return png(figure)


def _bars(rates: Sequence[Row]) -> list[list[float]]:
    """Lengths below and above the values, as matplotlib wants them."""
    below = [max(0.0, t["value"] - t["low"]) for t in rates]
    return [below, [max(0.0, t["high"] - t["value"]) for t in rates]]


def reinforcement_names(rows: Sequence[Row]) -> list[str]:
    """Metrics worth a panel of a stage that logs a reward; none where it does not."""
    if not any(is_number(row.get("reward")) for row in rows):
        return []
    return [n for n in REINFORCEMENT if len({row[n] for row in rows if is_number(row.get(n))}) > 1][
        :12
    ]


def overlay_plot(
    series: Mapping[str, Sequence[Row]], names: Sequence[str], colors: Mapping[str, str]
) -> bytes:
    """Small multiples: one panel a metric over steps, thin where raw,
    thick where smoothed, a line a series."""
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(11.5, 2.3 * lines + 0.4), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharex=True).flat)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes, names, strict=False):
        for label, rows in series.items():
            points = [
                (row["step"], float(row[name]))
                for row in rows
                if is_number(row.get(name)) and "step" in row
            ]
            steps, values = [p[0] for p in points], [p[1] for p in points]
            axis.plot(
                steps, values, color=colors[label], lw=0.8, alpha=0.4 if len(series) == 1 else 0.25
            )
            axis.plot(
                steps,
                smoothed(values),
                color=colors[label],
                lw=1.8,
                marker="o" if len(values) < 12 else "",
                ms=3,
            )
        axis.set_title(name, fontsize=10, loc="left")
        axis.tick_params(labelbottom=True)
        axis.margins(x=0.02)
        tidy(axis)
    if len(series) > 1:
        for label in series:
            axes[0].plot([], [], color=colors[label], label=label)
        figure.legend(
            loc="outside lower center", ncols=min(4, len(series)), frameon=False, fontsize=9
        )
    return png(figure)
