"""Labelled files: what is read, and what is refused with file, line and field."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlbf_jax.data.sources.files import DataError
from rlbf_jax.data.sources.labelled import LabelledColumns, read_labelled


def write(tmp_path, text, name="rows.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_with_everything(tmp_path):
    path = write(
        tmp_path,
        'text,rude,loud,spans,town\n" a turnip",0.5,no,"[[3, 9]]",oslo\n'
        "pears,0.49,yes,,\nroses,true,1e-3,[],rome\n",
    )
    columns = LabelledColumns(
        None, ("rude", "loud"), span_column="spans", group_column=("town", "loud")
    )
    found = read_labelled(path, columns)
    assert found.texts == (" a turnip", "pears", "roses")
    assert found.categories == ("rude", "loud")
    assert found.labels.tolist() == [[True, False], [False, True], [True, False]]
    assert found.spans == (((3, 9),), (), ())
    assert {k: v.tolist() for k, v in found.groups.items()} == {
        "town=oslo": [True, False, False],
        "town=rome": [False, False, True],
        "loud": [False, True, False],
    }


def test_jsonl_and_thresholds(tmp_path):
    rows = [{"answer": "x", "label": True, "at": [[0, 1]]}, {"answer": "y", "label": 2, "at": None}]
    path = write(tmp_path, "".join(json.dumps(r) + "\n" for r in rows), "rows.jsonl")
    found = read_labelled(path, LabelledColumns(label_threshold=1.5, span_column="at"))
    assert found.labels.tolist() == [[False], [True]] and found.spans == (((0, 1),), ())
    assert read_labelled(path, LabelledColumns(label_threshold=1.5)).spans is None


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,label\nx,1\n", {}, "no text column text or comment_text.*--text_column"),
        ("text,label\nx,1\n", {"text_column": "words"}, "no text column words"),
        ("text,l\nx,1\n", {}, "no column label; the columns are text, l: choose --label_column"),
        ("text,label\nx,1\n", {"group_column": ("town",)}, "no column town.*--group_column"),
        ("text,label\nx,1\n", {"span_column": "at"}, "no column at.*--span_column"),
        ("text,label\nx,1\ny,maybe\n", {}, "line 3: field 'label' must be a number"),
        ("text,label\nx,\n", {}, "line 2: field 'label' must be a number"),
        ("text,label\nx,nan\n", {}, "line 2: field 'label' must be a number"),
        ("text,label\n ,1\n", {}, "line 2: field 'text' is empty"),
        (
            'text,label,at\nxy,1,"[[1, 3]]"\n',
            {"span_column": "at"},
            "line 2: field 'at' must be a list",
        ),
        (
            'text,label,at\nxy,1,"[[1, 1]]"\n',
            {"span_column": "at"},
            "line 2: field 'at' must be a list",
        ),
        ("text,label,at\nxy,1,[1]\n", {"span_column": "at"}, "line 2: field 'at' must be a list"),
        ("text,label,at\nxy,1,{\n", {"span_column": "at"}, "line 2: field 'at' must be a list"),
        ("text,label,at\nxy,1,true\n", {"span_column": "at"}, "line 2: field 'at' must be a list"),
        ("text,label\n", {}, "no usable row"),
        ("text,label\nx,1,2\n", {}, "line 2: 3 fields where the header has 2"),
    ],
)
def test_refusals_name_the_place(tmp_path, text, options, message):
    with pytest.raises(DataError, match=message):
        read_labelled(write(tmp_path, text), LabelledColumns(**options))


def test_a_number_of_hundreds_of_digits_is_no_label(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "x", "label": 1' + "0" * 400 + "}\n")
    with pytest.raises(DataError, match="rows.jsonl"):
        read_labelled(file, LabelledColumns())


@pytest.mark.parametrize(
    ("value", "threshold", "allowed"),
    [
        ("-1", 0.5, False),
        ("-0.01", 0.5, False),
        ("1.01", 0.5, False),
        ("2", 1.0, False),
        ("0", 0.5, True),
        ("1", 1.0, True),
        ("3", 2.0, True),
        ("-1", 2.0, False),
    ],
)
def test_a_label_must_be_on_the_scale(tmp_path, value, threshold, allowed):
    """-1 stands for "not labelled" in many files, and must not count as harmless."""
    path = write(tmp_path, f"text,label\nx,1\ny,{value}\n")
    columns = LabelledColumns(label_threshold=threshold)
    if allowed:
        assert read_labelled(path, columns).labels.shape == (2, 1)
        return
    with pytest.raises(DataError, match=f"line 3: field 'label' is {float(value):g}, expected 0"):
        read_labelled(path, columns)
    assert read_labelled(path, columns, tmp_path / "bad.jsonl").texts == ("x",)


def test_a_group_without_a_label_is_refused_too(tmp_path):
    path = write(tmp_path, "text,label,g\nx,1,0.9\ny,0,-1\n")
    with pytest.raises(DataError, match="line 3: field 'g' is -1"):
        read_labelled(path, LabelledColumns(group_column=("g",)))


def test_quarantine(tmp_path):
    path = write(tmp_path, "text,label\nx,1\ny,maybe\n")
    found = read_labelled(path, LabelledColumns(), tmp_path / "bad.jsonl")
    assert found.texts == ("x",)
    assert json.loads((tmp_path / "bad.jsonl").read_text())["line"] == 3


def test_columns_are_checked():
    for bad in ({"label_column": ()}, {"label_threshold": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LabelledColumns(**bad)


def test_a_group_of_numbers_without_a_value_is_not_in_it(tmp_path):
    path = write(
        tmp_path, '{"text": "x", "label": 1, "g": 0.9}\n{"text": "y", "label": 0}\n', "rows.jsonl"
    )
    groups = read_labelled(path, LabelledColumns(group_column=("g",))).groups
    np.testing.assert_array_equal(groups["g"], [True, False])
