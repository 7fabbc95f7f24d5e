"""The trade-off curve of a stage of a run, written beside its evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlbf_jax.attacks import BENIGN
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.tradeoff import BIASES, tradeoff_curve, tradeoff_to_json
from rlbf_jax.progress import say
from rlbf_jax.runs.evaluate import Evaluator


def write_tradeoff(evaluator: Evaluator, biases: Sequence[float] = BIASES) -> Path:
    """Sweeps the bias of directives over the run's attempts, `decoding` left out (it has knobs of
    its own).

    Writes `evaluation/tradeoff_STAGE.json` and returns its path. Raises UserError where the suite
    has no harmful or no benign attack.
    """
    run, stage = evaluator.run, evaluator.config.stage
    _ = evaluator.policy
    attempts = [a for a in evaluator.attempts if a.attack != "decoding"]
    harmful = [a for a in attempts if a.attack not in BENIGN]
    benign = [a for a in attempts if a.attack in BENIGN]
    if not harmful or not benign:
        raise UserError(
            f"evaluation.attacks is {', '.join(evaluator.suite.attacks)}; a trade-off needs an "
            f"attack to resist and one of {', '.join(sorted(BENIGN))}"
        )
    context, judge = evaluator.context(), evaluator.judge
    sample = evaluator.sampling("trade-off")
    points = tradeoff_curve(sample, harmful, benign, judge, run.tokenizer, context, biases)
    name = tradeoff_file(stage)
    run.write_json(name, tradeoff_to_json(points, judge.name, context))
    say(f"{stage}: {run.folder / name}")
    return run.folder / name


def tradeoff_file(stage: str) -> str:
    """Where the curve of a stage stands in a run's folder."""
    return f"evaluation/tradeoff_{stage}.json"
