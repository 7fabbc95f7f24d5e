"""The report: numbers arrive, nothing is hidden, nothing from a model becomes markup."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rlbf_jax.attacks import ATTACKS, BENIGN
from rlbf_jax.directives import BacktrackRule, ReplaceRule, ResetRule, render
from rlbf_jax.errors import UserError
from rlbf_jax.report import browser as report_browser
from rlbf_jax.report import document as report
from rlbf_jax.report import headline
from rlbf_jax.report import plots as report_plots
from rlbf_jax.report import tables as report_tables
from rlbf_jax.report import traces as report_traces
from rlbf_jax.report import values as report_values
from rlbf_jax.report.files import read_run
from rlbf_jax.sampling.request import Generation, Request
from tests.report_runs import made_up_records, made_up_row, record, write_run


def text_of(page: str) -> str:
    return html.unescape(
        re.sub(r"<[^>]+>", " ", re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.S))
    )


def test_whole_report(tmp_path):
    write_run(tmp_path)
    report.write_report(tmp_path)
    page, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    for found in (text_of(page), markdown):
        found = found.replace("\\", "")
        for word in (
            "Under attack",
            "What it costs",
            "How rlbf backtracks",
            "sft_control",
            "leak",
            "†",
            "toy scale",
        ):
            assert word in found
    assert "97 % of answers by base" not in text_of(page)  # the mean over splits, not one of them
    assert "1 of 9" in text_of(page) and "| rlbf | 1 | 9 |" in markdown
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        "overview.png",
        "training_base.png",
        "training_rlbf.png",
    }
    assert (tmp_path / "plots" / "overview.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (
        not re.search(r'(src|href)="(?!data:|#)', page)
        and "@import" not in page
        and "url(" not in page
    )


def test_every_asr_cell_has_its_leak():
    table = report_tables.attack_table(report_values.index(made_up_records()))
    assert table is not None and len(table.rows) == 12
    for row in table.rows:
        assert row[0].text.endswith("†") == (
            row[0].text.split()[0] in report_values.BY_CONSTRUCTION
        )
        assert all(c.beside.startswith(("leak 0", "leak 1")) for c in row[3:])


def test_torn_stands_beside_leak_where_something_was_taken_back():
    records = made_up_records()
    torn = record("rlbf", "prefilling", "rl", "torn_seam", 0.25) | {"n": 7}
    table = report_tables.attack_table(report_values.index([*records, torn]))
    plain = report_tables.attack_table(report_values.index(records))
    assert table is not None and plain is not None and table.columns == plain.columns
    cells = {(row[0].text, row[1].text): row for row in table.rows}
    beside = cells["prefilling", "rl"][table.columns.index("rlbf")].beside
    assert beside.startswith("leak ") and beside.endswith(", torn 0.25")
    # Its denominator is another and does not count as the table's.
    assert [row[2] for row in table.rows] == [row[2] for row in plain.rows]
    assert sum("torn" in cell.beside for row in table.rows for cell in row) == 1


def test_no_number_is_hidden():
    values = report_values.index(made_up_records())
    shown = [
        report_tables.attack_table(values),
        report_tables.cost_table(values),
        report_tables.other_table(values),
    ]
    shown += report_tables.quality_tables(values)
    cells = [cell for table in shown for row in table.rows for cell in row[table.labels :]]
    texts = {text for cell in cells for text in (cell.text, cell.beside)}
    for (_, _, _, metric), value in values.items():
        wanted = report_tables.number(value.value, metric)
        assert wanted in texts or f"leak {wanted}" in texts


def test_summary_and_tiles_weigh_splits_by_answers():
    records = [
        record("base", "prefilling", "sft", "asr", 1.0, n=30),
        record("base", "prefilling", "rl", "asr", 0.0, n=10),
    ]
    values = report_values.index(records)
    assert headline.over_splits(values, "base", "prefilling", "asr") == pytest.approx(0.75)
    values |= report_values.index([record("base", "prefilling", "all", "asr", 0.5)])
    assert headline.over_splits(values, "base", "prefilling", "asr") == 0.5


def test_index_averages_seeds_and_separates_methods_and_knobs():
    seeds = [record("rlbf", "direct", "rl", "asr", v, seed=s) for s, v in enumerate((0.0, 0.2))]
    value = report_values.index(seeds)["rlbf", "direct", "rl", "asr"]
    assert (value.value, value.low, value.high, value.n, value.seeds) == (
        0.1,
        0.0,
        pytest.approx(0.26),
        128,
        2,
    )
    methods = [
        record("rlbf", "direct", "rl", "asr", 0.1, method=m) for m in ("rlbf_ppo", "rlbf_grpo")
    ]
    assert report_values.columns_of(report_values.index(methods)) == [
        "rlbf (rlbf_ppo)",
        "rlbf (rlbf_grpo)",
    ]
    knobs = [
        record("rlbf", "decoding", "rl", "asr", 0.1, knobs={"temperature": t}) for t in (0.7, 1.0)
    ]
    assert {k[1] for k in report_values.index(knobs)} == {
        "decoding, temperature 0.7",
        "decoding, temperature 1.0",
    }
    cells = [
        record(
            "rlbf", "middle_grid", "rl", m, 0.1, knobs={"max_tokens": 76, "p": p, "v": 4, "b": b}
        )
        for p in (16, 4)
        for b in (0, 8)
        for m in ("asr", "leak")
    ]
    table = report_tables.attack_table(report_values.index(cells), {"middle_grid, p 4 b 8"})
    names = [
        "middle_grid, p 4 b 0",
        "middle_grid, p 4 b 8 †",
        "middle_grid, p 16 b 0",
        "middle_grid, p 16 b 8",
    ]
    assert [row[0].text for row in table.rows] == names
    # A knob that only one of two has is named, but only where they would be taken for each other.
    grid = [
        record("rlbf", "decoding", "all", "asr_mean", 0.1, knobs=k)
        for k in ({"any_of": 4}, {"temperature": 1})
    ]
    assert {k[1] for k in report_values.index(grid)} == {
        "decoding, any_of 4",
        "decoding, temperature 1",
    }
    other = [
        record("rlbf", "none", "all", m, 1.0, knobs=k)
        for m, k in (("asr", {"max_tokens": 76}), ("perplexity", {}))
    ]
    assert {k[1] for k in report_values.index(other)} == {"none"}
    long = [
        record("rlbf", "prefilling", "rl", "asr", 0.1, benchmark=b)
        for b in ("toy", "toy_long_prefix")
    ]
    assert {k[1] for k in report_values.index(long)} == {"prefilling", "prefilling, long_prefix"}
    # Knobs are told apart within a benchmark: another one has a name of its own.
    public = [
        record(
            "rlbf", "prefilling", "all", "asr", 0.1, benchmark="advbench", knobs={"n_prompts": 9}
        )
    ]
    told = [r | {"knobs": {"n_prompts": n}} for n, r in enumerate(long)]
    assert {k[1] for k in report_values.index(told + public)} == {
        "prefilling, n_prompts 0",
        "prefilling, long_prefix, n_prompts 1",
        "prefilling, advbench",
    }


def test_attacks_that_force_a_whole_violation_in_every_row():
    records = [
        record("rlbf", "prefilling_depth", "rl", "asr", 0.1, knobs={"max_tokens": 9, "k": k})
        for k in (5, 40)
    ]
    rows = [
        made_up_row(
            attack="prefilling_depth", knobs={"max_tokens": 9}, cell={"k": k}, by_construction=whole
        )
        for k, whole in ((5, False), (40, True), (5, True), (40, True))
    ]
    found = report_values.by_construction(records, rows)
    assert found == {*report_values.BY_CONSTRUCTION, "prefilling_depth, k 40"}


def test_development_and_test_are_not_mixed(tmp_path):
    write_run(tmp_path)
    records = made_up_records() + [
        record("rlbf", "prefilling", "rl", "asr", 0.777, data="development")
    ]
    (tmp_path / "results.json").write_text(json.dumps(records))
    report.write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "0.78" not in markdown and "1 records on development data" in markdown


def write_beside(folder, kind, name, rows):
    (folder / "evaluation" / kind).mkdir(exist_ok=True)
    (folder / "evaluation" / kind / f"{name}.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )


def test_rows_of_attack_commands_and_benchmarks_reach_the_report(tmp_path):
    write_run(tmp_path)
    before = report.build_report(read_run(tmp_path))
    asked = {"asked": "rlbf attack"}
    records = made_up_records()
    for stage in ("sft", "rlbf"):
        records += [
            record(stage, "middle_grid", "rl", m, 0.1, knobs=asked) for m in ("asr", "leak")
        ]
        records += [record(stage, "prefilling", "rl", "asr", 0.1, benchmark="advbench")]
    (tmp_path / "results.json").write_text(json.dumps(records))
    forced = made_up_row(stage="sft", attack="middle_grid", by_construction=True)
    twice = made_up_row(attack="prefilling", metrics={"x_error": 3.0}, verdict={"judged": False})
    write_beside(tmp_path, "attacks", "middle_grid_sft", [forced, {"attack": "middle_grid"}])
    write_beside(tmp_path, "attacks", "prefilling_rlbf", [twice])
    write_beside(
        tmp_path, "benchmarks", "advbench_rlbf", [made_up_row(attack="prefilling", split="all")]
    )
    run = read_run(tmp_path)
    after = report.build_report(run)
    assert list(run.rows) == ["rlbf"] and len(run.rows["rlbf"]) == 9  # of which figures are made
    assert [figure.name for figure in after.figures] == [figure.name for figure in before.figures]
    assert {(u.stage, u.bad, u.total) for u in after.unjudged} == {("sft", 0, 1), ("rlbf", 2, 11)}
    names = [row[0].text for row in after.tables[0].rows]
    assert "middle_grid †" in names and "prefilling, advbench" in names and "prefilling" in names
    rows = json.loads(after.browser.data)["rows"]
    assert {(row["stage"], row["attack"]) for row in rows} >= {
        ("sft", "middle_grid"),
        ("rlbf", "prefilling, advbench"),
    }
    assert (after.browser.shown, after.browser.total) == (12, 12)
    assert "evaluation/benchmarks/advbench_rlbf.jsonl" in after.browser.files
    assert "attacks/middle_grid_sft.jsonl: 1 rows without a stage left out." in run.missing


@pytest.mark.parametrize("told", [True, False])
def test_the_headline_is_of_the_runs_own_benchmark_whatever_its_name(tmp_path, told):
    """Neither another benchmark's shorter name nor, with a manifest,
    its many records take the headline."""
    write_run(tmp_path)
    own = [r | {"benchmark": "own_data"} for r in made_up_records()]
    own = [r | {"knobs": {"max_tokens": 76}} for r in own]
    long = {"benchmark": "xstest", "knobs": {"max_tokens": 512}}
    asked = [record("rlbf", "prefilling", "all", "asr", 0.5, **long)] * (
        len(own) + 1 if told else 1
    )
    (tmp_path / "results.json").write_text(json.dumps([*asked, *own]))
    evaluation = {"evaluation": {"benchmark": "own_data"}} if told else {}
    (tmp_path / "manifest.json").write_text(json.dumps({"config": evaluation}))
    found = report.build_report(read_run(tmp_path))
    assert [tile.title for tile in found.tiles] == [
        "Violations left",
        "Prefilling",
        "Middle filling",
        "Harmless text lost",
        "Ids wasted",
        "Perplexity",
    ]
    assert len(found.summary) == 4
    names = {row[0].text for row in found.tables[0].rows}
    assert {"prefilling", "prefilling, xstest", "middle_filling †"} <= names


def test_a_dagger_is_of_one_benchmark_and_one_pool():
    records = [
        record("rlbf", "prefilling", "rl", "asr", 0.1, benchmark=b)
        for b in ("toy", "toy_long_prefix", "advbench")
    ]
    records += [record("rlbf", "gcg", "rl", "asr", 0.1, data=d) for d in ("test", "development")]
    rows = [made_up_row(attack="prefilling", by_construction=True)]
    rows += [made_up_row(attack="prefilling", by_construction=False, benchmark="advbench")]
    rows += [
        made_up_row(attack="gcg", by_construction=d == "development", data=d)
        for d in ("test", "development")
    ]
    whole = report_values.by_construction(records, rows, "test")
    assert whole - set(report_values.BY_CONSTRUCTION) == {"prefilling", "gcg, development"}
    names = [
        row[0].text
        for row in report_tables.attack_table(report_values.index(records, data="test"), whole).rows
    ]
    assert names == [
        "prefilling †",
        "prefilling, advbench",
        "prefilling, long_prefix †",
        "gcg",
        "gcg, development †",
    ]


def test_the_knob_of_attack_commands_tells_records_and_rows_apart():
    asked = {"asked": "rlbf attack"}
    records = [
        record("rlbf", "prefilling_depth", "rl", "asr", 0.1, knobs=k)
        for k in ({"k": 5}, {"k": 5} | asked)
    ]
    assert {k[1] for k in report_values.index(records)} == {
        "prefilling_depth",
        "prefilling_depth, asked rlbf attack",
    }
    rows = [made_up_row(attack="prefilling_depth", cell={"k": 5}, by_construction=False)]
    rows += [made_up_row(attack="prefilling_depth", cell={"k": 5}, by_construction=True, **asked)]
    found = report_values.by_construction(records, rows)
    assert found == {*report_values.BY_CONSTRUCTION, "prefilling_depth, asked rlbf attack"}


def test_every_harmless_attack_stands_with_what_it_costs():
    assert report_values.HARMLESS == BENIGN
    records = [
        record("rlbf", a, "all", m, 0.4)
        for a in BENIGN
        for m in ("asr", "leak", "false_backtrack_rate")
    ]
    values = report_values.index(records)
    assert report_tables.attack_table(values) is None
    assert {row[1].text for row in report_tables.cost_table(values).rows} == BENIGN
    # A found trigger is no twin of an attack.
    values |= report_values.index([record("rlbf", "trigger", "all", "false_backtrack_rate", 0.9)])
    (tile,) = headline.headline_tiles(values, ["rlbf"], {"rlbf": ""})
    assert tile.entries[0].text == "0.40" and "trigger" not in tile.entries[0].small


def test_the_headline_counts_every_answer_once():
    def of(attack, value, n, metric="leak"):
        return record("rlbf", attack, "all", metric, value) | {"n": n}

    values = report_values.index(
        [
            of("direct", 0.0, 30),
            of("prefilling", 0.5, 10),
            of("gcg", 1.0, 99),
            of("decoding", 1.0, 99),
            of("none", 0.9, 50),
            record("rlbf", "direct", "all", "leak", 1.0, benchmark="toy_long_prefix"),
            *(of(name, 2.0, 10, "wasted_tokens") for name in ("direct", "none")),
        ],
        main="toy",
    )
    assert headline.overall(values, "rlbf", "leak", harmless=False) == pytest.approx(5 / 40)
    assert headline.overall(values, "rlbf", "leak") == pytest.approx((5 + 45) / 90)
    assert headline.overall(values, "rlbf", "asr") is None
    tiles = {t.title: t for t in headline.headline_tiles(values, ["rlbf"], {"rlbf": ""})}
    assert tiles["Violations left"].entries[0].text == "0.12"
    assert tiles["Ids wasted"].entries[0].text == "2.0"


def test_what_only_other_data_have_is_shown_with_its_data():
    both = [
        record("rlbf", "prefilling", "rl", "asr", v, data=d)
        for d, v in (("test", 0.1), ("development", 0.9))
    ]
    alone = [record("rlbf", "gcg", "rl", "asr", 0.3, data="development")]
    xstest = [record("rlbf", "direct", "all", "asr", 0.2, benchmark="xstest")]
    shown, data, note = report.one_data([*both, *alone, *xstest])
    assert data == "test" and note.startswith("1 records on development data")
    values = report_values.index(shown, data=data)
    assert {k[1]: v.value for k, v in values.items()} == {
        "prefilling": 0.1,
        "gcg, development": 0.3,
        "direct, xstest": 0.2,
    }
    # The run's own pool is the headline's, whatever a benchmark was asked on.
    shown, data, note = report.one_data([both[1], *alone, *xstest], "development")
    assert data == "development" and not note
    names = {k[1] for k in report_values.index(shown, data=data)}
    assert names == {"prefilling", "gcg", "direct, xstest, test"}
    assert report.one_data(xstest, "development")[1] == "test"


def test_a_benchmark_leaves_the_headline_of_a_development_run(tmp_path):
    write_run(tmp_path)
    manifest = {"config": {"evaluation": {"pool": "development"}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    records = [r | {"data": "development"} for r in made_up_records()]
    records += [record("rlbf", "direct", "all", "asr", 0.2, benchmark="xstest")]
    (tmp_path / "results.json").write_text(json.dumps(records))
    for path in (tmp_path / "evaluation").glob("*.jsonl"):
        path.write_text(path.read_text().replace('"data": "test"', '"data": "development"'))
    told = report.build_report(read_run(tmp_path))
    names = {row[0].text for row in told.tables[0].rows}
    assert told.data == "development" and {"prefilling", "direct, xstest, test"} <= names
    assert [tile.title for tile in told.tiles][1:3] == ["Prefilling", "Middle filling"]


def test_the_pool_is_what_the_rows_say_before_the_manifest(tmp_path):
    write_run(tmp_path)
    (tmp_path / "manifest.json").write_text(
        json.dumps({"config": {"evaluation": {"pool": "development"}}})
    )
    assert read_run(tmp_path).pool == "test"
    for path in (tmp_path / "evaluation").glob("*.jsonl"):
        path.unlink()
    assert read_run(tmp_path).pool == "development"


def test_empty_folder_says_what_is_missing(tmp_path):
    report.write_report(tmp_path)
    for name in ("report.html", "report.md"):
        content = html.unescape((tmp_path / name).read_text()).replace("\\", "")
        for missing in (
            "manifest.json is missing",
            "results.json is missing",
            "evaluation/ has no",
            "stages/ has no",
        ):
            assert missing in content
    with pytest.raises(UserError, match="not a folder"):
        report.write_report(tmp_path / "nowhere")


def test_broken_files_are_named(tmp_path):
    write_run(tmp_path)
    (tmp_path / "results.json").write_text('{"a": 1}')
    (tmp_path / "manifest.json").write_text("{")
    with (tmp_path / "evaluation" / "rlbf.jsonl").open("a") as file:
        file.write('{"trace": [')
    report.write_report(tmp_path)
    found = text_of((tmp_path / "report.html").read_text())
    assert "results.json holds a dict" in found and "manifest.json is not JSON" in found
    assert "evaluation/rlbf.jsonl: 1 unreadable lines left out, first line 10" in found


def test_model_text_never_becomes_markup(tmp_path):
    evil = '<script>alert("x")</script>&amp;<img src=x onerror=y>'
    row = made_up_row(
        prompt=evil, visible=evil + "\0\r\x9b\t1\n2", category=evil, split=evil, attack=evil
    )
    row["trace"][0]["text"] = evil
    row["trace"][1]["text"] = "|`*_\x1b[2J"
    write_run(tmp_path, [row])
    manifest = {"config": {"x": "</pre>" + evil}, evil: evil}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    report.write_report(tmp_path)
    for name in ("report.html", "report.md"):
        content = (tmp_path / name).read_text()
        assert "<script>alert" not in content and "<img src=x" not in content
    # Markdown shows control characters as \\x1b, whose backslash is escaped in turn; tab and
    # newline are white space.
    assert all(c.isprintable() or c in "\n\t" for c in content)
    assert r"\\x00\\r\\x9b" + "\t1 2" in content and r"\\x1b\[2J" in content
    console = Console(
        width=200, record=True, color_system="standard", file=(tmp_path / "out").open("w")
    )
    console.print(report_traces.render_trace_terminal(row))
    assert "\x1b[2J" not in console.export_text(styles=True)


class Digits:
    """Ids 0..8 are their digits, 9 ends, control ids follow."""

    eos_id = 9

    def decode(self, ids):
        return "".join(str(i) for i in ids if i < 9)


def generation_of(rule, trace, num_forced=0):
    finished, rendered = trace[-1:] == [9], render(rule, trace)
    visible = tuple(i for i in rendered.visible if i != 9)
    return Generation(
        Digits().decode(visible), np.asarray(trace), rendered.edits, np.zeros(0), visible,
        np.zeros(1), num_forced, finished, rendered.malformed, Request("q"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "trace", "expected"),
    [
        (
            BacktrackRule(10, ("insult", "privacy"), x_max=4),
            [1, 2, 3, 10, 13, 4, 11, 5, 9],
            "_1_ -2-3 [CATEGORY_INSULT] [BACKTRACK_BY_2] 4 [CATEGORY_PRIVACY] 5",
        ),
        (ResetRule(10), [1, 2, 10, 3], "_-1_ -2 [RESET] 3"),
        (
            ReplaceRule(10, ("insult", "privacy")),
            [1, 2, 3, 10, 2, 3, 12, 4, 11, 5, 9],
            "_1_ -2-3 [FLAG_INSULT] *2*3 [REPLACE] 4 [FLAG_PRIVACY] *5",
        ),
    ],
)
def test_pieces_of_a_trace(rule, trace, expected):
    pieces = report_traces.trace_pieces(generation_of(rule, trace, 1), Digits(), rule)
    shown = []
    for piece in pieces:
        mark = "-" * piece.erased + "*" * (piece.kind == "copy")
        text = "".join(f"{mark}{c}" for c in piece.text) if piece.text.isdigit() else piece.text
        shown += [f"_{text}_" if piece.forced else text] * (piece.kind != "end")
    assert " ".join(shown) == expected
    assert [piece.kind for piece in pieces if piece.kind == "end"] == ["end"] * (trace[-1] == 9)


def test_a_copy_stands_apart():
    rule = ReplaceRule(10, ("insult",))
    row = report_traces.row_of(generation_of(rule, [1, 2, 10, 2, 11, 3, 9]), Digits(), rule)
    assert row["visible"] == "13" and row["edits"][0]["x"] == 1
    assert report_traces.markdown_trace(row) == "1~~2~~ `[FLAG_INSULT]` *2* `[REPLACE]` 3"
    styles = {
        row_text: str(span.style)
        for text in [report_traces.render_trace_terminal(row)]
        for span in text.spans
        for row_text in [text.plain[span.start : span.end]]
    }
    assert styles == {
        "2": "dim",  # the last of two; the first is struck out
        " [FLAG_INSULT]": "bold magenta",
        " [REPLACE]": "bold yellow",
    }
    assert "2 [FLAG_INSULT]2 [REPLACE]" in report_traces.render_trace_terminal(row).plain
    text = report_browser.entry("sft", row)["text"]
    assert ["2", report_browser.COPY | report_browser.HIDDEN] in text


def test_merged_pieces_keep_every_word():
    row = made_up_row()
    row["trace"] = [
        dict(p, text=c)
        for p in row["trace"]
        for c in (p["text"] if p["kind"] == "content" else [p["text"]])
    ]
    merged = report_traces.merged_pieces(row)
    assert [(p.text, p.kind) for p in merged] == [
        (p["text"], p["kind"]) for p in made_up_row()["trace"][:-1]
    ]
    assert merged[1].css == "content erased forced"


def test_markdown_trace_marks_touch_their_words():
    line = report_traces.markdown_trace(made_up_row())
    assert (
        "~~<u>by the way, call hugo</u>~~ ~~on 7 6~~ `[CATEGORY_PRIVACY]` `[BACKTRACK_BY_9]` Let"
        in line
    )


def test_gallery_shows_failures_first_and_every_split():
    bad = {"safe": False, "judged": True}
    rows = [made_up_row(split="sft", prompt_id=str(i)) for i in range(5)]
    rows += [made_up_row(split="unseen"), made_up_row(split="rl", verdict=bad)]
    ((attack, chosen),) = report_traces.gallery(rows, list(ATTACKS))
    assert attack == "middle_filling"
    assert [row["split"] for row in chosen] == ["rl", "sft", "unseen", "sft"]


def test_verdict_label():
    assert report_traces.verdict_label({"verdict": {"judged": False, "safe": True}})[1] == "none"
    assert report_traces.verdict_label({})[1] == "none"
    assert report_traces.verdict_label({"verdict": {"judged": True, "safe": True, "leaks": 2}}) == (
        "safe, 2 violating words left",
        "warn",
    )
    safe = {"verdict": {"judged": True, "safe": True}}
    for torn, label in ((True, "safe, torn where words were taken back"), (False, "safe")):
        seams = [{"at": 3, "torn": None}, {"at": 9, "torn": torn}]
        assert report_traces.verdict_label(safe | {"seams": seams})[0] == label


def test_curves_leave_out_what_does_not_move():
    rows = [
        {"step": s, "flat": 1.0, "note": "x", "loss": s, "reward": -s, "bad": float("nan")}
        for s in range(4)
    ]
    assert report_plots.curve_names(rows) == ["reward", "loss"]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=50))
def test_smoothing_stays_within_bounds_and_keeps_lines(values):
    smooth = report_plots.smoothed(values)
    assert (
        len(smooth) == len(values)
        and min(values) - 1e-9 <= min(smooth)
        and max(smooth) <= max(values) + 1e-9
    )
    line = [2.0 * i + 1 for i in range(len(values))]
    np.testing.assert_allclose(report_plots.smoothed(line), line)
