"""The output handler in plain Python: ids -> visible ids and the list of edits.

The one replay of a trace outside arrays: traces for people and every metric read what it finds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from rlbf_jax.directives.rule import NEVER, EditRule

IdKind = Literal["content", "copy", "category", "retraction"]
"""What an emitted id is: words of the text, an invisible copy of some, or a control id."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """One executed retraction."""

    index: int
    """Index of the retraction id among the emitted ids."""
    category: str | None
    """Announced category; None for a bare retraction."""
    requested: int
    """X, or how many ids were copied; NEVER for a reset."""
    before: tuple[int, ...]
    """Visible ids just before the directive."""
    kept: int
    """How many of them stay visible; `before[kept:]` were removed."""
    start: int
    """Index at which the directive starts: its category's, `index` for a bare retraction."""
    before_items: tuple[int, ...]
    """Indices of `before` among the emitted ids."""

    @property
    def removed(self) -> tuple[int, ...]:
        return self.before[self.kept :]

    @property
    def removed_items(self) -> tuple[int, ...]:
        """Indices of `removed` among the emitted ids."""
        return self.before_items[self.kept :]

    @property
    def clamped(self) -> bool:
        return NEVER > self.requested > len(self.before)


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A trace as its reader sees it."""

    visible: tuple[int, ...]
    edits: tuple[Edit, ...]
    malformed: int
    """Categories without a retraction, one at the very end included."""
    kinds: tuple[IdKind, ...]
    """What each emitted id is."""
    erased_by: tuple[int | None, ...]
    """For each emitted id, the index in `edits` of the edit that took it out of view, or None."""
    visible_items: tuple[int, ...]
    """Indices of `visible` among the emitted ids."""


def render(rule: EditRule, emitted: Sequence[int] | np.ndarray) -> Rendered:
    """Applies the edits of a trace (response ids only, plain Python)."""
    tokens = [int(token) for token in emitted]
    kinds: list[IdKind] = []
    erased_by: list[int | None] = [None] * len(tokens)
    visible: list[int] = []
    edits: list[Edit] = []
    opened: int | None = None
    copied = malformed = 0
    for index, token in enumerate(tokens):
        if rule.is_retraction(token):
            kinds.append("retraction")
            requested = int(rule.amount(token, copied))
            kept = max(0, len(visible) - requested)
            category = None if opened is None else rule.categories[tokens[opened] - rule.first_id]
            for item in visible[kept:]:
                erased_by[item] = len(edits)
            edits.append(
                Edit(
                    index=index,
                    category=category,
                    requested=requested,
                    before=tuple(tokens[item] for item in visible),
                    kept=kept,
                    start=index if opened is None else opened,
                    before_items=tuple(visible),
                )
            )
            del visible[kept:]
            opened, copied = None, 0
        elif rule.is_category(token):
            kinds.append("category")
            malformed += opened is not None
            opened, copied = index, 0
        elif rule.copies and opened is not None:
            kinds.append("copy")
            copied += 1
        else:
            kinds.append("content")
            malformed += opened is not None
            opened = None
            visible.append(index)
    return Rendered(
        visible=tuple(tokens[item] for item in visible),
        edits=tuple(edits),
        malformed=malformed + (opened is not None),
        kinds=tuple(kinds),
        erased_by=tuple(erased_by),
        visible_items=tuple(visible),
    )
