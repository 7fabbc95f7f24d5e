"""The trade-off curve of a stage of a run, written beside its evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlbf_jax.attacks import BENIGN
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.tradeoff import (
    BIASES,
    TradeoffPoint,
    control_of,
    tradeoff_curve,
    tradeoff_to_json,
)
from rlbf_jax.progress import say
from rlbf_jax.runs.workspace import Workspace


def write_tradeoff(
    work: Workspace, stage: str, method: str, biases: Sequence[float] = BIASES
) -> list[TradeoffPoint]:
    """Sweeps the bias of the categories over the run's attempts, `decoding` left out (it has knobs
    of its own).

    Writes `evaluation/tradeoff_STAGE.json`. Raises UserError where the suite has no harmful or no
    benign attack.
    """
    config = work.config.evaluation
    attempts = [a for a in work.attempts if a.attack != "decoding"]
    harmful = [a for a in attempts if a.attack not in BENIGN]
    benign = [a for a in attempts if a.attack in BENIGN]
    if not harmful or not benign:
        raise UserError(
            f"evaluation.attacks is {', '.join(config.attacks)}; a trade-off needs an attack to "
            "resist and one of "
            f"{', '.join(sorted(BENIGN))}"
        )
    context, sample = work.context(stage, method), work.sampling(work.params(stage), "trade-off")
    points = tradeoff_curve(sample, harmful, benign, work.judge, work.tokenizer, context, biases)
    name = tradeoff_file(stage)
    control = control_of(context.rule or work.tokenizer.rule)
    work.write_json(name, tradeoff_to_json(points, work.judge.name, context, control))
    say(f"{stage}: {work.folder / Path(name)}")
    return points


def tradeoff_file(stage: str) -> str:
    """Where the curve of a stage stands in a run's folder."""
    return f"evaluation/tradeoff_{stage}.json"
