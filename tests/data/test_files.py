"""Reading a user's files: default columns, line numbers, refusals, quarantine."""

import csv
import datetime
import json
import pathlib

import numpy as np
import pyarrow
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from rlbf_jax.data.sources import tfds_tables
from rlbf_jax.data.sources.files import DataError, Row, read_rows, table_digest


def write(tmp_path, name, text, encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def test_csv_default_columns_and_lines(tmp_path):
    text = 'instruction,context,response\n"Why,\nso?",,"Be\ncause."\nHow?,x, Well. \n'
    assert read_rows(write(tmp_path, "a.csv", "\ufeff" + text)) == [
        Row("Why,\nso?", "Be\ncause.", 2),
        Row("How?", "Well.", 5),
    ]


def test_jsonl_default_and_named_columns(tmp_path):
    path = write(
        tmp_path,
        "a.jsonl",
        '{"question": "q", "answer": "a\\u2028b", "output": "o"}\n\n'
        '{"question": "r", "answer": "s"}\n',
    )
    assert read_rows(path) == [Row("q", "a\u2028b", 1), Row("r", "s", 3)]
    with pytest.raises(DataError, match=r"line 3: field 'output' is missing"):
        read_rows(path, response_column="output")
    with pytest.raises(
        DataError, match=r"no prompt column wrong; the columns are question, answer, output"
    ):
        read_rows(path, prompt_column="wrong")


CONTEXT = "instruction,context,response\nSum up,The moon is far.,Far.\nHello, ,Hi.\n"


def test_a_context_stands_behind_its_prompt(tmp_path, capsys):
    path = write(tmp_path, "a.csv", CONTEXT)
    rows = read_rows(path, context_column="context")
    assert [row.prompt for row in rows] == ["Sum up\n\nThe moon is far.", "Hello"]
    assert capsys.readouterr().err == ""
    with pytest.raises(DataError, match="no context column contexts; the columns are"):
        read_rows(path, context_column="contexts")


@pytest.mark.parametrize("name", ["context", "input"])
def test_a_context_that_is_not_read_is_said(name, tmp_path, capsys):
    path = write(tmp_path, "a.csv", CONTEXT.replace("context", name))
    assert [row.prompt for row in read_rows(path)] == ["Sum up", "Hello"]
    assert f"column {name} is not read; put it behind the prompts" in capsys.readouterr().err
    read_rows(path, context_column="")
    read_rows(path, prompt_column=name, quarantine=tmp_path / "q.jsonl")
    assert capsys.readouterr().err == ""


def test_a_context_that_is_no_text_is_malformed(tmp_path):
    good = '{"prompt": "p", "context": null, "response": "r"}\n'
    path = write(tmp_path, "a.jsonl", good + good.replace("null", "3"))
    with pytest.raises(DataError, match="line 2: field 'context' must be text, not a number"):
        read_rows(path, context_column="context")


fields = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1
).filter(lambda s: s.strip())


@given(st.lists(st.tuples(fields, fields), min_size=1, max_size=5))
def test_what_is_written_is_read(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("f")
    with open(folder / "a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("prompt", "output"), *pairs])
    (folder / "a.jsonl").write_bytes(
        b"".join(json.dumps({"prompt": p, "output": o}).encode() + b"\n" for p, o in pairs)
    )
    want = [(p.strip(), o.strip()) for p, o in pairs]
    for name in ("a.csv", "a.jsonl"):
        assert [(r.prompt, r.response) for r in read_rows(folder / name)] == want


GOOD = '{"prompt": "p", "response": "r"}\n'
BAD_LINES = [
    ("{nope", "not JSON"),
    ("[1]", "object expected, not a list"),
    ('{"prompt": "p"}', "field 'response' is missing"),
    ('{"prompt": 3, "response": "r"}', "field 'prompt' must be text, not a number"),
    ('{"prompt": "p", "response": null}', "field 'response' must be text, not null"),
    ('{"prompt": "p", "response": "  "}', "field 'response' is empty"),
    ('{"prompt": "p\\ud800", "response": "r"}', "lone surrogate"),
    ("[" * 100_000, "nested|not JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_malformed_rows_are_refused_or_quarantined(tmp_path, line, reason):
    path = write(tmp_path, "a.jsonl", GOOD + line + "\n" + GOOD)
    with pytest.raises(DataError, match=f"line 2: .*({reason})"):
        read_rows(path)
    rows = read_rows(path, quarantine=tmp_path / "bad" / "rows.jsonl")
    assert [row.line for row in rows] == [1, 3]
    [kept] = [json.loads(x) for x in (tmp_path / "bad" / "rows.jsonl").read_text().splitlines()]
    assert kept["line"] == 2


def test_csv_rows_of_wrong_length(tmp_path):
    path = write(tmp_path, "a.csv", "prompt,response\na,b\nc\nd,e,f\n\ng,h\n")
    with pytest.raises(DataError, match="line 3: 1 fields where the header has 2"):
        read_rows(path)
    assert [row.line for row in read_rows(path, quarantine=tmp_path / "q.jsonl")] == [2, 6]
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.csv", "", "is empty"),
        ("a.jsonl", " \n\n", "is empty"),
        ("a.csv", b"prompt,response\na,\0\n", "line 2: a NUL byte"),
        ("a.csv", b"prompt,response\na,\xff\n", "line 2: byte 0xff is not UTF-8"),
        ("a.csv", 'prompt,response\na,"b\n', "line 2: .*quotation mark"),
        ("a.csv", "prompt,prompt\na,b\n", "occurs twice"),
        ("a.csv", "prompt,response\n", "no usable row"),
        (
            "a.csv",
            "x,y\n1,2\n",
            "no prompt column instruction or prompt or question; the columns are x, y",
        ),
        ("a.jsonl", "[1]\n", "one JSON array; expected one object a line"),
        ("a.jsonl", '[\n{"prompt": "a"},\n{"prompt": "b"}\n]\n', "one JSON array"),
        ("a.jsonl", '{\n"prompt": "a",\n"response": "b"\n}\n', "one JSON object over several"),
        ("a.jsonl", "3\n", "line 1: .*no line holds a JSON object"),
        ("a.csv", "prompt;response\na;b\n", "one column, with semicolons in its name"),
        ("a.csv", "prompt\tresponse\na\tb\n", "one column, with tabs in its name"),
        ("a.csv", "sep=;\nprompt;response\na;b\n", "one column, with semicolons in its name"),
        ("a.txt", "x", "ends in .csv, .jsonl or .parquet"),
    ],
)
def test_unusable_files(tmp_path, name, text, reason):
    with pytest.raises(DataError, match=reason):
        read_rows(write(tmp_path, name, text))


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "none.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path)


# Data sets of TFDS ------------------------------------------------------------------------------


def write_tfds(parent, name, splits):
    """A data set of texts as TFDS prepares it; returns its folder."""
    folder = parent / name / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {"prompt": tfds.features.Text(), "answer": tfds.features.Text(), "count": np.int64}
    )
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name="none"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features, disable_shuffling=True)
    writer = tfds.core.SequentialWriter(info, 5, file_format="array_record")
    writer.initialize_splits(list(splits))
    for split, rows in splits.items():
        examples = [{"prompt": p, "answer": a, "count": i} for i, (p, a) in enumerate(rows)]
        writer.add_examples({split: examples})
    writer.close_all()
    return folder


def test_a_data_set_of_tfds_gives_its_rows_by_folder_and_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_tables, "ROWS_AT_ONCE", 4)
    train = [(f"ask {i} ä", f"say {i}") for i in range(11)]
    splits = {"train": train, "test": [("other", "row")]}
    folder = write_tfds(tmp_path, "asked_things", splits)
    wanted = [Row(p, a, i) for i, (p, a) in enumerate(train, 1)]
    assert read_rows(folder) == wanted
    tfds.core.add_data_dir(str(tmp_path))
    assert read_rows("tfds:asked_things") == wanted
    assert read_rows("tfds:asked_things:test") == [Row("other", "row", 1)]
    assert table_digest(folder) == table_digest(pathlib.Path("tfds:asked_things"))
    other = write_tfds(tmp_path / "more", "asked_things", {"train": [*train[1:], ("x", "y")]})
    assert table_digest(other) != table_digest(folder)
    for name, reason in {
        "tfds:asked_things:nothing": "has no split nothing; it has train, test",
        "tfds:no_such_things": "cannot be read as a data set of TFDS",
        "tfds:": "expected tfds:NAME",
    }.items():
        with pytest.raises(DataError, match=reason):
            read_rows(name)
    for shard in folder.glob("*train*"):
        shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(DataError, match="cannot be read as a data set of TFDS"):
        read_rows(folder)


# Parquet ----------------------------------------------------------------------------------------


def write_parquet(path, columns):
    parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


def test_parquet_gives_the_rows_of_the_same_jsonl(tmp_path, monkeypatch):
    monkeypatch.setattr("rlbf_jax.data.sources.parquet.ROWS_AT_ONCE", 4)
    pairs = [(f"ask {i} ä", f" say\u2028{i} ") for i in range(11)]
    columns = {"id": list(range(11)), "question": [p for p, _ in pairs]}
    columns |= {"answer": [r for _, r in pairs], "input": ["c", None] * 5 + [" "]}
    lines = [
        json.dumps(dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    ]
    text = write(tmp_path, "a.jsonl", "".join(f"{line}\n" for line in lines))
    table = write_parquet(tmp_path / "a.parquet", columns)
    for context in ("", "input"):
        assert read_rows(table, context_column=context) == read_rows(text, context_column=context)
    assert read_rows(table)[3] == Row("ask 3 ä", "say\u20283", 4)


def test_parquet_rows_that_are_malformed_are_refused_or_quarantined(tmp_path):
    day = datetime.date(2026, 1, 2)
    columns = {"prompt": ["a", None, "c"], "response": ["b", "b", "d"], "on": [day] * 3}
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match="line 2: .*prompt"):
        read_rows(path)
    rows = read_rows(path, quarantine=tmp_path / "q.jsonl")
    assert [row.line for row in rows] == [1, 3]
    assert json.loads((tmp_path / "q.jsonl").read_text())["row"]["on"] == "2026-01-02"


def test_unusable_parquet_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_rows(write(tmp_path, "a.parquet", "prompt,response\na,b\n"))
    with pytest.raises(DataError, match="no prompt column"):
        read_rows(write_parquet(tmp_path / "b.parquet", {"x": ["1"]}))
    with pytest.raises(DataError, match="no usable row"):
        read_rows(
            write_parquet(
                tmp_path / "c.parquet",
                {"prompt": pyarrow.array([], "string"), "answer": pyarrow.array([], "string")},
            )
        )
    columns = {"prompt": ["some text"] * 2000, "answer": [f"{i} more text" for i in range(2000)]}
    whole = write_parquet(tmp_path / "d.parquet", columns).read_bytes()
    (tmp_path / "e.parquet").write_bytes(whole[:200] + b"\xff" * 400 + whole[600:])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_rows(tmp_path / "e.parquet")
