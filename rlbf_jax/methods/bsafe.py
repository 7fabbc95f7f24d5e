"""BSAFE: Backtracking for Safety (arXiv 2503.08919).

The model flags a violation by kind, repeats the violating span, and gives what belongs there
instead; the reader sees the text with the span replaced:

    ... violation [FLAG_c] violation [REPLACE] replacement ...                                  (1)

The repeated span says how much is replaced, so the model need not count; repeating it costs tokens.
Later tokens still see everything (semantics KEEP, as published; REWIND is ours).

Supervised stage: masked cross-entropy. With a safe answer cut in two, part1 + part2, and a bridge b
and a violation v injected between,

    L = -E log p( [FLAG_c] b v [REPLACE] part2 | prompt part1 b v )                             (2)

The first b v are context only, masked from the loss; the repeated ones are learned.

The paper's full text could not be reached; this follows its abstract and what RLBF (arXiv
2602.08377, same first author) says of it. Ours are: the token names and their order, that the span
is repeated with its bridge and stands at the end of what is visible, that the replacement is the
rest of the safe answer (nothing marks where a replacement ends), the data (the paper has questions,
answers and annotated violations by models), and all sizes and rates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from rlbf_jax.data.builders.injection import BsafePlusConfig, InjectedIds
from rlbf_jax.directives import EditRule
from rlbf_jax.methods.shared import (
    InjectedStage,
    build_injected_dataset,
    foundation,
    injected_data,
    supervised_stage,
)
from rlbf_jax.ranges import check_at_least
from rlbf_jax.runs.experiment import Experiment, MethodConfig
from rlbf_jax.runs.run import Run
from rlbf_jax.runs.stage import Stage
from rlbf_jax.training.supervised import SupervisedConfig

DATASET = "bsafe"


@dataclasses.dataclass(frozen=True)
class BsafeConfig(MethodConfig):
    """BSAFE's own settings."""

    name: ClassVar[str] = "bsafe"
    paper: ClassVar[str] = "BSAFE, arXiv 2503.08919"
    rule: ClassVar[str] = "replace"
    rules: ClassVar[tuple[str, ...]] = ("replace",)

    injection: BsafePlusConfig = BsafePlusConfig()
    """Violations and the mixture with plain examples, in the terms of BSAFE+, so that both can be
    trained on the same text."""
    bsafe_examples: int = 4_000
    bsafe_sft: SupervisedConfig = SupervisedConfig()

    def __post_init__(self):
        check_at_least(self, 1, "bsafe_examples")

    def stages(self, e: Experiment) -> Sequence[Stage]:
        """Data, base, and the supervised stage (2)."""
        *prepared, base = foundation(e)
        data = injected_data(DATASET, make_data, self.injection, self.bsafe_examples, self.rule)
        sft = supervised_stage(e, "bsafe_sft", self.bsafe_sft, DATASET, headline=True)
        return [*prepared, data, base, sft]


def make_data(run: Run, config: InjectedStage) -> None:
    """Injected examples (2) and plain ones."""
    build_injected_dataset(run, DATASET, config, replace_span)


def replace_span(rule: EditRule, ids: InjectedIds) -> list[int]:
    """`[FLAG_c]`, the span again, `[REPLACE]`, and the safe rest."""
    flag = rule.category_id(ids.category)
    return [flag, *ids.taken, rule.first_retraction, *ids.part2]
