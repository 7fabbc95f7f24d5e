"""What every search for a suffix shares: how the suffix stands in the prompt,
what is wished for, what comes out.

`Goal` holds answer ids, because an answer is sampled as ids and never re-tokenized.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from rlbf_jax.attacks.search.gcg_step import check_control_floor
from rlbf_jax.ranges import check_at_least, check_between


@dataclasses.dataclass(frozen=True)
class SuffixConfig:
    """How a suffix is searched for, by whatever search."""

    init: str | tuple[int, ...] = " x" * 20
    """Text or ids the suffix begins as; it keeps its number of ids."""
    placement: Literal["after", "before"] = "after"
    """Of the suffix, in the user's message."""
    separator: str = ""
    """Between the user's own words and the suffix."""
    filter_ids: bool = True
    """Only suffixes survive whose conversation, written as text and encoded,
    has the very ids that were optimized."""
    allow_non_ascii: bool = False
    kind: Literal["ce", "mellowmax"] = "ce"
    alpha: float = 1.0
    """Of mellowmax."""
    control_weight: float = 0.0
    """Of the log-probability of a directive where a goal says it counts:
    above 0 suppresses, below 0 provokes."""
    control_floor: float | None = None
    """Nats. Suppressing a directive below this log-probability gains nothing;
    provoking has no such limit."""
    early_stop: bool = False
    """Stop when some candidate makes the whole target the likeliest answer. As in nanoGCG the step
    is finished, and the suffix of lowest loss, which may be another one, is the result."""
    batch_size: int | None = None
    """Candidates in memory at a time; None: 32 on CPU, whose caches hold what
    so few need, and 64 elsewhere."""
    seed: int = 0

    def __post_init__(self):
        check_at_least(self, 1, "batch_size")
        check_control_floor(self.control_floor)
        check_between(self, 0, 2**32 - 1, "seed")
        if not self.init:
            raise ValueError("init is empty, expected the text or ids that the suffix begins as")

    def compose(self, prompt: str, suffix: str) -> str:
        """The user's message."""
        parts = (prompt, suffix) if self.placement == "after" else (suffix, prompt)
        return self.separator.join(parts)


@dataclasses.dataclass(frozen=True)
class Goal:
    """A prompt, and the answer that a suffix is to bring about."""

    prompt: str
    answer: tuple[int, ...]
    """Response ids."""
    target: tuple[int, int]
    """(begin, end) in the answer: the ids whose loss counts."""
    control: tuple[int, int] = (0, 0)
    """(begin, end) in the answer: where the beginning of a directive counts, given the ids before.
    """

    def __post_init__(self):
        for name in ("target", "control"):
            begin, end = getattr(self, name)
            if not 0 <= begin <= end <= len(self.answer):
                raise ValueError(
                    f"{name} is {begin}..{end}, expected a range within the {len(self.answer)} "
                    "answer ids"
                )
        if self.target[0] == self.target[1] and self.control[0] == self.control[1]:
            raise ValueError("neither target nor control has an id, so nothing is searched for")


@dataclasses.dataclass(frozen=True)
class Found:
    """The result for one goal."""

    goal: Goal
    ids: tuple[int, ...]
    """The suffix of lowest loss, the start included."""
    text: str
    """The user's message with it."""
    loss: float
    start_loss: float
    losses: np.ndarray
    """float32 [steps done]: lowest candidate loss of each step, +inf where all
    candidates were filtered out."""
    history: np.ndarray
    """int32 [steps done, n]: current suffix after each step."""
    stopped: bool
    """By an exact match."""
    filtered_steps: int
    """Steps all of whose candidates were filtered out; the suffix stayed as it was."""
    evaluations: int
    """Candidates whose loss was found."""
