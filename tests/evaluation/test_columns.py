"""A metric is stated once: one `Column` reaches rows, records, comparison and report."""

import dataclasses
import math

import pytest

from rlbf_jax.evaluation import columns
from rlbf_jax.evaluation.columns import COLUMNS, Column, find, metric_names, of_group
from rlbf_jax.evaluation.comparison import Arm, Slice, column, difference, mean_over_seeds
from rlbf_jax.evaluation.intervals import Interval, clustered
from rlbf_jax.evaluation.suite import build_attempts, evaluate
from rlbf_jax.report import tables as report_tables
from rlbf_jax.report import values as report_values
from rlbf_jax.report import words
from tests.evaluation.test_suite import (
    CONFIG,
    CONTEXT,
    CountingJudge,
    SmallWorld,
    scripted,
    tokenizer,  # noqa: F401  a fixture
)
from tests.evaluation.test_suite import (
    find as chosen,
)


@pytest.fixture
def listed():
    """Appends columns to the list, and takes them off again."""
    size = len(COLUMNS)
    yield COLUMNS.append
    del COLUMNS[size:]


def asked(tokenizer, *attacks):  # noqa: F811
    config = dataclasses.replace(CONFIG, attacks=attacks)
    attempts = build_attempts(SmallWorld(), tokenizer, config)
    say = tokenizer.encode("tea tea hills.")
    return evaluate(
        scripted(tokenizer, lambda request: say), attempts, CountingJudge(), tokenizer, CONTEXT
    )


def test_the_list_is_sound():
    names = [column.name for column in COLUMNS]
    assert len(set(names)) == len(names) and all(column.says for column in COLUMNS)
    assert len(metric_names()) == 27 and set(metric_names()) < set(names)
    # Where a column stands first it stands before its guests.
    assert of_group("cost")[-2:] == ("over_deletion", "kept_prefix")
    assert of_group("attack") == ("asr", "leak", "torn_seam")


def test_a_new_metric_of_rows_is_one_line(listed, tokenizer):  # noqa: F811
    before = metric_names()
    says = "words of the final text."
    listed(
        Column(
            "num_words",
            says,
            kind="count",
            measure=lambda answer: len(answer.generation.text.split()),
        )
    )
    records, rows = asked(tokenizer, "none", "decoding")
    assert tuple(rows[0]["metrics"]) == (*before, "num_words")
    assert {row["metrics"]["num_words"] for row in rows} == {3.0}
    for attack in ("none", "decoding"):
        (record,) = chosen(records, attack=attack, metric="num_words")
        # A count of ones is no share: never Wilson's interval.
        assert (record.value, record.ci_method, record.n) == (3, "bootstrap", len(rows) // 6 * (
            1 if attack == "none" else 5
        ))  # fmt: skip
    arm = Arm("a", {3: rows})
    assert mean_over_seeds(arm, Slice("none"), "num_words").value == 3
    values = report_values.index([dataclasses.asdict(r) for r in records])
    table = report_tables.other_table(values)
    assert table is not None and "num_words" in {row[0].text for row in table.rows}
    assert words.definitions()["num_words"] == says
    assert report_tables.number(0.04, "num_words") == "0.04"


def distinct_words(answers):
    said = [word for answer in answers for word in answer.generation.text.split()]
    return len(set(said)) / len(said)


def test_a_metric_of_all_answers_to_an_attack(listed, tokenizer):  # noqa: F811
    listed(Column("distinct", "share of distinct words.", kind="set", measure=distinct_words))
    listed(Column("nothing", "never there.", kind="set", measure=lambda answers: None))
    listed(
        Column(
            "distinct_ci",
            "the same, with an interval.",
            kind="set",
            measure=lambda answers: clustered(
                distinct_words, answers, [a.attempt.prompt.id for a in answers]
            ),
        )
    )
    records, rows = asked(tokenizer, "none", "decoding")
    assert "distinct" not in rows[0]["metrics"] and not chosen(records, metric="nothing")
    for attack, n in (("none", 8), ("decoding", 40)):
        (plain,) = chosen(records, attack=attack, metric="distinct")
        assert plain.value == 2 / (3 * n) and math.isnan(plain.ci_low)
        assert (plain.ci_method, plain.n) == ("none", n)
        (with_ci,) = chosen(records, attack=attack, metric="distinct_ci")
        assert with_ci.ci_low <= plain.value == with_ci.value <= with_ci.ci_high
        assert with_ci.ci_method == "bootstrap"
    with pytest.raises(ValueError, match="distinct is no metric of single rows"):
        column(rows, Slice("none"), "distinct")


@pytest.mark.parametrize("metric", metric_names())
def test_comparison_takes_every_metric_of_rows(metric):
    rows = [
        {"request_id": i, "prompt_id": f"p{i}", "attack": "none", "split": "all", "seed": 0}
        | {"long_prefix": False, "metrics": dict.fromkeys(metric_names()) | {metric: float(i % 2)}}
        for i in range(4)
    ]
    arm = Arm("a", {0: rows})
    assert mean_over_seeds(arm, Slice("none"), metric).value == 0.5
    same = difference(arm, arm, Slice("none"), metric)
    # All pairs alike: doubt for a rate, none for a count of things.
    assert (same.low < 0 < same.high) == columns.is_rate(metric)


def test_unknown_metrics_and_old_rows_are_refused():
    with pytest.raises(ValueError, match="no metric 'asrr'"):
        column([], Slice("none"), "asrr")
    with pytest.raises(ValueError, match="perplexity is no metric of single rows"):
        column([], Slice("none"), "perplexity")
    with pytest.raises(ValueError, match="these rows have no corrected; evaluate"):
        column([{"metrics": {"asr": 0.0}}], Slice("none"), "corrected")


def test_what_metrics_share_is_computed_once(monkeypatch, tokenizer):  # noqa: F811
    from rlbf_jax.evaluation import answer_columns

    calls = []
    slow = answer_columns.prefix_words
    monkeypatch.setattr(
        answer_columns, "prefix_words", lambda *args: calls.append(args[0]) or slow(*args)
    )
    _, rows = asked(tokenizer, "middle_filling")
    assert len(calls) == len(rows) == 24


def test_numbers_are_written_by_their_column():
    assert report_tables.number(3210.4, "tokens_per_second") == "3,210"
    assert report_tables.number(0.034) == "0.034" and report_tables.number(0.034, "x") == "0.034"
    assert report_tables.number(0.034, "over_deletion") == "0.03"
    assert report_tables.number(None) == "–"
    value = report_values.Value(5.0, 1.0, 2.0, 3, 3)
    assert report_tables.interval(value, "tokens_per_second") == ""
    assert report_tables.interval(value, "perplexity") == "1.00 to 2.00"


def test_clustered_draws_whole_prompts():
    rows, prompts = [0, 0, 10, 10], ["a", "a", "b", "b"]
    mean = clustered(lambda chosen: sum(chosen) / len(chosen), rows, prompts, replicates=200)
    assert mean == Interval(5.0, 0.0, 10.0, "bootstrap", 4, 2)
    with pytest.raises(ValueError, match="one prompt a row"):
        clustered(len, rows, ["a"])
    assert find("asr") is COLUMNS[0]
