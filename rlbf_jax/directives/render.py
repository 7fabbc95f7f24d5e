"""The output handler in plain Python: ids -> visible ids and the list of edits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rlbf_jax.directives.rule import NEVER, EditRule


@dataclasses.dataclass(frozen=True)
class Edit:
    """One executed retraction."""

    index: int
    """Index of the retraction id among the emitted ids."""
    category: str | None
    """Announced category; None for a bare retraction."""
    requested: int
    """X; NEVER for a reset."""
    before: tuple[int, ...]
    """Visible ids just before the directive."""
    kept: int
    """How many of them stay visible; `before[kept:]` were removed."""

    @property
    def removed(self) -> tuple[int, ...]:
        return self.before[self.kept :]

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


def render(rule: EditRule, emitted: Sequence[int]) -> Rendered:
    """Applies the edits of a trace (response ids only, plain Python)."""
    visible: list[int] = []
    edits: list[Edit] = []
    pending: str | None = None
    malformed = 0
    for index, token in enumerate(int(t) for t in emitted):
        if rule.is_retraction(token):
            asked = int(rule.amount(token))
            kept = max(0, len(visible) - asked)
            edits.append(Edit(index, pending, asked, tuple(visible), kept))
            del visible[kept:]
            pending = None
            continue
        malformed += pending is not None
        pending = rule.categories[token - rule.first_id] if rule.is_category(token) else None
        if pending is None:
            visible.append(token)
    return Rendered(tuple(visible), tuple(edits), malformed + (pending is not None))
