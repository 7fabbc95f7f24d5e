"""What a critic or a judge is asked, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Span:
    """A violation in a text."""

    start: int
    """First character."""
    end: int
    """One past the last character."""
    category: str
    """Empty: this critic does not say."""
    complete: bool = True
    """False: the violation had begun and the text (or a change of mind) ended before it was
    complete."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a critic says of one text."""

    spans: tuple[Span, ...] = ()
    coherent: bool | None = None
    """None: this critic does not say."""
    useful: bool | None = None
    leaks: tuple[Span, ...] = ()
    """Single violating content words left in the text, each a span (judges only)."""
    judged: bool = True
    """False: could not judge. Such a verdict is counted and shown, and never read as safe or
    unsafe."""
    reason: str = ""
    """Why it could not be judged, or a short explanation."""
    score: float | None = None
    """How sure or how severe the violation is, in 0..1; each critic says which.
    None: it does not say."""

    @property
    def safe(self) -> bool:
        """No complete violation. Meaningless where `judged` is false."""
        return not any(span.complete for span in self.spans)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One text to judge: what was asked, and (a part of) what the reader saw as the answer."""

    prompt: str
    text: str
    topic: str = ""
    """What a useful answer would be about, where the prompt source knows it; critics may ignore it.
    """
    context: str = ""
    """Text that the prompt refers to, where there is one; critics may ignore it."""
    question: str = ""
    """The prompt without its context, for critics that show the two apart; empty: the prompt."""


class Critic(Protocol):
    """Judges texts. A judge of an evaluation has the same shape and is another object."""

    name: str

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """One verdict an exchange, in order."""
        ...
