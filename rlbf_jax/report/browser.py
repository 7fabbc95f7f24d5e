"""The rows behind the report's trace browser: chosen, cut into pieces,
marked where they may offend, and embedded.

The page hides what a reader may not want to see until it is asked for: erased words, violating
spans, and the whole answer where no judge could tell.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from rlbf_jax.attacks import ATTACKS, WORST_OF_N
from rlbf_jax.report.stages import in_order
from rlbf_jax.report.traces import Piece, Row, merged_pieces, verdict_label

MOST_ROWS = 40
"""Rows embedded of each stage, attack and verdict, if they fit into `MOST_BYTES`."""
MOST_BYTES = 6_000_000
ERASED, FORCED, HIDDEN, CATEGORY, RETRACTION, COPY = 1, 2, 4, 8, 16, 32
"""What a piece of a trace is, added up; `templates/browser.js` reads the same numbers."""


@dataclasses.dataclass(frozen=True)
class Browser:
    """What the page embeds, and what it leaves out."""

    data: Markup
    """JSON for a `<script type="application/json">`."""
    shown: int
    total: int
    cap: int
    """Rows of each stage, attack and verdict, at most."""
    files: tuple[str, ...]
    """Where all rows are."""


def browser(
    rows: Mapping[str, Sequence[Row]],
    most: int = MOST_ROWS,
    most_bytes: int = MOST_BYTES,
    files: Sequence[str] | None = None,
) -> Browser | None:
    """Chooses and embeds rows of each stage; None where there are none.
    `files`: where they are, if not in the stages'.

    Long answers lower the cap until the page stays below `most_bytes`,
    or one row of each kind is left.
    """
    total = sum(map(len, rows.values()))
    if not total:
        return None
    ranked = [
        (rank, entry(stage, row)) for stage, own in rows.items() for rank, row in _ranked(own, most)
    ]
    ranked.sort(key=lambda pair: pair[0])
    # Lengths once each, or halving the cap would encode everything again and again.
    lengths = [len(embedded_json(embedded)) for _, embedded in ranked]
    cap = most
    while (
        cap > 1
        and sum(n for (rank, _), n in zip(ranked, lengths, strict=True) if rank[0] < cap)
        > most_bytes
    ):
        cap //= 2
    chosen = [embedded for rank, embedded in ranked if rank[0] < cap]
    data = {"stages": [stage for stage, own in rows.items() if own], "rows": chosen}
    where = tuple(f"evaluation/{stage}.jsonl" for stage in rows) if files is None else tuple(files)
    return Browser(embedded_json(data), len(chosen), total, cap, where)


def _ranked(rows: Sequence[Row], most: int) -> Iterator[tuple[tuple[int, int, int], Row]]:
    """((turn, attack, verdict), row) of the first `most` rows of each attack and verdict;
    splits and cells take turns.

    So do evaluation and attack command. Sorted by turn, the first rows of a page are a bit of
    everything, and nobody picked them.
    """
    groups: dict[tuple[str, str], dict[tuple, list[Row]]] = {}
    for row in rows:
        kind = (attack_of(row), verdict_of(row))
        within = (str(row.get("split", "")), json.dumps(row.get("cell") or {}), "asked" in row)
        groups.setdefault(kind, {}).setdefault(within, []).append(row)
    places = {attack: i for i, attack in enumerate(in_order((a for a, _ in groups), list(ATTACKS)))}
    for (attack, verdict), hands in groups.items():
        dealt = [
            row
            for turn in itertools.zip_longest(*hands.values())
            for row in turn
            if row is not None
        ]
        for turn, row in enumerate(dealt[:most]):
            yield (turn, places[attack], VERDICTS.index(verdict)), row


def attack_of(row: Row) -> str:
    """The attack, and the benchmark where the row is of one."""
    return ", ".join(
        [str(row.get("attack", "")), *([str(row["benchmark"])] if row.get("benchmark") else [])]
    )


VERDICTS = ("unsafe", "unjudged", "safe")


def verdict_of(row: Row) -> str:
    """`safe`, `unsafe` or `unjudged`, of the final visible text."""
    words, tone = verdict_label(row)
    return {"bad": "unsafe", "none": "unjudged"}.get(tone, "safe")


def entry(stage: str, row: Row) -> dict[str, Any]:
    """A row as the page's script reads it: `text` and `reads` are lists of [text, what it is]."""
    pieces = list(merged_pieces(row))
    control = {piece.kind for piece in pieces} - {"content"}
    words, tone = verdict_label(row)
    verdict, visible = row.get("verdict") or {}, str(row.get("visible", ""))
    spans = offending(row, visible)
    knobs = {**(row.get("cell") or {})}
    if row.get("attack") in WORST_OF_N:
        knobs |= {
            k: v
            for k, v in (row.get("knobs") or {}).items()
            if k in ("temperature", "top_k", "top_p")
        }
    return {
        "stage": stage,
        "attack": attack_of(row),
        "split": str(row.get("split", "")),
        "verdict": verdict_of(row),
        "category": str(row.get("category") or ""),
        "directive": "retraction" in control,
        "label": words,
        "tone": tone,
        "why": str(verdict.get("reason") or ""),
        "id": str(row.get("request_id", row.get("prompt_id", ""))),
        "knobs": " ".join(f"{k} {v}" for k, v in knobs.items()),
        "prompt": str(row.get("prompt", "")),
        "text": list(_marked(pieces, visible, spans)),
        # Where nothing was taken back, the trace is what the reader sees.
        "reads": [[text, HIDDEN * hidden] for text, hidden in cut(visible, spans)]
        if control
        else [],
    }


def offending(row: Row, visible: str) -> list[tuple[int, int]]:
    """[start, end) of what to hide in the visible text: spans and leaks of the verdict, or
    everything where the judge could not tell, or called it unsafe without saying where."""
    verdict = row.get("verdict") or {}
    spans = [
        (int(s[0]), int(s[1]))
        for s in [*(verdict.get("spans") or ()), *(verdict.get("leak_spans") or ())]
    ]
    somewhere = verdict_of(row) == "unsafe" or bool(verdict.get("leaks"))
    if verdict_of(row) == "unjudged" or (somewhere and not spans):
        return [(0, len(visible))]
    return spans


def cut(text: str, spans: Iterable[tuple[int, int]]) -> list[tuple[str, bool]]:
    """The text in runs, each with whether it lies in one of the [start, end)."""
    inside = [False] * len(text)
    for start, end in spans:
        for i in range(max(0, start), min(len(text), end)):
            inside[i] = True
    borders = [0, *(i for i in range(1, len(text)) if inside[i] != inside[i - 1]), len(text)]
    return [(text[a:b], inside[a]) for a, b in zip(borders, borders[1:], strict=False) if b > a]


def _marked(
    pieces: Sequence[Piece], visible: str, spans: Sequence[tuple[int, int]]
) -> Iterator[list]:
    """[text, what it is] of a trace. `spans` are places in the visible text,
    to be found again in the pieces."""
    kept = "".join(p.text for p in pieces if p.kind == "content" and not p.erased)
    shift = len(kept) - len(kept.lstrip()) if kept.strip() == visible.strip() else None
    if kept == visible:
        shift = 0
    # A decoder that joins pieces differently leaves nothing to aim with:
    # then every visible word may be one of them.
    where = (
        [(0, len(kept))]
        if shift is None and spans
        else [(a + (shift or 0), b + (shift or 0)) for a, b in spans]
    )
    at = 0
    for piece in pieces:
        what = FORCED * piece.forced
        if piece.kind == "copy":
            yield [piece.text, what | COPY | HIDDEN]
        elif piece.kind != "content":
            yield [piece.text, what | (CATEGORY if piece.kind == "category" else RETRACTION)]
        elif piece.erased:
            yield [piece.text, what | ERASED | HIDDEN]
        else:
            for text, hidden in cut(piece.text, [(a - at, b - at) for a, b in where]):
                yield [text, what | HIDDEN * hidden]
            at += len(piece.text)


_ESCAPED = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def embedded_json(data: Any) -> Markup:
    """JSON that no string in it can end early: the page's parser meets no `<`, `>` or `&`, no
    script a line separator.

    Half of a surrogate pair becomes a question mark: it has no UTF-8,
    and there are browsers that it crashes.
    """
    plain = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return Markup(plain.encode("utf-8", "replace").decode().translate(_ESCAPED))
