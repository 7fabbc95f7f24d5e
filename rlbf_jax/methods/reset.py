"""RESET: Backtracking Improves Generation Safety (arXiv 2409.14586).

One control token, `[RESET]`, takes the whole visible response back, and the model answers afresh.
At most one a response. Everything before it stays in the context (semantics KEEP, as published;
under REWIND, ours, the fresh answer sees the prompt alone).

Supervised stage. For a prompt x with an unsafe answer y- and a safe one y+,

    L = -E log p( [RESET] y+ | x prefix(y-) ) - E log p( y+ | x )                               (1)

prefix(y-) is context only, masked from the loss.

At inference a bias on the logit of `[RESET]` trades safety against answers that are thrown away for
nothing: `rlbf evaluate RUN --tradeoff` draws the curve, `--calibrate` finds the bias at which
harmless answers are taken back at most so often.

What the paper has and this file has not: the preference stage (DPO) after the supervised one.
What is ours: how prefix(y-) is cut (the paper checks cuts with Llama Guard 2; ours end after the
injected violation, some words later, or within it), prefixes that are harmless up to a violation in
their middle, mixture shares, sizes and rates.
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

DATASET = "reset"


@dataclasses.dataclass(frozen=True)
class ResetConfig(MethodConfig):
    """RESET's own settings."""

    name: ClassVar[str] = "reset"
    paper: ClassVar[str] = "RESET, arXiv 2409.14586"
    rule: ClassVar[str] = "reset"

    injection: BsafePlusConfig = BsafePlusConfig()
    """Unsafe prefixes and the mixture with plain examples, in the terms of BSAFE+, so that both can
    be trained on the same text."""
    reset_examples: int = 4_000
    reset_sft: SupervisedConfig = SupervisedConfig()

    def __post_init__(self):
        check_at_least(self, 1, "reset_examples")

    def stages(self, e: Experiment) -> Sequence[Stage]:
        """Data, base, and the supervised stage (1)."""
        *prepared, base = foundation(e)
        data = injected_data(DATASET, make_data, self.injection, self.reset_examples, self.rule)
        sft = supervised_stage(e, "reset_sft", self.reset_sft, DATASET, headline=True)
        return [*prepared, data, base, sft]


def make_data(run: Run, config: InjectedStage) -> None:
    """The two terms of (1): injected and plain examples."""
    build_injected_dataset(run, DATASET, config, start_again)


def start_again(rule: EditRule, ids: InjectedIds) -> list[int]:
    """`[RESET] y+`, the whole safe answer."""
    return [rule.first_retraction, *ids.part1, *ids.part2]
