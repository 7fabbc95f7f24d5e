"""`rlbf evaluate`: a finished stage asked again, along a bias, or by a public benchmark."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from rlbf_jax.cli import arguments
from rlbf_jax.errors import UserError

Workdir = tyro.conf.Positional[Annotated[pathlib.Path, tyro.conf.arg(metavar="WORKDIR")]]
Flag = tyro.conf.FlagCreatePairsOff[bool]


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a stage of a run again and rebuild the report."""

    workdir: Workdir
    """Folder of a run."""
    stage: str = ""
    """A stage of the run, as base or sft; default: its last one."""
    data: Literal["development", "test"] = "development"
    """Tune on development only."""
    n_prompts: int | None = None
    """Prompts for each attack and split; default: as the run's configuration says."""
    tradeoff: Flag = False
    """Instead measure asr and false backtracks along a bias on a directive's first ids, into
    evaluation/tradeoff_STAGE.json."""
    calibrate: float | None = None
    """Instead find the largest bias on the directive's first ids at which at most this share of
    harmless answers is taken back, on development data; into evaluation/calibration_STAGE.json."""
    benchmark: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=PATH: instead ask what a public benchmark asks, from its published file;
    may be given several times."""
    leave_out: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """With --benchmark: rows with this tag or category, as copyright of harmbench;
    may be given several times."""
    judge: Literal["refusal", "run"] = "refusal"
    """With --benchmark: whatever is no refusal is a violation, or the run's own judge."""
    prefill: int | None = None
    """With --benchmark: most ids of the target that prefilling forces; default: all of it."""
    max_tokens: int | None = None
    """With --benchmark: most ids of an answer; default: as the run's configuration says."""
    temperature: float | None = None
    """With --benchmark; default: as the run's configuration says."""


def evaluate(argv: Sequence[str]) -> None:
    """`rlbf evaluate WORKDIR`."""
    args: Evaluate = arguments.parse(Evaluate, "rlbf evaluate", argv)
    if args.n_prompts is not None and args.n_prompts < 1:
        raise UserError(f"--n_prompts is {args.n_prompts}, expected at least 1")
    _check(args)
    from rlbf_jax.report.document import write_report
    from rlbf_jax.runs import load

    opened = load.open_run(args.workdir)
    stage = args.stage or opened.last_stage
    if args.benchmark:
        from rlbf_jax.runs.benchmarks import BenchmarkOptions, evaluate_benchmarks

        options = BenchmarkOptions(
            args.judge,
            args.leave_out,
            args.prefill,
            args.n_prompts,
            args.max_tokens,
            args.temperature,
        )
        evaluate_benchmarks(opened, stage, args.benchmark, options)
    else:
        evaluator = opened.evaluator(stage)
        n = evaluator.suite.n if args.n_prompts is None else args.n_prompts
        evaluator = evaluator.with_suite(pool=args.data, n=n)
        if args.tradeoff:
            from rlbf_jax.runs.tradeoff import write_tradeoff

            print(f"curve: {write_tradeoff(evaluator)}")
            return
        if args.calibrate is not None:
            show_calibration(evaluator, args.calibrate)
            return
        evaluator.evaluate()
    write_report(args.workdir)
    print(f"report: {args.workdir / 'report.html'}")


def show_calibration(evaluator, most: float) -> None:
    """Calibrates and says what came out."""
    from rlbf_jax.evaluation.tradeoff import CalibrationOptions
    from rlbf_jax.runs.tradeoff import write_calibration

    found, path = write_calibration(evaluator, CalibrationOptions(most=most))
    share = found.taken_back
    print(
        f"control_bias.{found.control} = {found.bias:g}: {share.value:.3f} "
        f"[{share.low:.3f}, {share.high:.3f}] of {share.n} harmless answers taken back"
        + (f", asr {found.asr.value:.3f}" if found.asr else "")
    )
    if not found.met:
        print(f"not met: even at {found.bias:g} more than {most:g} are taken back")
    if found.at_limit:
        print(f"{found.bias:g} is the greatest bias that was tried; a larger one might do")
    if not found.monotone:
        print("the share did not grow with the bias everywhere; a larger bias may do as well")
    print(f"calibration: {path}")


def _check(args: Evaluate) -> None:
    """Raises UserError for an option that the rest of the command would ignore."""
    default = Evaluate(args.workdir)
    of_benchmarks = ("leave_out", "judge", "prefill", "max_tokens", "temperature")
    given = [name for name in of_benchmarks if getattr(args, name) != getattr(default, name)]
    if given and not args.benchmark:
        raise UserError(f"--{given[0]} is for --benchmark NAME=PATH")
    ways = {"tradeoff": args.tradeoff, "benchmark": args.benchmark, "calibrate": args.calibrate}
    given = [f"--{name}" for name, value in ways.items() if value not in (False, (), None)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are several commands; give one of them")
    if args.calibrate is not None and not 0 <= args.calibrate <= 1:
        raise UserError(f"--calibrate is {args.calibrate}, expected a share in 0..1")
