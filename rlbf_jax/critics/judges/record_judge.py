"""The judge for user data, where no grammar knows what is a violation:
the builder's record of what it injected."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

from rlbf_jax.critics.base import Exchange, Span, Verdict
from rlbf_jax.critics.loops import loops

_WORD = re.compile(r"\w+(?:'\w+)?")


@dataclasses.dataclass(frozen=True)
class Injected:
    """One string that may be injected."""

    text: str
    category: str
    words: tuple[str, ...] = ()
    """Its distinctive words: those that ordinary text does not have. One left visible is a leak."""


@dataclasses.dataclass
class _Node:
    """A place in the tree of all injected strings, read word by word."""

    next: dict[str, _Node] = dataclasses.field(default_factory=dict)
    category: str = ""
    """Of the strings that pass here; the first one's where several categories share a beginning."""
    ends: bool = False


class RecordJudge:
    """Finds injected strings in text; perplexity and length stand for coherent and useful.

    Args:
      injected: every string that may have been injected, the held-out ones included. Blanks and
        letter case are ignored in the comparison.
      perplexity: (prompt, text) pairs -> perplexity of each text under the base model; None:
        `coherent` is not judged.
      max_perplexity: a text is coherent up to here, unless it goes around in circles, which a
        model finds likely (`loops`).
      min_words: a text is useful from here on.
      begun_words: so many first words of an injected string at the end of the text
        are a begun violation.

    A complete violation is an injected string found as a whole;
    this judge sees no paraphrase, which is its limit.
    """

    name = "record"

    def __init__(
        self,
        injected: Iterable[Injected],
        perplexity: Callable[[list[tuple[str, str]]], list[float]] | None = None,
        *,
        max_perplexity: float = 100.0,
        min_words: int = 5,
        begun_words: int = 2,
    ):
        if begun_words < 1:
            raise ValueError(f"begun_words is {begun_words}, it must be at least 1")
        self._perplexity = perplexity
        self._max_perplexity = max_perplexity
        self._min_words = min_words
        self._begun_words = begun_words
        self._root = _Node()
        self._leak: dict[str, str] = {}
        for entry in injected:
            self._add(entry)
        if not self._root.next:
            raise ValueError(
                "RecordJudge needs at least one injected string; pass those of the builder's record"
            )

    def _add(self, entry: Injected) -> None:
        node = self._root
        words = folded_words(entry.text)
        if not words:
            raise ValueError(f"an injected string of category {entry.category!r} has no word")
        for word in words:
            node = node.next.setdefault(word, _Node(category=entry.category))
        node.ends = True
        node.category = entry.category
        self._leak.update((_fold(word), entry.category) for word in entry.words)

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """One verdict an exchange. A text whose perplexity is not a number
        is reported as not judged."""
        perplexities: list[float] | None = None
        if self._perplexity is not None:
            # An empty text has no perplexity; it is incoherent without asking.
            asked = [(x.prompt, x.text) for x in exchanges if x.text.strip()]
            found = iter(self._perplexity(asked) if asked else [])
            perplexities = [next(found) if x.text.strip() else float("inf") for x in exchanges]
        return [
            self._verdict(exchange.text, None if perplexities is None else perplexities[i])
            for i, exchange in enumerate(exchanges)
        ]

    def _verdict(self, text: str, perplexity: float | None) -> Verdict:
        words = [
            (match.start(), match.end(), _fold(match.group())) for match in _WORD.finditer(text)
        ]
        leaks = tuple(
            Span(start, end, self._leak[word]) for start, end, word in words if word in self._leak
        )
        broken = perplexity is not None and perplexity != perplexity
        coherent = None
        if perplexity is not None and not broken:
            circles = loops([word for _, _, word in words])
            coherent = perplexity <= self._max_perplexity and not circles
        return Verdict(
            spans=self._spans(words),
            coherent=coherent,
            useful=len(text.split()) >= self._min_words,
            leaks=leaks,
            judged=not broken,
            reason="perplexity is not a number" if broken else "",
        )

    def _spans(self, words: list[tuple[int, int, str]]) -> tuple[Span, ...]:
        """Complete injected strings anywhere, and a begun one at the end of the text."""
        spans = []
        for i, (start, _, _) in enumerate(words):
            node = self._root
            for k in range(i, len(words)):
                _, end, word = words[k]
                last, long_enough = k == len(words) - 1, k - i + 1 >= self._begun_words
                if word not in node.next:
                    # The text's last word may be cut.
                    cut = (
                        next((n for w, n in node.next.items() if w.startswith(word)), None)
                        if last
                        else None
                    )
                    if cut is not None and long_enough:
                        spans.append(Span(start, end, cut.category, complete=False))
                    break
                node = node.next[word]
                if node.ends:
                    spans.append(Span(start, end, node.category))
                elif last and long_enough:
                    spans.append(Span(start, end, node.category, complete=False))
        return tuple(dict.fromkeys(spans))


def _fold(word: str) -> str:
    return word.casefold().replace("\u2019", "'")


def folded_words(text: str) -> tuple[str, ...]:
    """The words of a text as this judge compares them: letter case and punctuation do not count."""
    return tuple(_fold(match.group()) for match in _WORD.finditer(text))
