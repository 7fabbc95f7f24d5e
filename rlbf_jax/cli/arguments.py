"""Command lines to dataclasses by tyro; a mistake is told on one line,
with the nearest right option."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from rlbf_jax.errors import UserError

_RULE = re.compile(r"^\s*[─-]{8,}\s*$")
_OPTION = re.compile(r"^ {4}(--[\w.-]+)", re.MULTILINE)
_REQUIRED = re.compile(r"^ {4}(\S.*)$", re.MULTILINE)
_MOST_SUGGESTIONS = 3


def parse(kind: Any, prog: str, rest: Sequence[str], description: str | None = None) -> Any:
    """An instance of `kind` (a dataclass) from the arguments `rest` of the command `prog`.

    Raises:
        UserError: an unknown option (names the nearest one), a missing value,
          or one of the wrong type or out of range.
        SystemExit: code 0, after `--help` was printed.
    """

    def read() -> Any:
        values = (tyro.conf.EnumChoicesFromValues,)  # `--semantics keep`, as in results.json
        return tyro.cli(
            kind,
            prog=prog,
            args=list(rest),
            use_underscores=True,
            description=description,
            config=values,
        )

    if {"-h", "--help"} & set(rest):
        return read()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _unwrapped():
            return read()
    except SystemExit as stop:
        if stop.code in (0, None):
            sys.stderr.write(said.getvalue())
            raise
    # Outside the handler: the exception of a mistake needs no SystemExit as its context.
    raise mistake(said.getvalue(), prog)


def names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


@contextlib.contextmanager
def quarantine_offered() -> Iterator[None]:
    """For commands that have --quarantine: a malformed row is told with that way out."""
    try:
        yield
    except UserError as error:
        from rlbf_jax.data.sources.files import MalformedRow

        if not isinstance(error, MalformedRow):
            raise
        raise UserError(f"{error}, or go on without it by --quarantine FILE") from error


class UnknownOption(UserError):
    """An option that the command does not have."""

    def __init__(self, option: str, hint: str, listed: str):
        super().__init__(f"{option}: no such option{hint}; {listed}")
        self.option, self.hint, self.listed = option, hint, listed


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Makes tyro's boxes wide enough that no path or name is broken in two."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "4000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def mistake(box: str, prog: str) -> UserError:
    """tyro's box of 3 to 30 lines as one line; text of an unknown shape is joined as it stands."""
    framed = (
        "╭" in box
    )  # without Unicode on standard output: a title, a rule, and sections below it
    lines = [
        line.rstrip().removesuffix("│").removeprefix("│").rstrip() for line in box.splitlines()
    ]
    sections = [""]
    for line in lines:
        if _RULE.match(line):
            sections.append("")
        elif line.strip() and "╭" not in line and "╰" not in line:
            sections[-1] += line.removeprefix(" " if framed else "  ") + "\n"
    if not framed:
        sections = sections[1:] or sections
    first = " ".join(sections[0].split())
    more = sections[1] if len(sections) > 2 else ""
    listed = f"`{prog} --help` lists all options"
    if first.startswith("Unrecognized options:"):
        return _unknown(first, more, listed)
    if first.startswith("Missing from"):
        return UserError(f"{prog} needs {', '.join(_REQUIRED.findall(sections[0]))}; {listed}")
    if parsing := re.match(r"Error parsing (?:config\.)?([^:]+): (.*)", first):
        usage = more.split("\n")[1].strip() if more.startswith("Argument helptext") else ""
        return UserError(f"{parsing[1]}: {parsing[2]}" + (f"; expected {usage}" if usage else ""))
    return UserError(first or f"{prog}: the arguments cannot be read; {listed}")


def _unknown(message: str, suggestions: str, listed: str) -> UserError:
    tokens = message.removeprefix("Unrecognized options:").strip().split(", ")
    wrong = next((token for token in tokens if token.startswith("--")), None)
    if wrong is None:
        return UserError(
            f"{tokens[0]!r} belongs to no option; write --name value, and --name or --no_name for "
            f"yes and no; {listed}"
        )
    options = list(dict.fromkeys(_OPTION.findall(suggestions)))
    likeness = {option: difflib.SequenceMatcher(None, wrong, option).ratio() for option in options}
    best = max(likeness.values(), default=0.0)
    near = sorted(
        (o for o in options if likeness[o] > best - 0.05), key=lambda option: -likeness[option]
    )
    hint = f" (did you mean {' or '.join(near[:_MOST_SUGGESTIONS])}?)" if near else ""
    return UnknownOption(wrong, hint, listed)
