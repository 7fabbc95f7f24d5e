"""Public benchmarks, each read from the file that its authors publish, at a path the user gives.
Nothing is shipped.

`FORMATS` has one row a benchmark: which columns are what, how many rows there should be, where the
file is from. Adding a benchmark is adding a row.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, Literal

from rlbf_jax.data.sources.files import (
    DataError,
    Records,
    complaint,
    open_table,
    read_text,
    sift,
)

Message = tuple[str, str]
"""(role, content)."""

_ROLES = ("system", "user", "assistant")
_TABLE = (".csv", ".jsonl", ".ndjson")


@dataclasses.dataclass(frozen=True)
class Behavior:
    """One row of a benchmark."""

    id: str
    """Unique within the file."""
    prompt: str
    """What the user asks (in a conversation: last); stripped of surrounding white space."""
    benchmark: str
    """Name of the row in `FORMATS`."""
    context: str = ""
    """A text that the prompt speaks of (HarmBench's contextual behaviors)."""
    category: str = ""
    target: str = ""
    """How a compliant answer begins, where the benchmark says."""
    harmful: bool | None = None
    """Whether complying would be wrong; None: the benchmark does not say."""
    tags: tuple[str, ...] = ()
    history: tuple[Message, ...] = ()
    """Earlier messages of a conversation."""

    @property
    def request(self) -> str:
        """The user's whole turn: context, rule line, prompt, as HarmBench puts them together."""
        return f"{self.context}\n\n---\n\n{self.prompt}" if self.context else self.prompt


@dataclasses.dataclass(frozen=True)
class Format:
    """Where a benchmark's file has what. Names are columns; empty: there is none."""

    prompt: str
    counts: tuple[int, ...]
    """Rows of the published files; empty: any number."""
    source: str
    """Where the file is published, and its licence as far as it is stated there."""
    kind: Literal["table", "lines", "chat"] = "table"
    """CSV with a header or JSONL; one prompt a line;
    JSONL with a list of messages in column `prompt`."""
    id: str = ""
    """Without one the id is the row's number, from 0."""
    category: str = ""
    target: str = ""
    context: str = ""
    tags: tuple[str, ...] = ()
    """Columns whose values become tags; in one called Tags commas part them."""
    optional: tuple[str, ...] = ()
    """Columns that may be missing."""
    harmful: bool | None | tuple[str, Mapping[str, bool]] = True
    """For all rows, or (column, {its value: harmful})."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read, in the order above."""
        label = self.harmful[0] if isinstance(self.harmful, tuple) else ""
        named = (self.id, self.prompt, self.category, self.target, self.context, label, *self.tags)
        return tuple(dict.fromkeys(name for name in named if name))


_JAILBREAKBENCH = Format(
    "Goal", (100,),
    "https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors (harmful-behaviors.csv, MIT)",
    id="Index", category="Category", target="Target", tags=("Behavior", "Source"),
)  # fmt: skip

FORMATS: dict[str, Format] = {
    "harmbench": Format(
        "Behavior", (80, 320, 400),
        "https://github.com/centerforaisafety/HarmBench (behavior_datasets, MIT)", id="BehaviorID",
        category="SemanticCategory", context="ContextString", tags=("FunctionalCategory", "Tags"),
    ),
    "advbench": Format(
        "goal", (520,), "https://github.com/llm-attacks/llm-attacks (harmful_behaviors.csv, MIT)",
        target="target",
    ),
    "strongreject": Format(
        "forbidden_prompt", (60, 313), "https://github.com/alexandrasouly/strongreject (MIT)",
        category="category", tags=("source",),
    ),
    "jailbreakbench": _JAILBREAKBENCH,
    "jailbreakbench_benign": dataclasses.replace(
        _JAILBREAKBENCH, harmful=False, source=_JAILBREAKBENCH.source.replace("harmful-", "benign-")
    ),
    "malicious_instruct": Format(
        "line", (100,),
        "https://github.com/Princeton-SysML/Jailbreak_LLM (data/MaliciousInstruct.txt)",
        kind="lines",
    ),
    "do_not_answer": Format(
        "question", (939,),
        "https://github.com/Libr-AI/do-not-answer (data_en.csv, or its rows as JSONL)", id="id",
        category="risk_area", tags=("types_of_harm", "specific_harms"),
    ),
    "xstest": Format(
        "prompt", (450,),
        "https://github.com/paul-rottger/exaggerated-safety (xstest_prompts.csv, CC-BY-4.0)",
        id="id", category="type", tags=("focus", "note"),
        harmful=("label", {"safe": False, "unsafe": True}),
    ),
    "oktest": Format(
        "prompt", (300,),
        "https://github.com/InvokerStark/OverKill (data/OKTest.csv, no licence stated)",
        harmful=False,
    ),
    "chat": Format(
        "conversation", (),
        "JSONL in the shape of LMSYS-Chat-1M (a licence agreement of its own), one object a line",
        kind="chat", id="conversation_id", tags=("language",), optional=("language",), harmful=None,
    ),
}  # fmt: skip
"""By name. Columns beyond those named here are ignored."""


def load_benchmark(
    name: str,
    path: str | pathlib.Path,
    *,
    leave_out: Collection[str] = (),
    quarantine: str | pathlib.Path | None = None,
) -> list[Behavior]:
    """Reads a benchmark's published file: all of it, or an error.

    Args:
      name: of `FORMATS`.
      path: the file; UTF-8 with or without a byte order mark.
      leave_out: rows with one of these tags or categories are not returned, as `{"copyright"}` of
        HarmBench, whose judge needs hashes that are not published.
      quarantine: a JSONL file to which malformed rows are written, with line and reason,
        instead of being refused.

    Raises:
      DataError: unknown name, a file that is missing, empty, binary or not UTF-8,
        a missing or repeated column, a malformed row, an id that occurs twice,
        a tag to leave out that no row has, or nothing left.
    """
    path = pathlib.Path(path)
    if name not in FORMATS:
        raise DataError(f"benchmark {name!r}: no such benchmark; there are {', '.join(FORMATS)}")
    form = FORMATS[name]
    if not path.exists():  # before its name is looked at
        raise DataError(f"{path}: no such file")
    columns, records = _lines(path) if form.kind == "lines" else _table(path, form)
    if missing := [
        column for column in form.columns if column not in columns and column not in form.optional
    ]:
        raise DataError(
            f"{path}: column {missing[0]!r} of {name} is missing; the columns are "
            f"{', '.join(columns)}; "
            f"expected the file as published: {form.source}"
        )
    check = functools.partial(_check, form, {})
    kept = sift(path, records, check, quarantine, f"a {form.prompt}")
    behaviors = [_behavior(name, form, number, record) for number, (_, record) in enumerate(kept)]
    left = [b for b in behaviors if not {b.category, *b.tags} & set(leave_out)]
    known = {value for b in behaviors for value in (b.category, *b.tags)}
    if unknown := sorted(set(leave_out) - known):
        raise DataError(
            f"{path}: no row has the tag or category {unknown[0]!r} that is to be left out"
        )
    if not left:
        raise DataError(f"{path}: every row is left out by {', '.join(sorted(leave_out))}")
    return left


def count_remark(name: str, count: int) -> str:
    """Says that a file has another number of rows than any published one; else empty."""
    published = FORMATS[name].counts
    if not published or count in published:
        return ""
    return f"{name}: {count} rows, where the published file has {' or '.join(map(str, published))}"


def _table(path: pathlib.Path, form: Format) -> tuple[list[str], Records]:
    if form.kind == "chat" and path.suffix.lower() == ".csv":
        raise DataError(f"{path}: conversations are lists, which CSV cannot hold; expected JSONL")
    if path.suffix.lower() not in _TABLE:
        raise DataError(f"{path}: expected a name that ends in {' or '.join(_TABLE[:2])}")
    return open_table(path)


def _lines(path: pathlib.Path) -> tuple[list[str], Records]:
    if path.suffix.lower() in _TABLE:
        raise DataError(f"{path}: expected a text file with one prompt a line, not a table")
    lines = read_text(path).split("\n")
    found = (
        (number, {"line": line.rstrip("\r")})
        for number, line in enumerate(lines, 1)
        if line.strip()
    )
    return ["line"], found


def _check(form: Format, seen: dict[str, int], record: dict[str, Any]) -> str:
    """What is wrong with a record; empty: nothing.
    `seen` collects ids with the order in which they came."""
    required = tuple(name for name in (form.target,) if name)
    wrong = _conversation_complaint(record, form.prompt) if form.kind == "chat" else ""
    wrong = wrong or complaint(
        record, required if form.kind == "chat" else (form.prompt, *required)
    )
    wrong = wrong or next(
        filter(None, (_field_complaint(form, record, name) for name in form.columns)), ""
    )
    if wrong or not form.id:
        return wrong
    id_ = str(record[form.id]).strip()
    if not id_:
        return f"field {form.id!r} is empty"
    if id_ in seen:
        return f"{form.id} {id_[:60]!r} occurs twice, first in row {seen[id_]}"
    seen[id_] = len(seen) + 1
    return ""


def _field_complaint(form: Format, record: dict[str, Any], name: str) -> str:
    """Of the fields that may be empty, or numbers: ids, labels, categories, contexts, tags."""
    if name == form.prompt or (name not in record and name in form.optional):
        return ""
    if name not in record:
        return f"field {name!r} is missing"
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, str | int):
        return f"field {name!r} must be text or a whole number"
    if isinstance(value, str) and value and (wrong := complaint(record, (name,))):
        return wrong
    if isinstance(form.harmful, tuple) and name == form.harmful[0] and value not in form.harmful[1]:
        return f"field {name!r} is {str(value)[:40]!r}, expected {' or '.join(form.harmful[1])}"
    return ""


def _conversation_complaint(record: dict[str, Any], name: str) -> str:
    messages = record.get(name)
    if not isinstance(messages, list) or not messages:
        return f"field {name!r} must be a list of messages"
    for index, message in enumerate(messages):
        where = f"message {index} of field {name!r}"
        if not isinstance(message, dict):
            return f"{where} must be an object with role and content"
        if message.get("role") not in _ROLES:
            return f"{where}: role must be {', '.join(_ROLES[:-1])} or {_ROLES[-1]}"
        content = message.get("content")
        if not isinstance(content, str):
            return f"{where}: content must be text"
        if content.strip() and (wrong := complaint({"content": content}, ("content",))):
            return f"{where}: {wrong}"
    last = _last_user(messages)
    if last is None:
        return f"field {name!r} has no message of the user"
    return (
        ""
        if messages[last]["content"].strip()
        else f"the user's last message in field {name!r} is empty"
    )


def _last_user(messages: list[dict[str, Any]]) -> int | None:
    return next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "user"), None)


def _behavior(name: str, form: Format, number: int, record: dict[str, Any]) -> Behavior:
    def text(column: str) -> str:
        return str(record.get(column, "")).strip() if column else ""

    history: tuple[Message, ...] = ()
    prompt = record[form.prompt]
    if form.kind == "chat":
        messages = prompt
        last = _last_user(messages) or 0
        history = tuple((m["role"], m["content"]) for m in messages[:last])
        prompt = messages[last]["content"]
    label = (
        form.harmful[1][text(form.harmful[0])] if isinstance(form.harmful, tuple) else form.harmful
    )
    tags = [tag.strip() for column in form.tags for tag in _split(column, text(column))]
    return Behavior(
        id=text(form.id) or str(number),
        prompt=prompt.strip(),
        benchmark=name,
        context=text(form.context),
        category=text(form.category),
        target=text(form.target),
        harmful=label,
        tags=tuple(tag for tag in tags if tag),
        history=history,
    )


def _split(column: str, value: str) -> list[str]:
    """HarmBench's Tags is a list; other columns are phrases that may hold commas."""
    return value.split(",") if column == "Tags" else [value]
