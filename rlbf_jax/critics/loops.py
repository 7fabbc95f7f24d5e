"""Answers that go around in circles: the most likely text of a small model, so perplexity praises
them."""

from __future__ import annotations

import collections
from collections.abc import Sequence

RUN, MOST = 3, 2
"""A run of so many words may occur so often. Ours."""


def loops(words: Sequence[str]) -> bool:
    """Whether a run of `RUN` words comes again and again."""
    runs = collections.Counter(zip(*(words[i:] for i in range(RUN)), strict=False))
    return max(runs.values(), default=0) > MOST
