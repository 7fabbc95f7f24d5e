"""Edits of a response, id by id: standard library only, so that it runs wherever the ids are.

`rlbf export` puts a copy of this file into `custom_generate/`, where the recipe for `transformers`
uses it; users of vLLM or TGI import it to edit a stream of token ids. It says in plain Python what
`rlbf_jax.directives` says in arrays.

A response is all ids after the prompt, forced ones included. A category id announces the retraction
that follows at once; a retraction id takes the last X visible ids back. Neither is ever visible. X
beyond the text takes all there is. Under `replace` the category is a flag, and what stands between
it and the retraction is a copy: never visible, and as long as what is taken back.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 1
"""Version of `rlbf_rule.json`."""

RESET, BACKTRACK, REPLACE = "reset", "backtrack", "replace"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a response may do; forced ids count against all of it."""

    max_emitted: int
    """Most ids of a response, control ids included."""
    budget: int
    """Most directives a response may start; a category that no retraction follows counts."""
    forbid_from: int
    """No directive may start while `forbid_from <= ids so far < forbid_to`."""
    forbid_to: int
    grammar: bool
    """After a category only a retraction is legal, and a retraction nowhere else."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Control ids of a checkpoint and the limits of its responses, as in `rlbf_rule.json`.

    Control ids are contiguous: `len(categories)` categories from `first_id`, then the retractions.
    """

    kind: str
    """`backtrack`: id `first_retraction + X - 1` takes X ids back, X in 1..x_max. `reset`: one id
    that takes all. `replace`: one id that takes as many as were copied since the category."""
    first_id: int
    categories: tuple[str, ...]
    x_max: int
    """1 for `reset` and `replace`."""
    never: tuple[int, ...]
    """Ids that are never legal in a response: padding, turn tokens, other rules' control ids."""
    eos_ids: tuple[int, ...]
    """Ids that end a response."""
    limits: Limits
    vocab_size: int | None = None
    """Ids of the tokenizer; rows of a model beyond them are never legal. None: it has none."""

    @property
    def first_retraction(self) -> int:
        return self.first_id + len(self.categories)

    @property
    def end_id(self) -> int:
        """One past the last control id."""
        return self.first_retraction + self.x_max

    def fields(self) -> dict[str, Any]:
        """What `rlbf_rule.json` holds; `rule_from` reads it back."""
        known = {} if self.vocab_size is None else {"vocab_size": self.vocab_size}
        return {
            "format": FORMAT,
            "semantics": "keep",
            "kind": self.kind,
            "first_id": self.first_id,
            "categories": list(self.categories),
            "first_retraction": self.first_retraction,
            "x_max": self.x_max,
            "never": list(self.never),
            "eos_ids": list(self.eos_ids),
            "limits": dataclasses.asdict(self.limits),
            **known,
        }


def rule_from(fields: Mapping[str, Any]) -> Rule:
    """The rule of the fields of `rlbf_rule.json`.
    Raises ValueError that names the field that is wrong or missing."""
    if fields.get("format") != FORMAT:
        raise ValueError(
            f"format is {fields.get('format')!r}, this code reads {FORMAT}; export the checkpoint "
            "again"
        )
    if fields.get("semantics") != "keep":
        raise ValueError(
            f"semantics is {fields.get('semantics')!r}, these edits are those of 'keep'"
        )
    try:
        rule = Rule(
            fields["kind"],
            fields["first_id"],
            tuple(fields["categories"]),
            fields["x_max"],
            tuple(fields["never"]),
            tuple(fields["eos_ids"]),
            Limits(**fields["limits"]),
            fields.get("vocab_size"),
        )
    except KeyError as error:
        raise ValueError(f"field {error} is missing; export the checkpoint again") from None
    except TypeError as error:
        raise ValueError(
            f"a field has the wrong type ({error}); export the checkpoint again"
        ) from None
    if rule.kind not in (BACKTRACK, RESET, REPLACE):
        raise ValueError(f"kind is {rule.kind!r}, expected {BACKTRACK!r}, {RESET!r} or {REPLACE!r}")
    if not isinstance(rule.first_id, int) or not isinstance(rule.x_max, int):
        raise ValueError(
            f"first_id and x_max are {rule.first_id!r} and {rule.x_max!r}, expected integers"
        )
    if not (rule.vocab_size is None or isinstance(rule.vocab_size, int)):
        raise ValueError(f"vocab_size is {rule.vocab_size!r}, expected an integer or null")
    if rule.kind == REPLACE and not rule.categories:
        raise ValueError(f"categories is empty, but under {REPLACE!r} a category opens the copy")
    if rule.first_retraction != fields.get("first_retraction"):
        raise ValueError(
            f"first_retraction is {fields.get('first_retraction')!r}, but first_id and categories "
            "make it "
            f"{rule.first_retraction}; export the checkpoint again"
        )
    return rule


def read_rule(path: str | Path) -> Rule:
    """Reads `rlbf_rule.json`. Raises ValueError that names file and field,
    OSError if there is no such file."""
    try:
        return rule_from(json.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class Legal(NamedTuple):
    """Which kinds of id may come next; the ids in `Rule.never`, and those from `Rule.vocab_size`
    on, may not in any case."""

    content: bool
    category: bool
    retraction: bool


@dataclasses.dataclass(frozen=True)
class Edit:
    """One executed retraction."""

    index: int
    """Index of the retraction id in the response."""
    category: str | None
    """What was announced; None for a retraction without a category."""
    requested: int | None
    """X, or how many ids were copied; None for a reset."""
    removed: tuple[int, ...]
    """Ids that were taken back."""


class Editor:
    """Reads a response id by id and keeps what its reader sees.

        editor = Editor(rule)
        for token in response:
            event = editor.push(token)  # ("append", token), ("retract", n ids) or None

    `editor.visible` is then what the reader sees, and `editor.legal()`
    which kinds of id may come next.
    """

    def __init__(self, rule: Rule, max_emitted: int | None = None):
        """`max_emitted` replaces the rule's limit of that name."""
        self.rule = rule
        self.max_emitted = rule.limits.max_emitted if max_emitted is None else max_emitted
        self.visible: list[int] = []
        self.edits: list[Edit] = []
        self.emitted = 0
        self.directives = 0
        """Directives started."""
        self.dropped = 0
        """Categories that something else than a retraction followed."""
        self.pending: str | None = None
        """The category that is open: announced, and not closed by its retraction."""
        self.copied = 0
        """Ids copied since; 0 unless the rule is `replace`."""

    @property
    def malformed(self) -> int:
        """Categories without a retraction, one at the very end included."""
        return self.dropped + (self.pending is not None)

    def push(self, token: int) -> tuple[str, int] | None:
        """Reads one id, legal or not; returns the event, None where the reader sees no change."""
        rule, index = self.rule, self.emitted
        self.emitted += 1
        if rule.first_retraction <= token < rule.end_id:
            return self._retract(token, index)
        category = rule.first_id <= token < rule.first_retraction
        if rule.kind == REPLACE and self.pending is not None and not category:
            self.copied += 1
            return None
        self.dropped += self.pending is not None
        self.copied = 0
        if category:
            self.pending = rule.categories[token - rule.first_id]
            self.directives += 1
            return None
        self.pending = None
        self.visible.append(token)
        return "append", token

    def _retract(self, token: int, index: int) -> tuple[str, int] | None:
        by_kind = {RESET: None, REPLACE: self.copied}
        requested = by_kind.get(self.rule.kind, token - self.rule.first_retraction + 1)
        count = len(self.visible) if requested is None else min(requested, len(self.visible))
        kept = len(self.visible) - count
        self.edits.append(Edit(index, self.pending, requested, tuple(self.visible[kept:])))
        self.directives += self.pending is None
        self.pending, self.copied = None, 0
        del self.visible[kept:]
        return ("retract", count) if count else None

    def legal(self) -> Legal:
        """Budget, room, windows, grammar.

        They are checked where a directive starts. Room: 3 ids for category, retraction and one
        more; 4 under `replace`, with one id copied; 2 for a bare retraction. The retraction that
        closes a category is always legal, under `replace` once something was copied or when two ids
        are left, where nothing else is.
        """
        limits, remaining = self.rule.limits, self.max_emitted - self.emitted
        forbidden = limits.forbid_from <= self.emitted < limits.forbid_to
        may_start = self.directives < limits.budget and not forbidden
        must_close = self.pending is not None and limits.grammar
        if must_close and self.rule.kind == REPLACE:
            return Legal(remaining > 2, False, self.copied > 0 or remaining <= 2)
        room = 4 if self.rule.kind == REPLACE else 3
        bare = may_start and remaining >= 2 and not (self.rule.categories and limits.grammar)
        return Legal(
            content=not must_close,
            category=may_start and remaining >= room and not must_close,
            retraction=self.pending is not None or bare,
        )


def render(rule: Rule, response: Iterable[int]) -> Editor:
    """The editor after a whole response."""
    editor = Editor(rule)
    for token in response:
        editor.push(token)
    return editor


def text_events(
    rule: Rule, stream: Iterable[int], decode: Callable[[list[int]], str]
) -> Iterator[tuple[str, str | int]]:
    """Turns a stream of response ids into events for a screen:
    ("append", text) and ("retract", n characters).

    Applied in order to an empty string, the events give `decode` of the visible ids. Ends at the
    first of `eos_ids`. A character whose bytes are not all there yet is held back. The whole text
    is decoded at every id, because pieces do not decode alone; for very long responses edit ids
    with `Editor` and decode by the sentence.
    """
    editor, shown = Editor(rule), ""
    for token in stream:
        if token in rule.eos_ids:
            break
        if editor.push(token) is not None:
            text = decode(list(editor.visible)).rstrip("\ufffd")
            yield from _change(shown, text)
            shown = text
    yield from _change(shown, decode(list(editor.visible)))


def _change(old: str, new: str) -> Iterator[tuple[str, str | int]]:
    same = next(
        (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b),
        min(len(old), len(new)),
    )
    if same < len(old):
        yield "retract", len(old) - same
    if same < len(new):
        yield "append", new[same:]
