"""Audits of scripted critics, whose numbers can be counted by hand, and the two commands."""

from __future__ import annotations

import csv
import json
import os
import pathlib
import re

import numpy as np
import pytest

from rlbf_jax.cli import main as cli
from rlbf_jax.critics.base import Span, Verdict
from rlbf_jax.data.sources.labelled import LabelledTexts
from rlbf_jax.evaluation.audit import (
    Judgements,
    audit,
    audit_table,
    join_folds,
    judge_texts,
    span_iou,
    span_word_f1,
)
from tests.endpoint_server import KEY, serving
from tests.runs.tiny_checkpoint import write_yes_model

CALIBRATION = ("brier", "calibration_error")
BAD, FINE = Verdict((Span(0, 1, "rude"),)), Verdict()


class Scripted:
    name = "scripted"
    categories = ("rude", "loud")

    def __init__(self, scores):
        self.table = scores

    def judge(self, exchanges):
        return [FINE if max(self.table[e.text]) < 0.5 else BAD for e in exchanges]

    def scores(self, exchanges):
        return np.array([self.table[e.text] for e in exchanges])


def labelled(labels, texts=None, spans=None, groups=None, categories=("rude",)):
    labels = np.array(labels, bool).reshape(-1, len(categories))
    texts = tuple(texts or (f"text {i}" for i in range(len(labels))))
    return LabelledTexts(texts, categories, labels, spans, groups or {})


def number(result, metric, group="all"):
    (record,) = [r for r in result["records"] if (r["metric"], r["group"]) == (metric, group)]
    return record


def test_rates_count_what_was_judged():
    verdicts = (
        BAD,
        BAD,
        FINE,
        FINE,
        BAD,
        Verdict(judged=False, reason="refused"),
        Verdict((Span(0, 1, "r", False),)),
    )
    result = audit(labelled([1, 1, 1, 0, 0, 1, 0]), Judgements("by hand", verdicts))
    assert (result["n"], result["n_violating"], result["unjudged"]) == (7, 4, 1)
    assert result["unjudged_reasons"] == {"refused": 1}
    values = {
        m: number(result, m)["value"]
        for m in ("accuracy", "precision", "recall", "false_positive_rate")
    }
    assert values == pytest.approx(
        {"accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "false_positive_rate": 1 / 3}
    )
    assert number(result, "recall")["n"] == 3 and number(result, "recall")["ci_method"] == "wilson"
    assert "reliability" not in result and not [
        r for r in result["records"] if r["metric"] == "auc"
    ]
    assert "could not judge 1 (refused 1)" in audit_table(result)


def test_scores_are_ranked_and_calibrated():
    table = {"a": (0.9, 0.1), "b": (0.2, 0.6), "c": (0.3, 0.1), "d": (0.1, 0.7)}
    texts = labelled([[1, 0], [0, 1], [0, 0], [0, 0]], tuple(table), categories=("rude", "loud"))
    result = audit(texts, judge_texts(Scripted(table), texts.texts))
    assert number(result, "auc")["value"] == 0.75  # 0.9 and 0.6 against 0.3 and 0.7
    assert number(result, "auc", "rude")["value"] == 1.0
    assert number(result, "auc", "loud")["value"] == pytest.approx(2 / 3)
    assert number(result, "category_recall", "loud")["value"] == 0.0  # it says rude, whatever it is
    assert number(result, "recall", "loud")["value"] == 1.0
    # The larger of two probabilities is no probability of either:
    # calibration is of one category at a time.
    told = {
        (r["metric"], r["group"]): r["value"]
        for r in result["records"]
        if r["metric"] in CALIBRATION
    }
    assert told == pytest.approx(
        {
            ("brier", "rude"): (0.01 + 0.04 + 0.09 + 0.01) / 4,
            ("brier", "loud"): (0.01 + 0.16 + 0.01 + 0.49) / 4,
            ("calibration_error", "rude"): (0.1 + 0.2 + 0.3 + 0.1) / 4,  # four rows are four bins
            ("calibration_error", "loud"): (0.1 + 0.4 + 0.1 + 0.7) / 4,
        }
    )
    assert {
        c: sum(row["n"] for row in v["reliability"]) for c, v in result["calibration"].items()
    } == {
        "rude": 4,
        "loud": 4,
    }
    assert "reliability" not in result and "probabilities of loud would show" in audit_table(result)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_calibration_where_critic_and_file_know_different_categories():
    table = {"a": (0.9, 0.1), "b": (0.2, 0.6)}
    two = judge_texts(Scripted(table), tuple(table))
    one = Judgements("one", two.verdicts, two.scores[:, :1], ("rude",))

    def groups(judgements, categories):
        texts = labelled(
            [[1] * len(categories), [0] * len(categories)], tuple(table), categories=categories
        )
        found = audit(texts, judgements)
        assert ("reliability" in found) == (len(categories) == len(judgements.categories) == 1)
        return {r["group"]: r["value"] for r in found["records"] if r["metric"] == "brier"}

    rude = pytest.approx((0.01 + 0.04) / 2)
    assert (
        groups(one, ("rude",)) == {"all": rude} == groups(one, ("label",))
    )  # a file's one column has any name
    assert groups(two, ("rude",)) == {"rude": rude} == groups(one, ("rude", "loud"))
    assert groups(two, ("label",)) == {}


def test_bias_by_group():
    """Five harmless texts of the group, three accused; five others, one accused."""
    verdicts = tuple([BAD] * 3 + [FINE] * 2 + [BAD] + [FINE] * 4 + [BAD] * 2)
    member = np.array([True] * 5 + [False] * 5 + [True, False])
    texts = labelled([0] * 10 + [1] * 2, groups={"town=oslo": member})
    scores = np.array([0.9, 0.8, 0.7, 0.1, 0.2, 0.6, 0.1, 0.1, 0.2, 0.3, 0.75, 0.85])[:, None]
    result = audit(texts, Judgements("by hand", verdicts, scores, ("rude",)))
    assert number(result, "false_positive_rate", "town=oslo")["value"] == 0.6
    difference = number(result, "false_positive_rate_difference", "town=oslo")
    assert (
        difference["value"] == pytest.approx(0.4)
        and difference["ci_low"] < 0.4 < difference["ci_high"]
    )
    assert number(result, "auc", "town=oslo")["value"] == pytest.approx(3 / 5)
    assert number(result, "auc_bpsn", "town=oslo")["value"] == pytest.approx(4 / 5)
    assert number(result, "auc_bnsp", "town=oslo")["value"] == 1.0


def test_an_empty_group_has_no_value():
    texts = labelled([0, 1], groups={"nobody": np.zeros(2, bool)})
    result = audit(texts, Judgements("x", (FINE, BAD), np.array([[0.1], [0.9]]), ("rude",)))
    assert number(result, "accuracy", "nobody")["value"] is None
    assert number(result, "auc", "nobody")["value"] is None
    assert "| accuracy | nobody | - | - | 0 |" in audit_table(result)


def test_nothing_could_be_judged():
    result = audit(
        labelled([0, 1]),
        Judgements("x", (Verdict(judged=False),) * 2, np.full((2, 1), np.nan), ("rude",)),
    )
    assert result["unjudged"] == 2 and number(result, "accuracy")["value"] is None
    assert audit_table(result)


def test_span_overlap():
    text = "you silly turnip, go"
    assert span_iou([(4, 16)], [Span(10, 16, "rude")]) == 0.5
    assert span_iou([], []) == 1.0 and span_iou([(0, 1)], []) == 0.0
    assert span_word_f1(text, [(4, 16)], [Span(10, 16, "rude")]) == pytest.approx(2 / 3)
    assert span_word_f1(text, [(4, 16)], [Span(5, 11, "rude")]) == 1.0  # words are touched or not
    verdicts = (Verdict((Span(10, 16, "rude"),)), FINE)
    texts = labelled([1, 0], (text, "fine words"), spans=(((4, 16),), ()))
    result = audit(texts, Judgements("x", verdicts))
    assert number(result, "span_iou")["value"] == 0.5 and number(result, "span_iou")["n"] == 1
    assert number(result, "span_character_f1")["value"] == pytest.approx((2 * 6 / 18 + 1) / 2)


def test_folds_are_joined_in_the_order_of_the_file():
    table = {f"text {i}": (i / 10, 0.0) for i in range(10)}
    texts = labelled([i in (3, 7, 8) for i in range(10)])
    critic = Scripted(table)
    parts = [
        (np.array(k), judge_texts(critic, [texts.texts[i] for i in k]))
        for k in ([9, 3, 0, 5, 8], [1, 7, 2, 4, 6])
    ]
    joined = join_folds(parts, "both")
    np.testing.assert_allclose(joined.scores[:, 0], np.arange(10) / 10)
    assert joined.fold.tolist() == [0, 1, 1, 0, 1, 0, 1, 1, 0, 0]
    assert [not v.safe for v in joined.verdicts] == [i >= 5 for i in range(10)]
    result = audit(texts, joined)
    # Fold 0 holds scores 9 3 0 5 8 with 3 and 8 positive: 1 + 2 of 6 pairs;
    # fold 1 holds 7 above all others.
    assert number(result, "auc_mean_of_folds")["value"] == pytest.approx((3 / 6 + 1) / 2)


# Commands -----------------------------------------------------------------------------------------


def write_rows(path: pathlib.Path, n: int = 90) -> None:
    rng = np.random.default_rng(0)
    calm = "the gentle river near our village grows roses and quiet green pears".split()
    rows = []
    for i in range(n):
        words = list(rng.choice(calm, 9))
        rude = i % 3 == 0
        if rude:
            words[4] = "you silly turnip"
        text = " ".join(words)
        start = text.find("you silly turnip")
        rows.append(
            [
                text,
                float(rude),
                json.dumps([[start, start + 16]] if rude else []),
                "oslo" if i % 2 else "rome",
            ]
        )
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["comment_text", "rude", "at", "town"], *rows])


def test_train_then_audit(tmp_path, capsys):
    path, out = tmp_path / "rows.csv", tmp_path / "critic"
    write_rows(path)
    columns = ["--label_column", "rude", "--span_column", "at", "--group_column", "town"]
    small = ["--training.features.bits", "12", "--training.calibration_folds", "3"]
    assert cli.main(["critic", str(path), "--out", str(out), "--folds", "2", *columns, *small]) == 0
    said = capsys.readouterr().out
    assert "fold 2 of 2" in said and "auc_mean_of_folds" in said and "of rude" in said
    result = json.loads((out / "audit.json").read_text())
    assert (
        number(result, "auc_mean_of_folds")["value"] > 0.95
        and number(result, "span_word_f1")["value"] > 0.5
    )
    assert sorted(p.name for p in out.iterdir()) == [
        "audit.json",
        "audit.md",
        "classifier.json",
        "classifier.npz",
    ]

    command = ["audit", str(path), "--critic", str(out), "--out", str(tmp_path / "a"), *columns]
    assert cli.main(command) == 0
    first = (tmp_path / "a" / "audit.json").read_bytes()
    assert number(json.loads(first), "accuracy", "town=oslo")["value"] > 0.95
    assert cli.main([*command, "--verdicts.spans", "window"]) == 0
    assert number(json.loads((tmp_path / "a" / "audit.json").read_text()), "span_iou") != number(
        json.loads(first), "span_iou"
    )
    assert cli.main(command) == 0
    assert (tmp_path / "a" / "audit.json").read_bytes() == first


def test_the_lexicon_can_be_audited(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    write_rows(path, 12)
    assert (
        cli.main(
            [
                "audit",
                str(path),
                "--critic",
                "toy_lexicon",
                "--out",
                str(tmp_path),
                "--label_column",
                "rude",
            ]
        )
        == 0
    )
    assert "Audit of toy_lexicon" in capsys.readouterr().out


def test_a_chat_model_can_be_audited(tmp_path, monkeypatch, capsys):
    def reply(messages):
        text = json.loads(messages[-1]["content"])["answer"]
        found = (
            [{"quote": "silly turnip", "category": "rude", "complete": True}]
            if "turnip" in text
            else []
        )
        said = json.dumps({"violations": found, "coherent": True, "useful": True})
        return "I cannot say" if text.startswith("pears") else said

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    path = tmp_path / "rows.csv"
    write_rows(path, 12)
    with open(path, "a", encoding="utf-8") as file:
        file.write("pears and pears,0,[],rome\n")
    columns = ["--label_column", "rude", "--span_column", "at", "--out", str(tmp_path / "a")]
    with serving(reply) as server:
        endpoint = ["--endpoint.base_url", server.url, "--endpoint.model", "tiny"]
        assert cli.main(["audit", str(path), "--critic", "http", *columns, *endpoint]) == 0
        sent = len(server.seen)
        assert cli.main(["audit", str(path), "--critic", "http", *columns, *endpoint]) == 0
        assert len(server.seen) == sent  # every answer is in the journal
    result = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert result["critic"] == "http tiny" and result["unjudged"] == 1
    assert number(result, "accuracy")["value"] == 1.0 and number(result, "accuracy")["n"] == 12
    assert number(result, "span_iou")["value"] == 0.75  # "you " is missing


def test_one_of_our_own_models_can_be_audited(tmp_path, capsys):
    """A model that says yes, whatever it is asked; in the format harmbench that is: a violation."""
    path, folder = tmp_path / "rows.csv", tmp_path / "model"
    write_rows(path, 6)
    write_yes_model(folder, path.read_text())
    command = [
        "audit",
        str(path),
        "--critic",
        str(folder),
        "--out",
        str(tmp_path),
        "--label_column",
        "rude",
    ]
    assert cli.main([*command, "--endpoint.format", "harmbench"]) == 0
    result = json.loads((tmp_path / "audit.json").read_text())
    assert result["critic"] == f"{folder} (harmbench)" and (result["n"], result["unjudged"]) == (
        6,
        0,
    )
    assert (
        number(result, "recall")["value"] == number(result, "false_positive_rate")["value"] == 1.0
    )
    assert cli.main([*command, "--endpoint.server_template"]) == 2
    assert "no server is asked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["audit", "FILE"], "rlbf audit needs .*--critic"),
        (
            ["audit", "FILE", "--critic", "nowhere", "--label_column", "rude"],
            "--critic nowhere: no such folder",
        ),
        (
            ["audit", "FILE", "--critic", "http", "--label_column", "rude"],
            "needs --endpoint.base_url",
        ),
        (["audit", "FILE", "--critic", "toy_lexicon"], "no column label"),
        (
            ["audit", "FILE", "--critic", "toy_lexicon", "--verdicts.threshold", "2"],
            "threshold is 2",
        ),
        (
            ["critic", "FILE", "--out", "OUT", "--label_column", "rude", "--folds", "1"],
            "--folds is 1, expected 0",
        ),
        (
            ["critic", "FILE", "--out", "OUT", "--label_column", "rude", "--folds", "40"],
            "distinct texts with it, at least",
        ),
        (["critic", "none.csv", "--out", "OUT"], "none.csv: no such file"),
    ],
)
def test_mistakes_are_told_on_one_line(tmp_path, capsys, command, message):
    write_rows(tmp_path / "rows.csv")
    places = {"FILE": str(tmp_path / "rows.csv"), "OUT": str(tmp_path / "out")}
    assert cli.main([places.get(part, part) for part in command]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert re.search(message, error), error


@pytest.mark.slow
def test_perspective_rows_five_fold(tmp_path):
    """The classifier's figure in docs/critics.md: mean AUC of five folds of at least 0.90."""
    data = os.environ.get("RLBF_JAX_DATA")
    if not data:
        pytest.skip("RLBF_JAX_DATA is not set: it names the folder of public data")
    path = pathlib.Path(data) / "perspective_wikipedia_2k.csv"
    assert (
        cli.main(["critic", str(path), "--out", str(tmp_path), "--label_column", "TOXICITY@6"]) == 0
    )
    result = json.loads((tmp_path / "audit.json").read_text())
    assert (result["n"], result["n_violating"], result["unjudged"]) == (2000, 265, 0)
    mean = number(result, "auc_mean_of_folds")
    assert mean["value"] >= 0.90 and mean["ci_low"] >= 0.90
    assert number(result, "calibration_error")["value"] <= 0.03
