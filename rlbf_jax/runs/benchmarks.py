"""Public benchmarks asked of a stage of a run: `rlbf evaluate RUN --benchmark NAME=PATH`.

Rows go to `evaluation/benchmarks/NAME_STAGE.jsonl`, what was read and who judged to
`NAME_STAGE.json` beside it, numbers to `results.json` under the benchmark's name. A stage that is
asked a benchmark again has the new rows and numbers only.
"""

from __future__ import annotations

import dataclasses
import hashlib
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
from rlbf_jax.methods.rlbf import method_name
from rlbf_jax.progress import say
from rlbf_jax.report.document import write_report
from rlbf_jax.runs import execute as runner
from rlbf_jax.runs.workspace import Workspace
from rlbf_jax.sampling.sampler import check_knobs

FORCING = ("prefilling", "benign_prefill")
"""Attacks of a benchmark that force its targets."""

JUDGES: dict[str, Callable[[Workspace], Critic]] = {
    "refusal": lambda work: RefusalJudge(),
    "run": lambda work: work.judge,
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


def evaluate_benchmarks(
    workdir: Path, stage: str, named: Sequence[str], options: BenchmarkOptions
) -> None:
    """Asks a stage the benchmarks `NAME=PATH` and rebuilds the report.

    Raises UserError for a name, file, judge or option that cannot be used, before anything is
    written.
    """
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
    work = runner.open_run(workdir)
    config = work.config.evaluation
    knobs = dataclasses.replace(
        config.knobs,
        max_tokens=config.knobs.max_tokens if options.max_tokens is None else options.max_tokens,
        temperature=config.knobs.temperature
        if options.temperature is None
        else options.temperature,
    )
    check_knobs(knobs)
    told = AttackConfig(knobs=knobs, room=config.room)
    try:
        attempts = [
            benchmark_attempts(
                behaviors[: options.n_prompts], work.tokenizer, told, options.prefill
            )
            for _, _, behaviors in read
        ]
    except ValueError as error:
        raise UserError(f"{error} (--max_tokens, --prefill)") from error
    params, judge = work.params(stage), JUDGES[options.judge](work)
    read_results(
        work.folder / "results.json"
    )  # a damaged file is named before the work, not after it
    chosen: dict[str, Any] = {"left_out": list(options.leave_out)} if options.leave_out else {}
    if options.n_prompts:
        chosen["n_prompts"] = options.n_prompts
    for (name, path, behaviors), asked in zip(read, attempts, strict=True):
        remark = "" if options.leave_out else count_remark(name, len(behaviors))
        about = {
            "path": str(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "rows": len(behaviors),
            **chosen,
            "judge": judge.name,
            "remark": remark,
            "source": FORMATS[name].source,
        }
        work.write_json(f"evaluation/benchmarks/{name}_{stage}.json", about)
        _ask(
            work,
            stage,
            params,
            judge,
            name,
            asked,
            chosen,
            {"prefill": options.prefill} if options.prefill else {},
        )
        if remark:
            say(remark)
    write_report(workdir)


def _ask(
    work: Workspace,
    stage: str,
    params: dict,
    judge: Critic,
    name: str,
    attempts: Sequence[Attempt],
    chosen: Mapping[str, Any],
    geometry: Mapping[str, int],
) -> None:
    """Writes rows and records of one benchmark.

    `chosen` says which of its prompts were asked, if not all; `geometry` what of prefilling differs
    from the default.
    """
    context = work.context(stage, method_name(work.config, stage), name, "test")
    records, rows = evaluate(work.sampling(params, name), attempts, judge, work.tokenizer, context)
    records = [
        dataclasses.replace(
            r, knobs={**r.knobs, **chosen, **(geometry if r.attack in FORCING else {})}
        )
        for r in records
    ]
    work.write_lines(f"evaluation/benchmarks/{name}_{stage}.jsonl", rows)
    write_results(
        work.folder / "results.json", records, lambda r: (r.stage, r.benchmark) == (stage, name)
    )
    say(f"{stage}: {name}, {len(rows)} responses")


def _split(named: str) -> tuple[str, Path]:
    name, equals, path = named.partition("=")
    if not equals or not path:
        raise UserError(
            f"benchmark {named!r}: expected NAME=PATH, NAME one of {', '.join(FORMATS)}"
        )
    return name, Path(path)
