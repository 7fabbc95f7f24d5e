"""A user's own prompts and responses, from CSV, JSONL or Parquet,
with errors that name file, line and field."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from rlbf_jax.data.sources.errors import DataError, MalformedRow, Records
from rlbf_jax.data.sources.parquet import parquet_records
from rlbf_jax.data.sources.tfds_tables import is_tfds, tfds_digest, tfds_records
from rlbf_jax.progress import say
from rlbf_jax.storage import file_digest, unique_fields

PROMPT_COLUMNS = ("instruction", "prompt", "question")
RESPONSE_COLUMNS = ("response", "answer", "output")
CONTEXT_COLUMNS = ("context", "input")
"""What a prompt may speak of: data sets of instructions have such a column."""
MAX_CHARACTERS = 131_072
"""Of a field. Longer ones are no prompts or answers: an unclosed quotation mark,
say, or a whole book."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One usable row of a file; both texts are stripped of surrounding white space."""

    prompt: str
    response: str
    line: int
    """Line of the file on which the row begins, from 1; of a Parquet file its number."""


def read_rows(
    path: str | pathlib.Path,
    prompt_column: str | None = None,
    response_column: str | None = None,
    context_column: str | None = None,
    *,
    quarantine: str | pathlib.Path | None = None,
) -> list[Row]:
    """Reads prompt/response pairs. Says so where a column looks like a context and is not read.

    Args:
        path: a `.csv` file with a header, a `.jsonl` file with one object a line (UTF-8), or a
          `.parquet` file; or `tfds:NAME[/CONFIG][:SPLIT]`, or the folder of a data set that TFDS
          has prepared.
        prompt_column: default: the first present of instruction, prompt, question.
        response_column: default: the first present of response, answer, output.
        context_column: a text of this column that is not blank stands behind the prompt, after an
          empty line; None or "": prompts stand alone.
        quarantine: a JSONL file to which malformed rows are written, with line and reason,
          instead of being refused.

    Raises:
        DataError: missing, empty or binary file, unknown column,
          or (without `quarantine`) a malformed row.
    """
    path = pathlib.Path(path)
    columns, records = open_table(path)
    prompt_name = _column(path, columns, prompt_column, PROMPT_COLUMNS, "prompt")
    response_name = _column(path, columns, response_column, RESPONSE_COLUMNS, "response")
    names = (prompt_name, response_name)
    context_name = _context(path, columns, context_column, names)

    def check(record: dict[str, Any]) -> str:
        wrong = complaint(record, names)
        context = record.get(context_name) if context_name else None
        if wrong or context is None or (isinstance(context, str) and not context.strip()):
            return wrong
        return complaint(record, (context_name,))

    kept = sift(path, records, check, quarantine, "a prompt and a response")
    return [
        Row(_prompt(record, prompt_name, context_name), record[response_name].strip(), line)
        for line, record in kept
    ]


def _context(
    path: pathlib.Path, columns: Sequence[str], wanted: str | None, used: Sequence[str]
) -> str:
    """The context's column; empty where there is none, with a remark if one looks like it."""
    if wanted:
        return _column(path, columns, wanted, (), "context")
    unread = [name for name in CONTEXT_COLUMNS if name in columns and name not in used]
    if unread and wanted is None:
        say(
            f"{path}: column {unread[0]} is not read; put it behind the prompts by "
            f"context_column {unread[0]}"
        )
    return ""


def _prompt(record: dict[str, Any], prompt_name: str, context_name: str) -> str:
    prompt = record[prompt_name].strip()
    context = (record.get(context_name) or "").strip() if context_name else ""
    return f"{prompt}\n\n{context}" if context else prompt


def table_digest(path: pathlib.Path) -> str:
    """SHA-256 (hex) of what `open_table` reads."""
    return tfds_digest(path) if is_tfds(path) else file_digest(path)


def open_table(path: pathlib.Path) -> tuple[list[str], Records]:
    """Columns and records of a `.csv`, `.jsonl` or `.parquet` file, or of a data set of TFDS.
    Raises DataError for what is no table."""
    if is_tfds(path):
        return tfds_records(path)
    if path.suffix.lower() == ".parquet":
        return parquet_records(path)
    text = read_text(path)
    if path.suffix.lower() == ".csv":
        return _csv_records(path, text)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _json_records(path, text)
    raise DataError(f"{path}: expected a name that ends in .csv, .jsonl or .parquet")


def sift(
    path: pathlib.Path,
    records: Records,
    check: Callable[[dict[str, Any]], str],
    quarantine: str | pathlib.Path | None,
    expected: str,
) -> list[tuple[int, dict[str, Any]]]:
    """The usable records of a file, with their lines; a malformed one is refused,
    or set aside in `quarantine`.

    Args:
        check: what is wrong with a record, empty where nothing is.
        expected: what each row must hold, for the message that there is no usable one.

    Raises:
        DataError: a malformed record (without `quarantine`), or no usable one.
    """
    kept: list[tuple[int, dict[str, Any]]] = []
    refused: list[dict[str, Any]] = []
    for line, record in records:
        reason = record if isinstance(record, str) else check(record)
        if reason and quarantine is None:
            raise MalformedRow(f"{path}, line {line}: {reason}; mend the row")
        if reason:
            refused.append({"file": str(path), "line": line, "reason": reason, "row": record})
        elif isinstance(record, dict):
            kept.append((line, record))
    if quarantine is not None and refused:
        out = pathlib.Path(quarantine)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            "".join(json.dumps(r, default=str) + "\n" for r in refused), encoding="utf-8"
        )
    if not kept:
        found = f"{len(refused)} malformed" if refused else "nothing below the header"
        raise DataError(f"{path}: no usable row ({found}); expected {expected} in each")
    return kept


def read_text(path: pathlib.Path) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises DataError:
    missing, empty, binary, not UTF-8."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: a NUL byte; expected UTF-8 text, this looks binary (or UTF-16)"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8; save it as UTF-8"
        ) from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


def _csv_records(path: pathlib.Path, text: str) -> tuple[list[str], Records]:
    csv.field_size_limit(
        max(csv.field_size_limit(), len(text))
    )  # `complaint` names a long field and its line
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader)]
    except csv.Error as error:
        raise DataError(f"{path}, line 1: {error}") from None
    separators = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
    if found := [
        word for mark, word in separators.items() if len(header) == 1 and mark in header[0]
    ]:
        raise DataError(
            f"{path}, line 1: one column, with {found[0]} in its name; fields must be separated by "
            "commas: save the file so"
        )
    if len(set(header)) != len(header):
        raise DataError(f"{path}, line 1: a column name occurs twice in {', '.join(header)}")

    def records() -> Records:
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(
                    f"{path}, line {line}: {error}; is a quotation mark left open?"
                ) from None
            if not fields:
                continue
            if len(fields) != len(header):
                yield line, f"{len(fields)} fields where the header has {len(header)}"
            else:
                yield line, dict(zip(header, fields, strict=True))

    return header, records()


def _json_records(path: pathlib.Path, text: str) -> tuple[list[str], Records]:
    parsed: list[tuple[int, dict[str, Any] | str]] = []
    # Not splitlines(): U+2028 and its like are legal inside JSON strings.
    for line, part in enumerate(text.split("\n"), 1):
        if not part.strip():
            continue
        try:
            record = json.loads(part, object_pairs_hook=unique_fields)
        except json.JSONDecodeError as error:
            parsed.append((line, f"not JSON ({error.msg} at column {error.colno})"))
            continue
        except ValueError as error:  # a name twice, or a number of thousands of digits
            parsed.append((line, str(error)))
            continue
        except RecursionError:
            parsed.append((line, "JSON nested too deeply"))
            continue
        parsed.append(
            (
                line,
                record
                if isinstance(record, dict)
                else f"a JSON object expected, not {_kind(record)}",
            )
        )
    objects = [record for _, record in parsed if isinstance(record, dict)]
    if not objects or isinstance(parsed[0][1], str):
        _refuse_one_value(path, text)
    if not objects:
        line, reason = parsed[0]
        raise DataError(f"{path}, line {line}: {reason}; no line holds a JSON object")
    columns = list(dict.fromkeys(name for record in objects for name in record))
    return columns, iter(parsed)


def _refuse_one_value(path: pathlib.Path, text: str) -> None:
    """Raises DataError where a file is one JSON value, which is no JSON lines."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(whole, list) or (isinstance(whole, dict) and "\n" in text.strip()):
        what = "array" if isinstance(whole, list) else "object over several lines"
        raise DataError(
            f"{path}: one JSON {what}; expected one object a line (`jq -c '.[]'` takes an array "
            "apart, `jq -c .` puts an object on a line)"
        )


def _column(
    path: pathlib.Path,
    columns: Sequence[str],
    wanted: str | None,
    defaults: Sequence[str],
    kind: str,
) -> str:
    names = defaults if wanted is None else (wanted,)
    for name in names:
        if name in columns:
            return name
    raise DataError(
        f"{path}: no {kind} column {' or '.join(names)}; the columns are {', '.join(columns)}: "
        f"choose {kind}_column"
    )


def complaint(record: dict[str, Any], names: Sequence[str]) -> str:
    """What is wrong with the texts of a record under `names`,
    each of which must be there; empty: nothing."""
    for name in names:
        if name not in record:
            return f"field {name!r} is missing"
        value = record[name]
        if not isinstance(value, str):
            return f"field {name!r} must be text, not {_kind(value)}"
        if not value.strip():
            return f"field {name!r} is empty"
        if len(value) > MAX_CHARACTERS:
            return (
                f"field {name!r} has {len(value)} characters, at most {MAX_CHARACTERS} are expected"
            )
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return (
                f"field {name!r} has a lone surrogate at character {error.start}, which is not "
                "valid Unicode"
            )
    return ""


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")
