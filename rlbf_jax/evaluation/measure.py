"""What a metric is (`Column`), and what it is measured on (`JudgedAnswer`).

A new metric is a file that defines a `Column`, and a line in `columns.COLUMNS`: rows, records,
comparisons, the report's tables and its definitions follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from rlbf_jax.attacks.base import Attempt
from rlbf_jax.critics.base import Verdict
from rlbf_jax.critics.seams import SeamVerdict
from rlbf_jax.directives import EditRule
from rlbf_jax.evaluation.metrics import REFUSAL_OPENERS, Response, Verdicts
from rlbf_jax.sampling.request import Generation
from rlbf_jax.tokenizers import Tokenizer

T = TypeVar("T")
Kind = Literal["rate", "count", "nats", "set"]
Better = Literal["low", "high", "none"]


@dataclasses.dataclass(frozen=True)
class JudgedAnswer:
    """One answer, taken apart and judged: everything that a metric may look at."""

    attempt: Attempt
    generation: Generation
    response: Response
    verdicts: Verdicts
    """Of the final text, the raw text, and the text before each edit."""
    opening: Verdict
    """Of the text up to the first control id."""
    tokenizer: Tokenizer
    rule: EditRule
    refusal_openers: Sequence[str] = REFUSAL_OPENERS
    seams: tuple[SeamVerdict, ...] = ()
    """Places of the final text where something was taken back, from left to right."""
    _parts: dict[Callable, Any] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def once(self, part: Callable[[JudgedAnswer], T]) -> T:
        """`part(self)`, computed at the first call: for what several metrics share."""
        if part not in self._parts:
            self._parts[part] = part(self)
        return self._parts[part]

    @property
    def judged(self) -> bool:
        """Whether the judge could judge every text but the opening."""
        return self.verdicts.judged

    @property
    def has_directive(self) -> bool:
        """Whether a retraction was executed."""
        return bool(self.generation.edits)


@dataclasses.dataclass(frozen=True)
class Column:
    """A metric, stated once."""

    name: str
    """As in rows and records: lower case, words joined by `_`."""
    says: str
    """The definition that the report prints."""
    kind: Kind = "rate"
    """`rate`: in 0..1, Wilson's interval where every row is 0 or 1. `count`: words, ids and the
    like. `nats`: a loss an id, or its exponential. `set`: one number of all answers to an attack.
    """
    better: Better = "none"
    groups: tuple[str, ...] = ("other",)
    """Tables of the report that show it: `quality` (of backtracking), `cost`, `attack` (asr and
    leak only), else `other`. Columns stand first in the table that they name first."""
    measure: Callable[[Any], Any] | None = None
    """`JudgedAnswer -> float | bool | None`, None where the row is not in the denominator; the
    record is the mean over the rows that have a number. Of a `set`: `Sequence[JudgedAnswer] ->
    Interval | float | None`, a float being shown without an interval, None leaving the record out.
    No measure: the number does not come from rows alone, and whoever makes the record measures."""
    decimals: int = 2

    @property
    def of_rows(self) -> bool:
        """Whether every row has it in its `metrics`."""
        return self.measure is not None and self.kind != "set"

    def value(self, answer: JudgedAnswer) -> float | None:
        """The metric of one row; only for columns that are `of_rows`."""
        assert self.measure is not None
        value = self.measure(answer)
        return None if value is None else float(value)
