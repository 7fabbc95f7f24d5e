"""Where the control ids of a vocabulary stand, and the rules that are made of them.

A vocabulary may have ids for several rules, each a run of neighbors, one behind the other. A rule
that is made here takes the others' ids for illegal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, overload

from rlbf_jax.directives.backtrack import BacktrackRule
from rlbf_jax.directives.replace import ReplaceRule
from rlbf_jax.directives.reset import ResetRule
from rlbf_jax.directives.rule import EditRule

DEFAULT_KINDS = ("backtrack", "reset")
"""What a vocabulary has ids for unless it is made for another method."""

RULES: dict[str, Callable[[Controls, int], EditRule]] = {
    "backtrack": lambda controls, at: BacktrackRule(at, controls.categories, x_max=controls.x_max),
    "reset": lambda controls, at: ResetRule(at),
    "replace": lambda controls, at: ReplaceRule(at, controls.categories),
}
"""THE list of edit rules: (vocabulary, first id) -> the rule, by its `kind`. A new rule is one file
and one line here."""


@dataclasses.dataclass(frozen=True)
class Controls:
    """Where the control ids of a vocabulary stand.

    Raises ValueError for kinds that are unknown, said twice, or none at all,
    and for replacements without categories.
    """

    first_id: int
    categories: tuple[str, ...]
    """Kinds of violation, in the order of their ids."""
    x_max: int
    """Largest X of `[BACKTRACK_BY_X]`."""
    kinds: tuple[str, ...] = DEFAULT_KINDS
    """Rules that there are ids for, in the order of their ids: `backtrack` (categories, then X in
    1..x_max), `reset` (one id), `replace` (flags, then one id)."""
    never: tuple[int, ...] = ()
    """Other ids that are never legal in a response: padding, template ids."""
    vocab_size: int | None = None
    """Ids of the vocabulary. Rows of a model beyond them are never legal; None: not known here, and
    `Sampler` and `Policy` take the tokenizer's."""

    def __post_init__(self):
        if not self.kinds or len(set(self.kinds)) != len(self.kinds) or set(self.kinds) - {*RULES}:
            raise ValueError(f"kinds are {self.kinds!r}, expected some of {', '.join(RULES)}, once")
        self._placed()

    def _placed(self) -> dict[str, EditRule]:
        """Every rule where its ids stand; none knows the others' ids."""
        rules: dict[str, EditRule] = {}
        at = self.first_id
        for kind in self.kinds:
            rules[kind] = RULES[kind](self, at)
            at = rules[kind].end_id
        return rules

    @property
    def end_id(self) -> int:
        """One past the last control id."""
        return self._placed()[self.kinds[-1]].end_id

    @property
    def ids(self) -> range:
        """Every control id."""
        return range(self.first_id, self.end_id)

    def names(self) -> dict[int, str]:
        """Name of every control id, in the order of the ids."""
        rules = self._placed().values()
        return {i: rule.name(i) for rule in rules for i in range(rule.first_id, rule.end_id)}

    @overload
    def rule(self, kind: Literal["backtrack"]) -> BacktrackRule: ...
    @overload
    def rule(self, kind: Literal["reset"]) -> ResetRule: ...
    @overload
    def rule(self, kind: Literal["replace"]) -> ReplaceRule: ...
    @overload
    def rule(self, kind: str | None = None) -> EditRule: ...

    def rule(self, kind: str | None = None) -> EditRule:
        """The rule of a kind, None: of the first; its `never` holds all other control ids, and no
        row beyond the vocabulary is legal.

        Raises ValueError that names the kinds there are.
        """
        kind = self.kinds[0] if kind is None else kind
        if kind not in self.kinds:
            raise ValueError(
                f"this vocabulary has no control ids of kind {kind!r}; it has those of "
                f"{', '.join(self.kinds)}"
            )
        rule = self._placed()[kind]
        others = [i for i in self.ids if not rule.is_control(i)]
        never = (*self.never, *others)
        return dataclasses.replace(rule, never=never, vocab_size=self.vocab_size)
