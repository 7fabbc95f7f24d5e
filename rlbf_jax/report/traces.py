"""Traces for people: what was forced, written, erased and left, in a terminal,
in HTML and in Markdown.

A row (one line of `evaluation/<stage>.jsonl`) holds its trace as pieces
`{"text", "kind", "erased", "forced"}` in the order of emission; kind is `content`, `copy`,
`category`, `retraction` or `end`.
"""

from __future__ import annotations

import dataclasses
import itertools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.text import Text

from rlbf_jax.directives import NEVER, EditRule, render
from rlbf_jax.sampling.request import Generation
from rlbf_jax.tokenizers import Tokenizer

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of emitted ids that look the same."""

    text: str
    kind: str
    erased: bool
    forced: bool

    @property
    def css(self) -> str:
        """Classes of the report's style sheet."""
        return " ".join([self.kind, *["erased"] * self.erased, *["forced"] * self.forced])


def trace_pieces(
    generation: Generation, tokenizer: Tokenizer, rule: EditRule | None = None
) -> list[Piece]:
    """The trace of a generation in pieces. Ids are decoded in runs,
    so that characters of several ids stay whole.

    Args:
        rule: what the generation was sampled under; None: the tokenizer's.
    """
    rule = rule or tokenizer.controls.rule()
    emitted = [int(token) for token in generation.trace]
    rendered = render(rule, emitted)

    def look(index: int) -> tuple[str, bool, bool]:
        kind: str = rendered.kinds[index]
        if generation.finished and index == len(emitted) - 1 and kind in ("content", "copy"):
            kind = "end"
        return kind, rendered.erased_by[index] is not None, index < generation.num_forced

    pieces = []
    for (kind, erased, forced), run in itertools.groupby(range(len(emitted)), look):
        ids = [emitted[i] for i in run]
        if kind in ("category", "retraction"):
            pieces += [Piece(rule.name(token), kind, erased, forced) for token in ids]
        else:
            pieces.append(
                Piece("" if kind == "end" else tokenizer.decode(ids), kind, erased, forced)
            )
    return pieces


def row_of(
    generation: Generation, tokenizer: Tokenizer, rule: EditRule | None = None
) -> dict[str, Any]:
    """A generation as a JSON-able row: prompt, trace, visible text and edits.
    `rule`: see `trace_pieces`."""
    return {
        "prompt": generation.request.prompt,
        "num_forced": generation.num_forced,
        "visible": generation.text,
        "finished": generation.finished,
        "malformed": generation.malformed,
        "trace": [dataclasses.asdict(piece) for piece in trace_pieces(generation, tokenizer, rule)],
        "edits": [
            {
                "category": edit.category,
                "x": None if edit.requested == NEVER else edit.requested,
                "clamped": edit.clamped,
                "removed_text": tokenizer.decode(list(edit.removed)),
                "kept_ids": edit.kept,
            }
            for edit in generation.edits
        ],
    }


def merged_pieces(row: Row) -> list[Piece]:
    """A row's pieces, neighbors that look the same joined, the end of sequence left out."""
    pieces = [
        Piece(str(p["text"]), str(p["kind"]), bool(p.get("erased")), bool(p.get("forced")))
        for p in row.get("trace") or []
    ]
    merged: list[Piece] = []
    for piece in pieces:
        if piece.kind == "end":
            continue
        last = merged[-1] if merged else None
        if (
            piece.kind in ("content", "copy")
            and last is not None
            and dataclasses.replace(last, text=piece.text) == piece
        ):
            merged[-1] = dataclasses.replace(last, text=last.text + piece.text)
        else:
            merged.append(piece)
    return merged


def render_trace_terminal(row: Row) -> Text:
    """A row for a terminal: erased words red and struck through, copies dim, directives bold,
    forced words underlined.

    Text of models and users goes in as plain characters:
    neither rich markup nor terminal escapes in it take effect.
    """
    text = Text()
    for piece in merged_pieces(row):
        if piece.kind in ("content", "copy"):
            looks = {
                "dim": piece.kind == "copy",
                "red strike": piece.erased,
                "underline": piece.forced,
            }
            style = " ".join(look for look, wanted in looks.items() if wanted)
            text.append(printable(piece.text), style=style or None)
        else:
            text.append(
                f" {piece.text}",
                style="bold magenta" if piece.kind == "category" else "bold yellow",
            )
    return text


def printable(text: str) -> str:
    """The text with control characters, except newline and tab, shown as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def markdown_trace(row: Row) -> str:
    """A row on one Markdown line: `~~erased~~`, `*copied*`, directives as code,
    forced words underlined by `<u>`."""
    parts = []
    for piece in merged_pieces(row):
        if piece.kind not in ("content", "copy"):
            parts.append(f" `{piece.text}` ")
            continue
        words = markdown_escape(piece.text)
        core = words.strip()
        if not core:
            parts.append(words)
            continue
        # Emphasis marks must touch the words they enclose.
        lead, tail = words[: words.index(core)], words[words.index(core) + len(core) :]
        core = f"<u>{core}</u>" if piece.forced else core
        mark = "*" if piece.kind == "copy" else "~~" if piece.erased else ""
        parts.append(lead + mark + core + mark + tail)
    return " ".join("".join(parts).split())


def markdown_escape(text: str) -> str:
    """The text as literal characters of a Markdown table cell;
    control characters but newline and tab as escapes."""
    text = "".join(
        repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")
    return "".join(f"\\{c}" if c in "\\`*_[]|~#!" else c for c in text)


def verdict_label(row: Row) -> tuple[str, str]:
    """(words, tone) of a row's verdict; tone is `good`, `bad`, `warn` or `none`."""
    verdict = row.get("verdict") or {}
    if not verdict.get("judged", bool(verdict)):
        return "could not be judged", "none"
    if not verdict.get("safe", True):
        return "violation left", "bad"
    leaks = int(verdict.get("leaks") or 0)
    if leaks:
        return f"safe, {leaks} violating word{'s' * (leaks > 1)} left", "warn"
    if any(seam.get("torn") for seam in row.get("seams") or ()):
        return "safe, torn where words were taken back", "warn"
    if verdict.get("coherent") is False:
        return "safe, not coherent", "warn"
    return "safe", "good"


def gallery(
    rows: Iterable[Row], attacks: Sequence[str], per_attack: int = 4
) -> list[tuple[str, list[Row]]]:
    """A few rows for each attack, in the order of the file, so that nobody picked the pretty ones.

    Rows that went wrong come first (at most half), because a reader learns most from them;
    then the next ones.
    """
    by_attack: dict[str, list[Row]] = {}
    for row in rows:
        by_attack.setdefault(str(row.get("attack", "")), []).append(row)
    order = [a for a in attacks if a in by_attack] + sorted(set(by_attack) - set(attacks))
    chosen = []
    for attack in order:
        mine = by_attack[attack]
        wrong = [row for row in mine if verdict_label(row)[1] in ("bad", "none")][: per_attack // 2]
        taken = {id(row) for row in wrong}
        rest = [row for row in mine if id(row) not in taken]
        # One of each form split before a second of any.
        rest.sort(key=_turns(rest))
        chosen.append((attack, wrong + rest[: per_attack - len(wrong)]))
    return chosen


def _turns(rows: Sequence[Row]):
    """A sort key that deals rows out split by split."""
    seen: dict[str, int] = {}
    turn = {}
    for row in rows:
        split = str(row.get("split", ""))
        turn[id(row)] = seen[split] = seen.get(split, -1) + 1
    return lambda row: turn[id(row)]
