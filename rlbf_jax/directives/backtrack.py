"""RLBF's rule: `[CATEGORY_c] [BACKTRACK_BY_X]` takes the last X visible ids back."""

from __future__ import annotations

import dataclasses

from rlbf_jax.directives.rule import EditRule


@dataclasses.dataclass(frozen=True)
class BacktrackRule(EditRule):
    """RLBF (arXiv 2602.08377, section 3): `[CATEGORY_c]` then `[BACKTRACK_BY_X]`, X in 1..x_max.

    X counts visible response ids; control ids are never visible and never counted. X beyond the
    text clamps. The paper does not state the range of X.
    """

    kind = "backtrack"

    x_max: int = 32

    @property
    def num_retractions(self) -> int:
        return self.x_max

    def amount(self, token, copied=0):
        return token - self.first_retraction + 1

    def rewound(self, budget: int, room: int) -> int:
        return budget * (self.x_max + 2)

    def backtrack_id(self, x: int) -> int:
        """Id of `[BACKTRACK_BY_x]`. Raises ValueError outside 1..x_max:
        X is never clamped when we build data."""
        if not 1 <= x <= self.x_max:
            raise ValueError(f"X = {x} is outside 1..{self.x_max}; raise x_max or split the span")
        return self.first_retraction + x - 1

    def name(self, token: int) -> str:
        if self.is_category(token):
            return f"[CATEGORY_{self.categories[token - self.first_id].upper()}]"
        return f"[BACKTRACK_BY_{self.amount(token)}]"
