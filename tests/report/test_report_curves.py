"""What the further plots show: errors of X, times, trade-off points,
panels of reinforcement; and their words."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.report import curves as report_curves
from rlbf_jax.report import document as report
from tests.report_runs import made_up_row, write_run


def row_with(prefix, bridge, span, late, x, **more):
    content = [{"text": "a", "kind": "content", "erased": False, "forced": True}] * (
        prefix + bridge + span + late
    )
    control = [
        {"text": "[X]", "kind": kind, "erased": False, "forced": False}
        for kind in ("category", "retraction")
    ]
    return {
        "forced_parts": {"prefix": prefix, "bridge": bridge, "span": span, "tail": 0},
        "violation": "v",
        "edits": [{"x": x}],
        "trace": [*content, *control, *content],
        **more,
    }


@given(*[st.integers(0, 5)] * 4, st.integers(1, 30))
def test_x_error_is_the_distance_to_the_nearer_exact_x(prefix, bridge, span, late, x):
    error = report_curves.x_error(row_with(prefix, bridge, span + 1, late, x))
    visible = prefix + bridge + span + 1 + late
    starts = (prefix, prefix + bridge)
    assert abs(error) == min(abs(visible - x - start) for start in starts)
    exact = visible - x in starts  # as x_exact has it: the first removed id is one of the two
    assert (error == 0) == exact
    if x > visible - prefix:
        assert error > 0
    if x < visible - prefix - bridge:
        assert error < 0


def test_rows_without_an_x_have_no_error():
    assert report_curves.x_error(row_with(2, 1, 3, 0, 4)) == 0
    for row in (
        row_with(2, 1, 0, 0, 4),
        row_with(2, 1, 3, 0, None),
        row_with(2, 1, 3, 0, 4, edits=[]),
        row_with(2, 1, 3, 0, 4, violation=None),
        made_up_row(),
        {},
    ):
        assert report_curves.x_error(row) is None


def test_times_count_what_was_never_corrected():
    rows = [
        {"metrics": m}
        for m in ({"corrected": 1.0, "time_to_correction": 3.0}, {"corrected": 0.0}, {"asr": 1.0})
    ]
    assert report_curves.correction_times([*rows, {}]) == [3.0, math.inf]


def test_panels_of_reinforcement_only_where_there_is_a_reward():
    rows = [
        {"step": s, "reward": s / 9, "safe": 1.0, "kl_control": s, "backtrack_rate": s, "x": s}
        for s in range(4)
    ]
    assert report_curves.reinforcement_names(rows) == ["reward", "backtrack_rate", "kl_control"]
    assert report_curves.reinforcement_names([{"step": s, "nll": s} for s in range(4)]) == []


def interval(value):
    return {"value": value, "low": max(0, value - 0.1), "high": min(1, value + 0.1), "n": 40}


def curve():
    points = [
        {
            "bias": b,
            "harmful": {"asr": interval(0.4 - b / 20)},
            "benign": {"false_backtrack_rate": interval(0.2 + b / 50)},
        }
        for b in (8.0, -8.0, 0.0)
    ]
    return {"data": "test", "points": [*points, {"bias": 1.0, "harmful": {}, "benign": {}}]}


def test_figures_of_a_run_with_everything(tmp_path):
    rows = [row_with(2, 1, 3, 0, x) for x in (3, 4, 4, 6)]
    times = [
        {"corrected": 1.0, "time_to_correction": 2.0},
        {"corrected": 0.0, "time_to_correction": None},
    ]
    rows = [made_up_row(**row, metrics=times[i % 2]) for i, row in enumerate(rows)]
    write_run(tmp_path, rows)
    (tmp_path / "evaluation" / "tradeoff_rlbf.json").write_text(json.dumps(curve()))
    report.write_report(tmp_path)
    built = report.build_report(report.read_run(tmp_path))
    figures = {figure.name: figure for figure in built.figures}
    assert list(figures) == [
        "overview",
        "tradeoff",
        "x_error",
        "correction_time",
        "training_rlbf",
        "training_base",
    ]
    assert (
        "rlbf: from bias -8 to 8, asr goes from 0.80 to 0.00 and false backtracks from 0.04 to 0.36"
        in (figures["tradeoff"].alt)
    )
    assert "Test data, 40 harmful attempts a dot." in figures["tradeoff"].caption
    assert "rlbf 75 % exact, 0 % too short, 25 % too long" in figures["x_error"].alt
    assert "in the end: rlbf 50 %" in figures["correction_time"].alt
    assert (
        "reward" in figures["training_rlbf"].alt
        and "kl_content" in figures["training_rlbf"].caption
    )
    page, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    for name in figures:
        assert (tmp_path / "plots" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert f"(plots/{name}.png)" in markdown
    assert page.count("<img ") == page.count('alt="') == len(figures)


def test_a_damaged_curve_is_named(tmp_path):
    write_run(tmp_path)
    (tmp_path / "evaluation" / "tradeoff_rlbf.json").write_text("[1")
    report.write_report(tmp_path)
    assert "tradeoff_rlbf.json is not JSON" in (tmp_path / "report.md").read_text().replace(
        "\\", ""
    )


@pytest.mark.parametrize("values", [[1.0], list(np.linspace(0, 1, 40))])
def test_plots_of_little_and_of_much(values):
    rows = [{"step": i, "reward": v} for i, v in enumerate(values)]
    colors = {"a": "#0072b2", "b": "#e69f00"}
    png = report_curves.overlay_plot({"a": rows, "b": rows[:1]}, ["reward"], colors)
    assert png[:4] == b"\x89PNG"
    assert report_curves.x_error_plot({"a": [-99, 0, 99]}, colors)[:4] == b"\x89PNG"
    assert report_curves.time_plot({"a": [math.inf, 0.0]}, colors)[:4] == b"\x89PNG"
