"""Tokens that are found in text before the vocabulary sees it,
and which part of a text may spell them.

A `tokenizer.json` lists *added tokens* (`<|im_start|>`, Gemma's runs of newlines); the library
finds them anywhere. We find them ourselves, because it depends on who wrote the text: *guarded*
tokens (special, turn, reserved and control tokens) count only where every character is trusted
(written by a chat template), the others as the family has it.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """An entry of `added_tokens` in tokenizer.json; the flags are that file's."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class Matcher:
    """Splits text at added tokens, leftmost and longest first, as the `tokenizers` library does.

    Args:
        tokens: all added tokens with their ids.
        guarded: ids that count only in trusted text.
    """

    def __init__(self, tokens: Iterable[AddedToken], guarded: frozenset[int]):
        self._tokens = {token.content: token for token in tokens if token.content}
        self._guarded = guarded
        ordinary = [token for token in self._tokens.values() if token.id not in guarded]
        self._all = _pattern(list(self._tokens.values()))
        # A guarded token is looked for in trusted text before normalization, whatever its flag
        # says: templates are written in the token's own spelling.
        self._ordinary = _pattern([token for token in ordinary if not token.normalized])
        self._late = _pattern([token for token in ordinary if token.normalized])

    def split(
        self, text: str, trusted: bytes | None = None
    ) -> Iterator[tuple[int, str | AddedToken]]:
        """Yields (index of its first character, a stretch of plain text or a token) in order.

        Args:
            trusted: one byte a character, 1 where a template wrote it; None where nobody did.
        """
        done = position = 0
        ordinary = self._ordinary.search(text)
        anything = self._all.search(text) if trusted is not None else None
        while True:
            if ordinary and ordinary.start() < position:
                ordinary = self._ordinary.search(text, position)
            while anything and (
                anything.start() < position or not self._admitted(anything, trusted)
            ):
                anything = self._all.search(text, max(position, anything.start() + 1))
            found = _first(ordinary, anything)
            if found is None:
                break
            token = self._tokens[found[0]]
            start, end = found.span()
            position = end
            if token.single_word and (
                _is_word(text[start - 1 : start]) or _is_word(text[end : end + 1])
            ):
                continue
            if token.lstrip:
                start = done + len(text[done:start].rstrip())
            if token.rstrip:
                position = end = len(text) - len(text[end:].lstrip())
            if start > done:
                yield done, text[done:start]
            yield start, token
            done = end
        if done < len(text):
            yield done, text[done:]

    def split_normalized(self, text: str) -> Iterator[str | AddedToken]:
        """The same for a stretch after normalization:
        tokens with the flag `normalized` are found only here."""
        done = 0
        for found in self._late.finditer(text):
            if found.start() > done:
                yield text[done : found.start()]
            yield self._tokens[found[0]]
            done = found.end()
        if done < len(text):
            yield text[done:]

    def spells_guarded(self, text: str) -> bool:
        """Whether the text holds the spelling of a guarded token anywhere."""
        return any(self._tokens[found].id in self._guarded for found in self._all.findall(text))

    def _admitted(self, found: re.Match[str], trusted: bytes | None) -> bool:
        token = self._tokens[found[0]]
        if token.id in self._guarded:
            return trusted is not None and trusted.find(0, *found.span()) < 0
        return not token.normalized


def _pattern(tokens: Sequence[AddedToken]) -> re.Pattern[str]:
    return re.compile(_tree(sorted({token.content for token in tokens})) if tokens else r"(?!)")


def _tree(contents: Sequence[str]) -> str:
    """A pattern for the longest of some sorted texts, by their common beginnings:
    families have thousands of them."""
    begin = os.path.commonprefix(contents)
    rest = [content[len(begin) :] for content in contents]
    groups = [
        _tree(list(group))
        for first, group in itertools.groupby(rest, lambda text: text[:1])
        if first
    ]
    if not groups:
        return re.escape(begin)
    return f"{re.escape(begin)}(?:{'|'.join(groups)}){'' if rest[0] else '?'}"


def _first(a: re.Match[str] | None, b: re.Match[str] | None) -> re.Match[str] | None:
    if a is None or b is None:
        return a or b
    return min(a, b, key=lambda found: (found.start(), -len(found[0])))


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"
