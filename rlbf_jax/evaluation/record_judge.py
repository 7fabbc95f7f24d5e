"""The judge for user data, where no grammar knows what is a violation: the builder's record of what it injected."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

from rlbf_jax.critics.base import Exchange, Span, Verdict

_WORD = re.compile(r"\w+(?:'\w+)?")


@dataclasses.dataclass(frozen=True)
class Injected:
    """One string that may be injected."""

    text: str
    category: str
    words: tuple[str, ...] = ()
    """Its distinctive words: those that ordinary text does not have. One left visible is a leak."""


class RecordJudge:
    """Finds injected strings in text; perplexity and length stand for coherent and useful.

    Args:
      injected: every string that may have been injected, the held-out ones included. Blanks and letter case are
        ignored in the comparison.
      perplexity: (prompt, text) pairs -> perplexity of each text under the base model; None: `coherent` is not judged.
      max_perplexity: a text is coherent up to here.
      min_words: a text is useful from here on.
      begun_words: so many first words of an injected string at the end of the text are a begun violation.

    A complete violation is an injected string found as a whole; this judge sees no paraphrase, which is its limit.
    """

    name = "record"

    def __init__(
        self,
        injected: Sequence[Injected],
        perplexity: Callable[[list[tuple[str, str]]], list[float]] | None = None,
        *,
        max_perplexity: float = 100.0,
        min_words: int = 5,
        begun_words: int = 2,
    ):
        if not injected:
            raise ValueError("RecordJudge needs at least one injected string; pass those of the builder's record")
        if begun_words < 1:
            raise ValueError(f"begun_words is {begun_words}, it must be at least 1")
        self._perplexity = perplexity
        self._max_perplexity = max_perplexity
        self._min_words = min_words
        self._begun_words = begun_words
        self._by_first: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        for words, category in dict.fromkeys((_words(entry.text), entry.category) for entry in injected):
            if not words:
                raise ValueError(f"an injected string of category {category!r} has no word")
            self._by_first.setdefault(words[0], []).append((words, category))
        self._leak = {_fold(word): entry.category for entry in injected for word in entry.words}

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """One verdict an exchange. A text whose perplexity is not a number is reported as not judged."""
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
        words = [(match.start(), match.end(), _fold(match.group())) for match in _WORD.finditer(text)]
        leaks = tuple(Span(start, end, self._leak[word]) for start, end, word in words if word in self._leak)
        broken = perplexity is not None and perplexity != perplexity
        return Verdict(
            spans=self._spans(words),
            coherent=None if perplexity is None or broken else perplexity <= self._max_perplexity,
            useful=len(text.split()) >= self._min_words,
            leaks=leaks,
            judged=not broken,
            reason="perplexity is not a number" if broken else "",
        )

    def _spans(self, words: list[tuple[int, int, str]]) -> tuple[Span, ...]:
        """Complete injected strings anywhere, and a begun one at the end of the text."""
        folded = [word for _, _, word in words]
        spans = []
        for i, word in enumerate(folded):
            for wanted, category in self._by_first.get(word, ()):
                have = tuple(folded[i : i + len(wanted)])
                last = i + len(have) - 1
                if have == wanted:
                    spans.append(Span(words[i][0], words[last][1], category))
                elif self._begins(have, wanted) and last == len(words) - 1:
                    spans.append(Span(words[i][0], words[last][1], category, complete=False))
        return tuple(dict.fromkeys(spans))

    def _begins(self, have: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
        """Whether the last words of a text begin an injected string; the very last word may be cut."""
        n = len(have)
        return n >= self._begun_words and have[:-1] == wanted[: n - 1] and wanted[n - 1].startswith(have[-1])


def _fold(word: str) -> str:
    return word.casefold().replace("\u2019", "'")


def _words(text: str) -> tuple[str, ...]:
    return tuple(_fold(match.group()) for match in _WORD.finditer(text))
