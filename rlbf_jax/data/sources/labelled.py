"""Texts with labels, spans and groups, from CSV or JSONL, for training and auditing critics."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlbf_jax.data.sources.files import DataError, complaint, open_table, sift

TEXT_COLUMNS = ("text", "comment_text", "response", "answer", "output")
_TRUE, _FALSE = ("true", "yes"), ("false", "no")


@dataclasses.dataclass(frozen=True)
class LabelledColumns:
    """Which columns of a file mean what."""

    text_column: str | None = None
    """Default: the first present of text, comment_text, response, answer, output."""
    label_column: tuple[str, ...] = ("label",)
    """Shares in 0..1, true/false or yes/no; a text with a value of at least `label_threshold`
    violates. With several columns each is a category."""
    label_threshold: float = 0.5
    """Above 1 the labels are of another scale, as 1 to 5."""
    span_column: str | None = None
    """List of [start, end] characters (as JSON, in a CSV cell too) that violate."""
    group_column: tuple[str, ...] = ()
    """Numbers (a text belongs to the group from `label_threshold` on) or words
    (each value is a group); empty: none."""

    def __post_init__(self):
        if not self.label_column:
            raise ValueError("label_column is empty, expected at least one column")
        if not math.isfinite(self.label_threshold):
            raise ValueError(f"label_threshold is {self.label_threshold}, expected a number")


@dataclasses.dataclass(frozen=True)
class LabelledTexts:
    """N texts with what people say of them."""

    texts: tuple[str, ...]
    categories: tuple[str, ...]
    labels: np.ndarray
    """bool [N, C]"""
    spans: tuple[tuple[tuple[int, int], ...], ...] | None
    """(start, end) characters of each text's violations; None: the file has none."""
    groups: dict[str, np.ndarray]
    """Name -> bool [N], the texts that belong to it."""


def read_labelled(
    path: str | pathlib.Path, columns: LabelledColumns, quarantine: str | pathlib.Path | None = None
) -> LabelledTexts:
    """Reads labelled texts.

    Texts are kept as they stand, since spans count their characters.

    Raises:
        DataError: missing, empty or binary file, unknown column,
          or (without `quarantine`) a malformed row.
    """
    path = pathlib.Path(path)
    found, records = open_table(path)
    text_name = columns.text_column or next((name for name in TEXT_COLUMNS if name in found), None)
    wanted = [
        *columns.label_column,
        *columns.group_column,
        *([columns.span_column] if columns.span_column else []),
    ]
    if text_name is None or text_name not in found:
        raise DataError(
            f"{path}: no text column {text_name or ' or '.join(TEXT_COLUMNS)}; "
            f"{_choose(found, 'text_column')}"
        )
    for name in wanted:
        if name not in found:
            option = next(
                f
                for f in ("label_column", "group_column", "span_column")
                if name in (getattr(columns, f) or ())
            )
            raise DataError(f"{path}: no column {name}; {_choose(found, option)}")

    def check(record: dict[str, Any]) -> str:
        reasons = (
            complaint(record, (text_name,)),
            *(_label_complaint(record, name, columns) for name in columns.label_column),
            *(_scale_complaint(record, name, math.inf) for name in columns.group_column),
            _spans_complaint(record, columns.span_column, text_name) if columns.span_column else "",
        )
        return next(filter(None, reasons), "")

    rows = [record for _, record in sift(path, records, check, quarantine, "a text and a label")]
    labels = [
        [_number(row[name]) >= columns.label_threshold for name in columns.label_column]
        for row in rows
    ]
    return LabelledTexts(
        texts=tuple(row[text_name] for row in rows),
        categories=tuple(columns.label_column),
        labels=np.array(labels, bool),
        spans=None
        if columns.span_column is None
        else tuple(_spans(row[columns.span_column]) for row in rows),
        groups={
            k: v
            for name in columns.group_column
            for k, v in _groups(rows, name, columns.label_threshold).items()
        },
    )


def _choose(found: Sequence[str], option: str) -> str:
    return f"the columns are {', '.join(found)}: choose --{option}"


def _number(value: Any) -> float:
    """A label as a number; NaN for what is none."""
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _TRUE or word in _FALSE:
            return float(word in _TRUE)
        try:
            number = float(word)
        except ValueError:
            return math.nan
        return number if math.isfinite(number) else math.nan
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        return math.nan
    return number if math.isfinite(number) else math.nan


def _label_complaint(record: dict[str, Any], name: str, columns: LabelledColumns) -> str:
    if name not in record:
        return f"field {name!r} is missing"
    if math.isnan(_number(record[name])):
        return f"field {name!r} must be a number, true/false or yes/no"
    return _scale_complaint(record, name, 1 if columns.label_threshold <= 1 else math.inf)


def _scale_complaint(record: dict[str, Any], name: str, most: float) -> str:
    """A number out of the scale: -1, say, stands for "no label" in many files, and is no 0."""
    number = _number(record.get(name))
    if number < 0 or number > most:
        return (
            f"field {name!r} is {number:g}, expected 0 to 1 (a row without a label is none to "
            "learn from; for another scale give a label_threshold above 1)"
        )
    return ""


def _spans(value: Any) -> tuple[tuple[int, int], ...]:
    listed = json.loads(value) if isinstance(value, str) and value.strip() else value or []
    return tuple((start, end) for start, end in listed)


def _spans_complaint(record: dict[str, Any], name: str, text_name: str) -> str:
    expected = (
        f"field {name!r} must be a list of [start, end] with 0 <= start < end <= characters of "
        "the text"
    )
    try:
        for start, end in _spans(record[name]):
            if (
                type(start) is not int
                or type(end) is not int
                or not 0 <= start < end <= len(record[text_name])
            ):
                return expected
    except KeyError:
        return f"field {name!r} is missing"
    except (TypeError, ValueError, RecursionError):
        return expected
    return ""


def _groups(rows: Sequence[dict[str, Any]], name: str, threshold: float) -> dict[str, np.ndarray]:
    """Groups of a column: one where all its values are numbers, otherwise one a value."""
    values = [row.get(name) for row in rows]
    present = [value for value in values if value is not None and str(value).strip()]
    if all(not math.isnan(_number(value)) for value in present):
        numbers = [_number(value) if value is not None else math.nan for value in values]
        return {name: np.array([number >= threshold for number in numbers])}
    words = [str(value).strip() if value is not None else "" for value in values]
    return {
        f"{name}={word}": np.array([w == word for w in words])
        for word in sorted(set(words))
        if word
    }
