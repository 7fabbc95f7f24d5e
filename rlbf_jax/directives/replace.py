"""BSAFE's rule: `[FLAG_c]`, a copy of the violating words, `[REPLACE]`,
and safe words in their place."""

from __future__ import annotations

import dataclasses

from rlbf_jax.directives.rule import EditRule, EditState, Legal, Limits


@dataclasses.dataclass(frozen=True)
class ReplaceRule(EditRule):
    """BSAFE (arXiv 2503.08919): a flag, the violating span once more, and what stands for it.

    A trace: violating words, `[FLAG_c]`, a copy of them, `[REPLACE]`, safe words, and the text goes
    on. The copy is never visible; `[REPLACE]` removes as many visible ids as were copied.

    The paper's text could not be read whole. From its abstract and from what RLBF says of it: a
    flag for each category, the harmful part repeated, a token that announces the replacement, and a
    handler that substitutes the span. Ours: that the copy is counted and not compared (it says how
    much to take back, and any content ids will do), that a flag while one is open drops it with its
    copy, that a copy never closed leaves the text as it is, the grammar, and REWIND, under which
    copy and directive die with the erased ids.

    Control ids: the flags, then `[REPLACE]`.
    """

    kind = "replace"
    copies = True
    start_room = 4
    """Flag, one copied id, `[REPLACE]`, and one id more."""

    def __post_init__(self):
        if not self.categories:
            raise ValueError("a ReplaceRule needs at least one category: a flag opens the copy")

    @property
    def num_retractions(self) -> int:
        return 1

    def amount(self, token, copied=0):
        return copied

    @property
    def replace_id(self) -> int:
        """Id of `[REPLACE]`."""
        return self.first_retraction

    def name(self, token: int) -> str:
        if self.is_category(token):
            return f"[FLAG_{self.categories[token - self.first_id].upper()}]"
        return "[REPLACE]"

    def legal(self, state: EditState, limits: Limits) -> Legal:
        """As for every rule; an open flag asks for a copy, and for `[REPLACE]` after it.

        With two ids left only `[REPLACE]` is legal, so that the directive closes and one id more
        fits; otherwise it needs something copied first.
        """
        legal = super().legal(state, limits)
        free = ~(state.pending & limits.grammar)
        close = limits.max_emitted - state.emitted <= 2
        return legal._replace(
            content=free | ~close,
            retraction=legal.retraction & (free | close | (state.copied > 0)),
        )
