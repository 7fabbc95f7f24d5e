"""RESET's rule: one control token takes the whole visible response back."""

from __future__ import annotations

import dataclasses

from rlbf_jax.directives.rule import NEVER, EditRule


@dataclasses.dataclass(frozen=True)
class ResetRule(EditRule):
    """RESET (arXiv 2409.14586): one token that removes the whole visible response. The usual budget
    is 1."""

    kind = "reset"

    @property
    def num_retractions(self) -> int:
        return 1

    def amount(self, token, copied=0):
        return token * 0 + NEVER

    def rewound(self, budget: int, room: int) -> int:
        return budget * (room + 2)

    def clamps(self, asked, visible):
        return (asked > visible) & False

    def name(self, token: int) -> str:
        if self.is_category(token):
            return f"[CATEGORY_{self.categories[token - self.first_id].upper()}]"
        return "[RESET]"
