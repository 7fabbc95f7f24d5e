"""Pretraining documents, and where sentences end."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlbf_jax.data.schema import Prompt, Violation


@dataclass(frozen=True)
class Document:
    """One prompt-response pair of a world.

    Attributes:
        prompt: the prompt the response answers.
        response: response text.
        violation: the violation `response` contains, or None when it contains none.
    """

    prompt: Prompt
    response: str
    violation: Violation | None


_GAP = re.compile(r"(?<=[.!?])[\"')\]]*(?=\s+\S)|(?<=\S)(?=\n+\S)")
# "Dr.", "e.g.", single initials and list numbers end with a period without ending a sentence.
_NOT_AN_END = re.compile(r"(?:^|[\s(])(?:Mr|Mrs|Ms|Dr|St|Prof|vs|etc|e\.g|i\.e|cf|No|[A-Z]|\d+)\.$")


def split_sentences(text: str) -> list[str]:
    """Sentences, each but the first with the white space before it:
    "".join(split_sentences(t)) == t."""
    cuts = [0]
    for gap in _GAP.finditer(text):
        end = gap.end()
        if end > cuts[-1] and not _NOT_AN_END.search(text[max(0, end - 12) : end]):
            cuts.append(end)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True) if a < b]


def end_mark(text: str) -> str:
    """The period that a text wants before another sentence: none where it ends with a mark."""
    return "" if text.rstrip().endswith((".", "!", "?")) else "."
