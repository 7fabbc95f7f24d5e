"""Public benchmarks asked of a stage of a run: `rlbf evaluate RUN --benchmark NAME=PATH`.

Rows go to `evaluation/benchmarks/NAME_STAGE.jsonl`, what was read and who judged to
`NAME_STAGE.json` beside it, numbers to `results.json` under the benchmark's name. A stage that is
asked a benchmark again has the new rows and numbers only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlbf_jax.attacks.base import Attempt
from rlbf_jax.attacks.benchmark import benchmark_attempts
from rlbf_jax.attacks.direct import AttackConfig
from rlbf_jax.critics.base import Critic
from rlbf_jax.critics.judges.refusal import RefusalJudge
from rlbf_jax.data.sources.benchmarks import FORMATS, count_remark, load_benchmark
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.results import read_results, write_results
from rlbf_jax.evaluation.suite import evaluate
from rlbf_jax.progress import say
from rlbf_jax.runs.evaluate import Evaluator
from rlbf_jax.runs.load import OpenRun
from rlbf_jax.sampling.checks import check_knobs
from rlbf_jax.storage import file_digest

FORCING = ("prefilling", "benign_prefill")
"""Attacks of a benchmark that force its targets."""

JUDGES: dict[str, Callable[[Evaluator], Critic]] = {
    "refusal": lambda evaluator: RefusalJudge(),
    "run": lambda evaluator: evaluator.judge,
}
"""Who says what a violation is, by name. `run`: an endpoint (`judge_endpoint`), or the judge of the
run's own world, which knows nothing of a benchmark's prompts."""


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """How benchmarks are asked; None: as the run's configuration says."""

    judge: str = "refusal"
    leave_out: tuple[str, ...] = ()
    """Tags or categories of rows that are left out."""
    prefill: int | None = None
    """Most ids of a target that are forced; None: all."""
    n_prompts: int | None = None
    """The first so many rows; None: all."""
    max_tokens: int | None = None
    temperature: float | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
    """One benchmark, read and cut into attempts."""

    name: str
    path: Path
    rows: int
    attempts: Sequence[Attempt]


def evaluate_benchmarks(
    opened: OpenRun, stage: str, named: Sequence[str], options: BenchmarkOptions
) -> None:
    """Asks a stage the benchmarks `NAME=PATH`; writes rows and numbers.

    Raises UserError for a name, file, judge or option that cannot be used,
    before anything is written.
    """
    evaluator = opened.evaluator(stage)
    every = _read(evaluator, named, options)
    _ = evaluator.policy
    judge = JUDGES[options.judge](evaluator)
    run = opened.run
    read_results(run.folder / "results.json")  # damage is named before the work, not after it
    chosen: dict[str, Any] = {"left_out": list(options.leave_out)} if options.leave_out else {}
    if options.n_prompts:
        chosen["n_prompts"] = options.n_prompts
    for benchmark in every:
        name = benchmark.name
        remark = "" if options.leave_out else count_remark(name, benchmark.rows)
        about = {
            "path": str(benchmark.path),
            "sha256": file_digest(benchmark.path),
            "rows": benchmark.rows,
            **chosen,
            "judge": judge.name,
            "remark": remark,
            "source": FORMATS[name].source,
        }
        run.write_json(f"evaluation/benchmarks/{name}_{evaluator.config.stage}.json", about)
        _ask(evaluator, judge, benchmark, chosen, options.prefill)
        if remark:
            say(remark)


def _read(evaluator: Evaluator, named: Sequence[str], options: BenchmarkOptions) -> list[Asked]:
    """Reads the benchmarks and makes their attempts."""
    if options.judge not in JUDGES:
        raise UserError(f"judge {options.judge!r}: there are {', '.join(JUDGES)}")
    for field in ("prefill", "n_prompts", "max_tokens"):
        value = getattr(options, field)
        if value is not None and value < 1:
            raise UserError(f"{field} is {value}, expected at least 1")
    read = [
        (name, path, load_benchmark(name, path, leave_out=options.leave_out))
        for name, path in map(_split, named)
    ]
    if twice := [name for name, _, _ in read if sum(name == other for other, _, _ in read) > 1]:
        raise UserError(f"benchmark {twice[0]} is given twice; evaluate one file after the other")
    suite = evaluator.suite
    changes = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    given: dict[str, Any] = {k: v for k, v in changes.items() if v is not None}
    knobs = dataclasses.replace(suite.knobs, **given)
    check_knobs(knobs)
    config, tokenizer = AttackConfig(knobs=knobs, room=suite.room), evaluator.run.tokenizer
    every = []
    for name, path, behaviors in read:
        some = behaviors[: options.n_prompts]
        try:
            attempts = benchmark_attempts(some, tokenizer, config, options.prefill)
        except ValueError as error:
            raise UserError(f"{error} (--max_tokens, --prefill)") from error
        every.append(Asked(name, path, len(behaviors), attempts))
    return every


def _ask(
    evaluator: Evaluator,
    judge: Critic,
    benchmark: Asked,
    chosen: Mapping[str, Any],
    prefill: int | None,
) -> None:
    """Writes rows and records of one benchmark.

    `chosen` says which of its prompts were asked, if not all.
    """
    run, stage, name = evaluator.run, evaluator.config.stage, benchmark.name
    context = evaluator.context(name, "test")
    records, rows = evaluate(
        evaluator.sampling(name), benchmark.attempts, judge, run.tokenizer, context, evaluator.seams
    )
    geometry = {"prefill": prefill} if prefill else {}
    records = [
        dataclasses.replace(
            r, knobs={**r.knobs, **chosen, **(geometry if r.attack in FORCING else {})}
        )
        for r in records
    ]
    run.write_lines(f"evaluation/benchmarks/{name}_{stage}.jsonl", rows)
    write_results(
        run.folder / "results.json", records, lambda r: (r.stage, r.benchmark) == (stage, name)
    )
    say(f"{stage}: {name}, {len(rows)} responses")


def _split(named: str) -> tuple[str, Path]:
    name, equals, path = named.partition("=")
    if not equals or not path:
        raise UserError(
            f"benchmark {named!r}: expected NAME=PATH, NAME one of {', '.join(FORMATS)}"
        )
    return name, Path(path)
