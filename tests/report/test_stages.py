"""The report shows the stages that a run has, in its order, whatever the recipe."""

import dataclasses
import json

import pytest

from rlbf_jax.report import document, plots
from rlbf_jax.report.compare import build_comparison
from rlbf_jax.report.files import read_run
from rlbf_jax.report.stages import KNOWN, Stages, merged, stages_of
from tests.report_runs import STAGES, made_up_row, record

ERPO = ("base", "erpo_sft", "erpo")


def write_run(folder, stages, manifest=None):
    """A run whose last stage is the safest."""
    (folder / "evaluation").mkdir(parents=True)
    records = []
    for i, stage in enumerate(stages):
        for metric in ("asr", "leak"):
            records.append(record(stage, "prefilling", "all", metric, 0.9 - i / 10))
        records.append(record(stage, "benign_prefill", "all", "false_backtrack_rate", 0.1))
        records.append(record(stage, "none", "all", "perplexity", 2.0 + i))
        rows = [made_up_row(stage=stage, attack="prefilling")]
        path = folder / "evaluation" / f"{stage}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(json.dumps(records))
    (folder / "manifest.json").write_text(json.dumps(manifest or {}))
    return folder


def names(records):
    return [{"stage": stage} for stage in records]


@pytest.mark.parametrize(
    ("appearing", "others", "order"),
    [
        (STAGES, (), STAGES),
        (ERPO, (), ERPO),
        (("b", "a", "base"), (), ("base", "b", "a")),
        (("x", "sft", "base"), (), ("base", "sft", "x")),
        ((), ("a", "sft", "base"), ("base", "sft", "a")),
        (("base", "b"), ("a", "b", "sft"), ("base", "sft", "b", "a")),
        ((), (), ()),
    ],
)
def test_order_without_a_list(appearing, others, order):
    assert stages_of({}, names(appearing), others).order == tuple(order)


def test_a_manifest_says_order_labels_and_headline():
    listed = [
        {"name": "erpo", "label": "ERPO", "headline": True},
        {"name": "base", "label": "", "headline": False},
        {"name": "sft", "headline": "yes"},
        {"label": "nameless"},
        "damaged",
    ]
    stages = stages_of({"stages": listed}, names(["base", "late", "erpo"]), ["sft_control"])
    assert stages.order == ("erpo", "base", "sft", "late", "sft_control")
    assert stages.main(["base", "sft", "erpo"]) == ["erpo"]
    assert [stages.label(c) for c in ("erpo", "erpo (x)", "erpo · run", "base")] == [
        "ERPO",
        "ERPO (x)",
        "ERPO · run",
        "base",
    ]
    for damaged in ("base", {"name": "base"}, None, [1]):
        assert stages_of({"stages": damaged}, names(ERPO)).order == ERPO


@pytest.mark.parametrize(
    ("columns", "main"),
    [
        (list(STAGES), ["base", "sft", "rlbf"]),
        (list(ERPO), ["base", "erpo"]),
        (["base", "sft", "a (x)", "a (y)"], ["base", "sft", "a (x)", "a (y)"]),
        (["base"], ["base"]),
        ([], []),
    ],
)
def test_the_headline_is_first_and_last_with_sft_between(columns, main):
    assert Stages().main(columns) == main


def test_another_recipe_has_its_headline_and_its_order(tmp_path):
    run = read_run(write_run(tmp_path / "run", ERPO))
    report = document.build_report(run)
    assert [[e.stage for e in tile.entries] for tile in report.tiles] == [["base", "erpo"]] * 4
    assert [e.text for e in report.tiles[0].entries] == ["0.90", "0.70"]
    assert report.tables[0].columns == ("attack", "split", "n", *ERPO)
    assert list(run.rows) == list(ERPO) and report.gallery_stage == "erpo"
    assert "by base and 70 % by erpo" in report.summary[0]
    colors = [e.color for e in report.tiles[0].entries]
    assert len(set(colors)) == 2 and all(colors)


def test_marked_and_labelled_stages_reach_both_renderings(tmp_path):
    listed = [
        {"name": "base", "label": "untrained", "headline": True},
        {"name": "erpo_sft", "label": "warm start", "headline": True},
        {"name": "erpo", "label": "ERPO", "headline": False},
    ]
    folder = write_run(tmp_path / "run", ERPO, {"stages": listed})
    document.write_report(folder)
    report = document.build_report(read_run(folder))
    assert [e.stage for e in report.tiles[0].entries] == ["untrained", "warm start"]
    assert report.tables[0].columns[3:] == ("untrained", "warm start", "ERPO")
    for name in ("report.md", "report.html"):
        assert "warm start" in (folder / name).read_text()


def test_runs_of_two_recipes_stand_side_by_side(tmp_path):
    runs = [
        dataclasses.replace(read_run(write_run(tmp_path / name, stages)), name=name)
        for name, stages in (("a", ("base", "x")), ("b", ("base", "sft", "x", "y")))
    ]
    comparison = build_comparison(runs, {})
    assert [e.stage for e in comparison.tiles[0].entries] == ["x · a", "y · b"]
    order = [c for c in comparison.tables[-1].columns if " · b" in c]
    assert order == ["base · b", "sft · b", "x · b", "y · b"][-len(order) :]


def test_orders_are_merged_without_breaking_any():
    assert merged([("base", "rlbf"), ("base", "sft", "rlbf")]) == ["base", "sft", "rlbf"]
    assert merged([("a", "b"), ("c", "b", "d"), ()]) == ["c", "a", "b", "d"]
    assert merged([]) == []


def test_colors_are_of_places_not_of_names():
    colors = plots.palette(["base", "erpo_sft", "sft", "erpo", "erpo"])
    assert len(set(colors.values())) == 4 == len(colors)
    assert plots.palette(["rlbf"]) == {"rlbf": "#009e73"}
    assert set(KNOWN) == set(plots.STAGE_COLORS)
    many = plots.palette(map(str, range(40)))
    assert len(many) == 40 and all(many.values())
