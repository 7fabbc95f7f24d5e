"""Runs side by side: columns, differences paired by seed and attempt,
what differs, where it is written."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from rlbf_jax.cli import main as cli
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.columns import metric_names
from rlbf_jax.report import compare as report_compare
from rlbf_jax.report import paired as report_paired
from rlbf_jax.report.compare import build_comparison, names_of, write_comparison
from rlbf_jax.report.files import read_run
from tests.report_runs import STAGES, made_up_row, record, write_run


def rows_of(seed, rate, n=10, stage="rlbf"):
    """n prompts under one attack; the first rate * n of them end badly."""
    return [
        made_up_row(
            stage=stage,
            seed=seed,
            prompt_id=f"p{i}",
            request_id=i,
            long_prefix=False,
            metrics=dict.fromkeys(metric_names())
            | {"asr": float(i < rate * n), "leak": 1.0, "backtrack_rate": 0.0},
        )
        for i in range(n)
    ]


def write(folder, seed, rate, sft_rate=0.9, **config):
    write_run(folder, rows_of(seed, rate))
    shutil.rmtree(folder / "stages")  # curves take long to draw
    lines = "".join(json.dumps(row) + "\n" for row in rows_of(seed, sft_rate, stage="sft"))
    (folder / "evaluation" / "sft.jsonl").write_text(lines)
    manifest = {
        "config": {"seed": seed, "sft": {"steps": 160, **config}},
        "commit": "abc",
        "data": {"x": "f" * 64},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    records = [record("base", "none", "all", "perplexity", 2.0, seed=seed)]
    records += [record("rlbf", "none", "all", "perplexity", 2.0 + rate, seed=seed)]
    for stage, value in (("sft", sft_rate), ("rlbf", rate)):
        records += [
            record(stage, "middle_filling", "rl", m, value, seed=seed) for m in ("asr", "leak")
        ]
    (folder / "results.json").write_text(json.dumps(records))
    return folder


def compared(*folders):
    runs = [report_compare.dataclasses.replace(read_run(f), name=f.name) for f in folders]
    return build_comparison(runs, {})


def titled(comparison, start):
    return [table for table in comparison.tables if table.title.startswith(start)]


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_benchmarks_and_attack_commands_stand_beside_a_development_headline(tmp_path):
    folders = [write(tmp_path / name, seed, 0.2, x=seed) for seed, name in enumerate("ab")]
    for seed, folder in enumerate(folders):
        manifest = {"config": {"seed": seed, "evaluation": {"pool": "development"}}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        records = [
            r | {"data": "development"} for r in json.loads((folder / "results.json").read_text())
        ]
        records += [record("rlbf", "direct", "all", "asr", 0.3, benchmark="xstest", seed=seed)]
        (folder / "results.json").write_text(json.dumps(records))
        for path in (folder / "evaluation").glob("*.jsonl"):
            path.write_text(path.read_text().replace('"data": "test"', '"data": "development"'))
        (folder / "evaluation" / "benchmarks").mkdir()
        row = made_up_row(attack="direct", split="all", verdict={"judged": False})
        (folder / "evaluation" / "benchmarks" / "xstest_rlbf.jsonl").write_text(
            json.dumps(row) + "\n"
        )
    found = compared(*folders)
    assert found.data == "development"
    assert [row[0] for row in texts(titled(found, "Under attack")[0])] == [
        "direct, xstest, test",
        "middle_filling †",
    ]
    assert {(count.bad, count.total) for count in found.unjudged} == {(1, 11)}


def test_the_headline_is_of_the_runs_own_benchmark_whatever_is_asked_besides(tmp_path):
    folders = [write(tmp_path / name, 0, 0.2, steps=i) for i, name in enumerate("ab")]
    for folder in folders:
        manifest = {
            "config": {"seed": 0, "name": folder.name, "evaluation": {"benchmark": "own_data"}}
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        records = [
            r | {"benchmark": "own_data"} for r in json.loads((folder / "results.json").read_text())
        ]
        records += [
            record("rlbf", "direct", "all", f"m{i}", 0.3, benchmark="xstest") for i in range(20)
        ]
        (folder / "results.json").write_text(json.dumps(records))
    found = compared(*folders)
    assert [(tile.title, tile.entries[0].text) for tile in found.tiles][:2] == [
        ("Violations left", "0.20"),
        ("Middle filling", "0.20"),
    ]
    assert [row[0] for row in texts(titled(found, "Under attack")[0])] == ["middle_filling †"]


def test_two_settings_are_paired_by_seed_and_attempt(tmp_path):
    a, b = write(tmp_path / "a", 0, 0.2), write(tmp_path / "b", 0, 0.7, steps=99)
    found = compared(a, b)
    (attack,) = titled(found, "Under attack")
    assert attack.columns[3:] == ("sft · a", "sft · b", "rlbf · a", "rlbf · b")
    assert texts(attack)[0][:2] == ["middle_filling †", "rl"]
    assert [cell.text for cell in attack.rows[0][3:]] == ["0.90", "0.90", "0.20", "0.70"]
    first, second = (t for t in found.tables if " minus " in t.title)
    assert (first.title, first.folded, second.title, second.folded) == (
        "rlbf · b minus rlbf · a", False, "sft · b minus sft · a", True,
    )  # fmt: skip
    # Prompts 2 to 6 differ: 5 of 10.
    assert texts(first) == [["middle_filling", "rl", "10", "+0.50 *", "0.00", "0.00", "–"]]
    assert texts(second)[0][3] == "0.00"
    assert first.rows[0][3].small[0].endswith(" B")
    assert first.rows[0][3].small[1] == "p 0.031, MDE 0.62 C"
    # All rows alike: Wilson's interval, and what ten prompts could have shown.
    assert second.rows[0][3].small == ("−0.28 to +0.28 WP", "p 1.000, MDE 0.62 C")
    assert attack.rows[0][3].small == ("0.84 to 0.96 W",) and "C: Connor" in first.note
    assert texts(titled(found, "What differs")[0]) == [["sft.steps", "160", "99"]]
    (costs,) = titled(found, "What it costs")
    ratios = {
        column: cell.small[-1]
        for column, cell in zip(costs.columns[3:], costs.rows[0][3:], strict=True)
    }
    assert ratios["rlbf · a"] == "1.100 × base" and ratios["rlbf · b"] == "1.350 × base"


def test_seeds_of_one_setting_are_averaged_and_their_stages_compared(tmp_path):
    folders = [write(tmp_path / f"seed{s}", s, rate) for s, rate in enumerate((0.2, 0.4, 0.6))]
    found = compared(*folders)
    (mean,) = titled(found, "Under attack, mean over 3 seeds")
    assert mean.columns[3:] == ("sft · seeds 0, 1, 2", "rlbf · seeds 0, 1, 2")
    assert [cell.text for cell in mean.rows[0][3:]] == ["0.90", "0.40"]
    (paired,) = (t for t in found.tables if " minus " in t.title)
    assert paired.title == "rlbf minus sft"
    assert paired.rows[0][3].text == "−0.50 *"
    limits, seeds, tested = paired.rows[0][3].small
    # All seeds answer the same ten prompts, of which three never differ.
    assert limits.endswith(" J") and seeds == "seeds: −0.70, −0.50, −0.30"
    assert re.fullmatch(r"p 0\.008, MDE 0\.\d\d SE", tested)
    for words in ("MDE, the minimum detectable effect", "J: bootstrap", "SE: 2.80 standard"):
        assert words in paired.note
    assert mean.rows[0][3].small[0].endswith(" J") and "drawn once for all seeds" in mean.note
    assert [row[0] for row in texts(titled(found, "What differs")[0])] == ["seed"]


def test_what_cannot_be_paired_is_said(tmp_path):
    def paired(*folders):
        return report_paired.paired_tables(
            report_paired.grouped([read_run(folder) for folder in folders])
        )

    a, b = write(tmp_path / "a", 0, 0.2), write(tmp_path / "b", 1, 0.7, steps=99)
    assert paired(a, b) == ([], ["b and a have no training seed in common, so nothing is paired."])
    other = write(tmp_path / "c", 0, 0.2, steps=98)
    rows = [dict(row, request_id=row["request_id"] + 1) for row in rows_of(0, 0.2)]
    (other / "evaluation" / "rlbf.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    (table,), (note,) = paired(a, other)
    assert table.title == "sft · c minus sft · a" and "other attempts" in note
    (other / "evaluation" / "rlbf.jsonl").write_text(json.dumps(made_up_row()) + "\n")
    for pair in ((a, other), (other, a)):
        tables, (note,) = paired(*pair)
        assert not tables and "rows of c, stage rlbf, have no request_id" in note


def test_a_second_run_of_a_seed_is_a_group_of_its_own(tmp_path):
    runs = [
        read_run(write(tmp_path / name, seed, 0.2)) for name, seed in (("a", 0), ("b", 1), ("c", 0))
    ]
    assert [list(group.runs) for group in report_paired.grouped(runs)] == [[0, 1], [0]]


def test_files_and_the_first_free_place(tmp_path):
    a, b, c = (write(tmp_path / name, 0, 0.1, steps=i) for i, name in enumerate("abc"))
    place = write_comparison([a, b])
    assert place == tmp_path / "comparison"
    before = (place / "comparison.html").read_bytes()
    assert write_comparison([a, b]) == place and (place / "comparison.html").read_bytes() == before
    assert write_comparison([b, a]) == tmp_path / "comparison_2"
    assert write_comparison([a, c], tmp_path / "mine") == tmp_path / "mine"
    assert {p.name for p in place.iterdir()} == {
        "comparison.html",
        "comparison.md",
        "plots",
        "runs.json",
    }
    page, markdown = before.decode(), (place / "comparison.md").read_text()
    assert "<script" not in page and not re.search(r'src="(?!data:)', page)
    for word in ("What differs", "rlbf · b minus rlbf · a", "Definitions"):
        assert word in page and word in markdown
    for name in re.findall(r"\(plots/(\w+\.png)\)", markdown):
        assert (place / "plots" / name).is_file()


def test_a_comparison_keeps_its_hands_off_runs(tmp_path):
    a, b = write(tmp_path / "a", 0, 0.1), write(tmp_path / "b", 0, 0.2)
    for out in (a, b):
        with pytest.raises(UserError, match="is a run; expected another folder"):
            write_comparison([a, b], out)
    with pytest.raises(UserError, match="named twice"):
        write_comparison([a, tmp_path / "b" / ".." / "a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no run here"):
        write_comparison([a, tmp_path / "empty"])
    with pytest.raises(UserError, match="not a folder"):
        write_comparison([a, tmp_path / "nowhere"])


def test_names_tell_runs_apart(tmp_path):
    paths = [tmp_path / "x" / "seed0", tmp_path / "y" / "seed0"]
    assert names_of(paths) == ["x/seed0", "y/seed0"]
    assert names_of([tmp_path / "x" / "one", tmp_path / "x" / "two"]) == ["one", "two"]


def test_many_columns_show_the_last_stages_first(tmp_path):
    folders = []
    for name in ("a", "b"):
        write_run(tmp_path / name)
        (tmp_path / name / "manifest.json").write_text(json.dumps({"config": {"name": name}}))
        folders.append(tmp_path / name)
    found = compared(*folders)
    training = [figure for figure in found.figures if figure.name.startswith("training_")]
    assert [figure.name for figure in training] == ["training_rlbf", "training_base"]
    assert "a line for each of a, b: reward" in training[0].alt
    short, every = titled(found, "Under attack")
    assert short.columns[3:] == ("rlbf · a", "rlbf · b") and not short.folded
    assert len(every.columns) == 3 + 2 * len(STAGES) and every.folded


def test_command_line(tmp_path, capsys):
    a, b = write(tmp_path / "a", 0, 0.1), write(tmp_path / "b", 0, 0.2)
    assert cli.main(["report", str(a), str(b), "--out", str(tmp_path / "c")]) == 0
    assert capsys.readouterr().out == f"comparison: {tmp_path / 'c' / 'comparison.html'}\n"
    assert cli.main(["report", str(a), "--out", str(tmp_path / "d")]) == 2
    assert "--out is for comparing" in capsys.readouterr().err
    assert cli.main(["report"]) == 2
    assert "rlbf report needs WORKDIR" in capsys.readouterr().err
