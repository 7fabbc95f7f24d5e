"""A critic that finds violations by their words: patterns of word classes,
matched against decoded text.

It reads text, not ids, because a model can spell one word with unusual pieces; `covering_ids` maps
a character span back to whatever ids spell it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from rlbf_jax.critics.base import Exchange, Span, Verdict

ANY: None = None
"""A word class that every word belongs to."""

WordClass = frozenset[str] | None
Coherence = Callable[[str, str], tuple[bool, bool]]
"""(text, topic) -> (coherent, useful)."""

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_BREAK = re.compile(r"[.!?\n]")


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A violation as a sequence of word classes. Words are lower case."""

    category: str
    slots: tuple[WordClass, ...]


def pattern(category: str, text: str, classes: Mapping[str, Iterable[str]]) -> Pattern:
    """Reads a pattern: words apart by spaces, alternatives by `|`, `*` for any word,
    upper case for a named class.

    Raises KeyError for an unknown class and ValueError for a pattern of fewer than two words.
    """
    slots: list[WordClass] = []
    for slot in text.split():
        if slot == "*":
            slots.append(ANY)
            continue
        words: set[str] = set()
        for option in slot.split("|"):
            if option.isupper() and option not in classes:
                raise KeyError(
                    f"pattern {text!r}: no word class {option}; there are "
                    f"{', '.join(sorted(classes))}"
                )
            words.update(classes[option] if option.isupper() else (option,))
        slots.append(frozenset(word.lower() for word in words))
    if len(slots) < 2:
        raise ValueError(
            f"pattern {text!r} of {category!r} has fewer than two words, so single words would "
            "match it"
        )
    return Pattern(category, tuple(slots))


@dataclasses.dataclass(frozen=True)
class _Words:
    """The words of a text: lower-cased, with character offsets,
    and whether the text breaks off after each."""

    words: list[str]
    starts: list[int]
    ends: list[int]
    breaks: list[bool]
    cut: bool
    """The text ends right after the last word, which may therefore be only the beginning of one."""


def _split(text: str) -> _Words:
    matches = list(_WORD.finditer(text))
    starts, ends = [m.start() for m in matches], [m.end() for m in matches]
    breaks = []
    for k, end in enumerate(ends):
        following = starts[k + 1] if k + 1 < len(starts) else len(text)
        # A capital begins a new sentence, also where the old one was left without a period.
        breaks.append(
            following == len(text)
            or text[following].isupper()
            or bool(_BREAK.search(text, end, following))
        )
    cut = bool(matches) and ends[-1] == len(text)
    return _Words([m.group().lower() for m in matches], starts, ends, breaks, cut)


class LexiconCritic:
    """Finds complete and begun violations of given patterns.

    Matching is word by word, ignores case and punctuation,
    and takes the longest match at each place, left to right. A begun span (`complete=False`)
    is a proper beginning of a pattern, at least two words long, after which the text
    or its sentence breaks off; it must hold a distinctive word or have three words.
    At the very end of the text its last word may itself be cut.
    Spans may overlap: a violation may begin inside another, complete or only begun. What lies
    inside a complete violation is part of it, and so is a beginning inside a begun one.

    Args:
      patterns: what to look for.
      coherence: says whether a text is coherent and useful; None: the verdicts leave both open.
        In a coherent text, a beginning without a distinctive word is taken
        for that of a harmless sentence.
      name: for reports.
      common: words that harmless text uses too; all other pattern words are distinctive.
    """

    def __init__(
        self,
        patterns: Sequence[Pattern],
        coherence: Coherence | None = None,
        name: str = "lexicon",
        common: Iterable[str] = (),
    ):
        if not patterns:
            raise ValueError("LexiconCritic got no patterns; it would call every text safe")
        self.name = name
        self._coherence = coherence
        words = {word for p in patterns for slot in p.slots if slot is not ANY for word in slot}
        self._distinctive = words - set(common)
        self._by_first: dict[str, list[Pattern]] = {}
        self._anywhere: list[Pattern] = [p for p in patterns if p.slots[0] is ANY]
        for p in patterns:
            for word in p.slots[0] or ():
                self._by_first.setdefault(word, []).append(p)

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """One verdict an exchange, in order; every text can be judged."""
        return [self._judge(exchange) for exchange in exchanges]

    def spans(self, text: str) -> tuple[Span, ...]:
        """Violations of a text from left to right; none lies inside a complete one."""
        split, found = _split(text), []
        ends = {True: 0, False: 0}  # one past the last word of complete and of begun spans so far
        for i in range(len(split.words) - 1):
            best = self._longest(split, i)
            if best is None:
                continue
            length, complete, category = best
            end = i + length
            if end <= ends[True] or (not complete and end <= ends[False]):
                continue
            ends[complete] = end
            found.append(Span(split.starts[i], split.ends[end - 1], category, complete))
        return tuple(found)

    def _judge(self, exchange: Exchange) -> Verdict:
        spans = self.spans(exchange.text)
        if self._coherence is None:
            return Verdict(spans)
        coherent, useful = self._coherence(exchange.text, exchange.topic)
        if coherent:
            spans = tuple(
                span for span in spans if span.complete or self._is_distinctive(exchange.text, span)
            )
        return Verdict(spans, coherent, useful)

    def _is_distinctive(self, text: str, span: Span) -> bool:
        return not self._distinctive.isdisjoint(_split(text[span.start : span.end]).words)

    def _longest(self, split: _Words, i: int) -> tuple[int, bool, str] | None:
        """(words, complete, category) of the best match that begins at word i;
        complete beats begun."""
        best: tuple[bool, int, str] | None = None
        for p in (*self._by_first.get(split.words[i], ()), *self._anywhere):
            length, cut = _match(p, split, i)
            complete = length == len(p.slots) and not cut
            if not complete:
                length = self._begun(split, i, length, cut)
            if length and (best is None or (complete, length) > best[:2]):
                best = (complete, length, p.category)
        return None if best is None else (best[1], best[0], best[2])

    def _begun(self, split: _Words, i: int, length: int, cut: bool) -> int:
        """Words of the begun violation in `length` matching words from i on; 0 if there is none."""
        # The words of the next sentence may happen to go on as the pattern does:
        # back to the last break.
        for n in range(length, 1, -1):
            if split.breaks[i + n - 1]:
                whole = split.words[i : i + n - (cut and n == length)]
                return n if len(whole) >= 3 or not self._distinctive.isdisjoint(whole) else 0
        return 0


def _match(p: Pattern, split: _Words, i: int) -> tuple[int, bool]:
    """How many words from word i follow the pattern, and whether the last of them
    is only the beginning of a word."""
    words = split.words
    for k, slot in enumerate(p.slots):
        j = i + k
        if j >= len(words):
            return k, False
        if slot is ANY or words[j] in slot:
            continue
        cut = split.cut and j == len(words) - 1 and any(word.startswith(words[j]) for word in slot)
        return k + cut, cut
    return len(p.slots), False


def covering_ids(offsets: Sequence[tuple[int, int]], span: Span) -> range:
    """The ids that spell a character span: every id that overlaps it, and all between them.

    Args:
      offsets: (start, end) characters of each id in the text, in order; an id without characters of
        its own (the first bytes of a character spelled in bytes) has start == end.
      span: characters of the same text.

    Returns:
      A range of indices into `offsets`; empty if no id overlaps.
    """
    hits = [k for k, (start, end) in enumerate(offsets) if start < span.end and end > span.start]
    if not hits:
        return range(0)
    first = hits[0]
    # Ids that carry no characters yet belong to the character that the next id completes.
    while first > 0 and offsets[first - 1][0] == offsets[first - 1][1] >= span.start:
        first -= 1
    return range(first, hits[-1] + 1)
