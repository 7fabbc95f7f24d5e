"""The trade-off curve of a stage of a run, and its calibration, written beside its evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlbf_jax.attacks import BENIGN, WORST_OF_N
from rlbf_jax.attacks.base import Attempt
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.tradeoff import (
    BIASES,
    Bench,
    Calibration,
    CalibrationOptions,
    calibrate,
    calibration_to_json,
    tradeoff_curve,
    tradeoff_to_json,
)
from rlbf_jax.progress import say
from rlbf_jax.runs.evaluate import (
    EvaluationSettings,
    Evaluator,
    calibration_file,
    calibration_stage,
)
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.runs.run import BASE, TOKENIZER, Run
from rlbf_jax.runs.stage import Stage


def write_tradeoff(evaluator: Evaluator, biases: Sequence[float] = BIASES) -> Path:
    """Sweeps the bias of directives over the run's attempts, `decoding` left out
    (it has knobs of its own).

    Writes `evaluation/tradeoff_STAGE.json` and returns its path. Raises UserError where the suite
    has no harmful or no benign attack.
    """
    run, stage = evaluator.run, evaluator.config.stage
    harmful, benign = _attempts(evaluator)
    bench = _bench(evaluator, "trade-off")
    points = tradeoff_curve(bench, harmful, benign, biases)
    name = tradeoff_file(stage)
    judge, context = evaluator.judge.name, bench.context
    run.write_json(name, tradeoff_to_json(points, judge, context, bench.control))
    say(f"{stage}: {run.folder / name}")
    return run.folder / name


def write_calibration(
    evaluator: Evaluator, options: CalibrationOptions
) -> tuple[Calibration, Path]:
    """The bias at which harmless answers are taken back at most so often.

    Writes `evaluation/calibration_STAGE.json`; returns what it holds, and its path.

    Raises UserError on the test split, or where the suite has no harmful or no benign attack.
    """
    if evaluator.suite.pool == "test":
        raise UserError("a bias is calibrated on development data; leave out --data test")
    harmful, benign = _attempts(evaluator)
    return _calibrated(evaluator, benign, harmful, options)


def _calibrated(
    evaluator: Evaluator,
    benign: Sequence[Attempt],
    harmful: Sequence[Attempt],
    options: CalibrationOptions,
) -> tuple[Calibration, Path]:
    run, bench = evaluator.run, _bench(evaluator, "calibrate")
    found = calibrate(bench, benign, harmful, options)
    name = calibration_file(evaluator.config.stage)
    content = calibration_to_json(found, evaluator.judge.name, bench.context, options)
    run.write_json(name, content)
    return found, run.folder / name


# As stages of a run -------------------------------------------------------------------------------


def calibration_stages(e: Experiment, stages: Sequence[Stage]) -> list[Stage]:
    """One a stage whose policy is calibrated before evaluations ask it."""
    made = []
    for stage in (stage for stage in stages if stage.evaluated):
        settings = EvaluationSettings.of(e, stage.name, stage.method, stage.retracts)
        if settings.calibrated:
            name, after = calibration_stage(stage.name), (TOKENIZER, BASE, stage.name)
            made.append(Stage(name, calibrate_stage, settings, after, fit=fit_calibration))
    return made


def calibrate_stage(run: Run, config: EvaluationSettings) -> None:
    """Finds the bias at which a stage takes `evaluation.calibrate` of harmless answers back."""
    evaluator = Evaluator(run, config).with_suite(pool="development")
    options = CalibrationOptions(config.evaluation.calibrate or 0.0, -8.0, 8.0, 0.25)
    found, _ = _calibrated(evaluator, _benign(evaluator), (), options)
    share = found.taken_back
    say(
        f"{config.stage}: at a bias of {found.bias:+g} on directives {share.value:.3f} of "
        f"{share.n} harmless answers are taken back"
    )


def fit_calibration(run: Run, config: EvaluationSettings) -> None:
    """Raises UserError where no harmless attack is asked, so that nothing can be calibrated."""
    if not set(config.evaluation.attacks) & BENIGN:
        raise UserError(
            f"evaluation.calibrate is {config.evaluation.calibrate}, and of evaluation.attacks "
            f"none is one of {', '.join(sorted(BENIGN))}; add one"
        )


def _benign(evaluator: Evaluator) -> list[Attempt]:
    benign = tuple(name for name in evaluator.suite.attacks if name in BENIGN)
    return evaluator.with_suite(attacks=benign).attempts


def _attempts(evaluator: Evaluator) -> tuple[list[Attempt], list[Attempt]]:
    """(harmful, benign) attempts of the suite."""
    _ = evaluator.policy  # an unfinished stage is named before anything else
    attempts = [a for a in evaluator.attempts if a.attack not in WORST_OF_N]
    harmful = [a for a in attempts if a.attack not in BENIGN]
    benign = [a for a in attempts if a.attack in BENIGN]
    if not harmful or not benign:
        raise UserError(
            f"evaluation.attacks is {', '.join(evaluator.suite.attacks)}; this needs an attack to "
            f"resist and one of {', '.join(sorted(BENIGN))}"
        )
    return harmful, benign


def _bench(evaluator: Evaluator, label: str) -> Bench:
    evaluator = evaluator.with_suite(calibrate=None)  # a bias that is swept begins at none
    sample, context = evaluator.sampling(label), evaluator.context()
    return Bench(sample, evaluator.judge, evaluator.run.tokenizer, context)


def tradeoff_file(stage: str) -> str:
    """Where the curve of a stage stands in a run's folder."""
    return f"evaluation/tradeoff_{stage}.json"
