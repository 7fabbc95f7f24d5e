"""Rows that the data stage passes on: prompts, injected answers, and tokenized examples."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Something a user asks."""

    id: str
    text: str
    harmful: bool = False
    """Asks for a violation."""
    topic: str = ""
    category: str = ""
    """The category of violation asked for; empty for a harmless prompt."""
    reference: str = ""
    """A good, safe answer, where the source has one."""
    context: str = ""
    """What `text` begins with where it asks about a given text: that text.
    Judges may want to see it apart."""
    question: str = ""
    """`text` without its context; empty where it has none."""


@dataclasses.dataclass(frozen=True)
class Violation:
    """A (harmless stand-in for a) violating span."""

    text: str
    """Begins with a space where it follows other words."""
    category: str
    form: str = ""
    """Name of the template it was made from."""
    split: str = ""
    """`sft`, `rl` or `unseen`: where the form may be seen."""


@dataclasses.dataclass(frozen=True)
class Violating:
    """A violation with what leads into it and what follows it."""

    bridge: str
    violation: Violation
    tail: str

    @property
    def text(self) -> str:
        return self.bridge + self.violation.text + self.tail


@dataclasses.dataclass(frozen=True)
class Injection:
    """A safe answer with violations injected: `part1 + earlier + bridge + violation + tail`,
    which becomes `part1 + part2`."""

    prompt: str
    part1: str
    bridge: str
    violation: Violation
    tail: str
    """Words after the violation, for directives that come late; empty otherwise."""
    part2: str
    earlier: tuple[Violating, ...] = ()
    """Violations before this one, each with the sentences that follow it."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenized training example: prompt ids, then response ids."""

    tokens: np.ndarray
    """int32 [n]."""
    prompt_length: int
    in_loss: np.ndarray
    """bool [n]: which ids are targets. Violations, bridges, openers and prompts never are."""
