"""`rlbf run | generate | evaluate | attack | report | critic | audit | data | import | export`,
thin and lazy."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import tyro

from rlbf_jax.cli import arguments
from rlbf_jax.cli import attack as cli_attack
from rlbf_jax.cli import models as cli_models
from rlbf_jax.errors import Preempted, UserError, machine_error
from rlbf_jax.training.preemption import EXIT_CODE, interruptible

Workdir = tyro.conf.Positional[Annotated[pathlib.Path, tyro.conf.arg(metavar="WORKDIR")]]
Flag = tyro.conf.FlagCreatePairsOff[bool]

# The arguments of each command, parsed by tyro; docstrings are the help texts ---------------------


@dataclasses.dataclass(frozen=True)
class Generate:
    """Sample from a stage of a run. On a terminal erased words are shown struck through."""

    workdir: Workdir
    """Folder of a run."""
    stage: str = "rlbf"
    """base, sft, rlbf or another stage of the run."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to ask; may be given several times. Without it, prompts are read from standard input,
    one a line."""
    forced: str = ""
    """Words put into the model's mouth before it goes on (prefilling); it may take them back."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Draw from the k most likely ids only; 0: from all."""
    top_p: float = 1.0
    """Draw from the smallest set of ids with this much probability."""
    max_tokens: int = 64
    """Most ids emitted, forced words and directives included."""
    n: int = 1
    """Answers to each prompt."""
    seed: int = 0
    """Same seed, same answers."""
    forbid_directives: Flag = False
    """The model may not take anything back."""
    json: Flag = False
    """One JSON object a line: prompt, visible text, trace, edits."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a stage of a run again and rebuild the report."""

    workdir: Workdir
    """Folder of a run."""
    stage: str = "rlbf"
    """base, sft, rlbf or another stage of the run."""
    data: Literal["development", "test"] = "development"
    """Tune on development only."""
    n_prompts: int | None = None
    """Prompts for each attack and split; default: as the run's configuration says."""
    tradeoff: Flag = False
    """Instead measure asr and false backtracks along a bias on the categories, into
    evaluation/tradeoff_STAGE.json."""
    benchmark: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=PATH: instead ask what a public benchmark asks, from its published file; may be given
    several times."""
    leave_out: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """With --benchmark: rows with this tag or category, as copyright of harmbench; may be given
    several times."""
    judge: Literal["refusal", "run"] = "refusal"
    """With --benchmark: whatever is no refusal is a violation, or the run's own judge."""
    prefill: int | None = None
    """With --benchmark: most ids of the target that prefilling forces; default: all of it."""
    max_tokens: int | None = None
    """With --benchmark: most ids of an answer; default: as the run's configuration says."""
    temperature: float | None = None
    """With --benchmark; default: as the run's configuration says."""


@dataclasses.dataclass(frozen=True)
class MakeReport:
    """Rebuild report.md, report.html and plots/ from what a run has written, or compare several
    runs."""

    workdirs: tyro.conf.Positional[
        Annotated[tuple[pathlib.Path, ...], tyro.conf.arg(metavar="WORKDIR [WORKDIR ...]")]
    ]
    """Folder of a run; of several, which then stand side by side in a report of their own."""
    out: pathlib.Path | None = None
    """Folder of the comparison; default: comparison, or the next free comparison_2, ..., beside the
    first run."""


def _parse(args: Any, command: str, rest: Sequence[str], description: str | None = None) -> Any:
    return arguments.parse(args, f"rlbf {command}", rest, description)


# rlbf run -----------------------------------------------------------------------------------------


_RUN_USAGE = """usage: rlbf run FILE [--workdir DIR] [--dotted.override value ...]

Run an experiment: its stages in order, then the report. Finished stages are skipped, a broken one is resumed.
FILE is a Python file with get_config(), as experiments/quickstart.py; `rlbf run FILE --help` lists what it can change.
"""


def load_experiment(file: pathlib.Path) -> tuple[Any, str]:
    """The configuration that an experiment's `get_config()` returns, and the experiment's
    docstring.

    Raises:
        UserError: no such file, a syntax error in it, or no `get_config()` that returns a
          dataclass.
    """
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; expected a Python file with get_config(), as "
            "experiments/quickstart.py"
        )
    spec = importlib.util.spec_from_file_location("rlbf_experiment", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(
        0, str(file.resolve().parent)
    )  # as `python FILE` does: an experiment may import its neighbors
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(
                f"{file}: defines no get_config(); it must return the experiment's configuration"
            )
        config = module.get_config()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(file)
        ]
        where = f"{file}, line {lines[-1]}" if lines else str(file)
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise UserError(
            f"{file}: get_config() returned a {type(config).__name__}, expected a dataclass "
            "instance"
        )
    return config, module.__doc__ or ""


def parse_run(file: pathlib.Path, rest: Sequence[str]) -> tuple[Any, pathlib.Path]:
    """(configuration with `--dotted.override value` applied, workdir) of `rlbf run FILE ...`."""
    config, description = load_experiment(file)
    if any(field.name == "workdir" for field in dataclasses.fields(config)):
        raise UserError(
            f"{file}: the configuration has a field workdir, which --workdir stands for; rename it"
        )
    folder = Annotated[
        pathlib.Path,
        tyro.conf.arg(help="Folder for everything the run writes; an old one is resumed."),
    ]
    # An empty name puts the configuration's fields beside --workdir, not below a prefix.
    nested: Any = Annotated[type(config), tyro.conf.arg(name="")]
    fields: list[Any] = [
        ("workdir", folder, dataclasses.field(default=pathlib.Path("runs") / file.stem)),
        ("config", nested, dataclasses.field(default_factory=lambda: config)),
    ]
    args = _parse(
        dataclasses.make_dataclass("Run", fields, frozen=True), f"run {file}", rest, description
    )
    return args.config, args.workdir


def run(argv: Sequence[str]) -> None:
    if not argv or argv[0].startswith("-"):
        print(_RUN_USAGE, end="")
        if argv and argv[0] in ("-h", "--help"):
            return
        raise UserError("run needs a FILE first" + (f", found {argv[0]}" if argv else ""))
    try:
        config, workdir = parse_run(pathlib.Path(argv[0]), argv[1:])
    except ValueError as error:  # a configuration that checks its own values
        raise UserError(f"{argv[0]}: {error}") from error
    from rlbf_jax.runs import execute as runner

    runner.run(config, workdir)
    print(f"report: {workdir / 'report.html'}")


# rlbf generate ------------------------------------------------------------------------------------


def generate(argv: Sequence[str]) -> None:
    args = _parse(Generate, "generate", argv)
    prompts = list(args.prompt)
    if not prompts and not sys.stdin.isatty():
        prompts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise UserError(
            "there is no prompt: give --prompt TEXT, or prompts on standard input, one a line"
        )
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("--prompt is empty, expected some text")
    if args.n < 1 or args.max_tokens < 1:
        raise UserError(
            f"--n is {args.n} and --max_tokens {args.max_tokens}, both expected to be at least 1"
        )
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed is {args.seed}, expected 0..{2**63 - 1}")
    from rlbf_jax.report import traces as report_traces
    from rlbf_jax.runs import execute as runner
    from rlbf_jax.sampling.request import Knobs, Request

    loaded = runner.load(args.workdir, args.stage)
    knobs = Knobs(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, max_tokens=args.max_tokens
    )
    knobs = knobs.without_directives() if args.forbid_directives else knobs
    forced = tuple(loaded.tokenizer.encode(args.forced))
    requests = [Request(prompt, forced, knobs) for prompt in prompts for _ in range(args.n)]
    generations = loaded.sample(requests, args.seed)
    if args.json:
        for generation in generations:
            print(
                json.dumps(report_traces.row_of(generation, loaded.tokenizer), ensure_ascii=False)
            )
    elif sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False)
        for generation in generations:
            row = report_traces.row_of(generation, loaded.tokenizer)
            console.print(
                f"> {report_traces.printable(generation.request.prompt)}", style="dim", markup=False
            )
            console.print(report_traces.render_trace_terminal(row), "", sep="\n")
    else:
        for generation in generations:
            print(generation.text)


# rlbf evaluate, report ----------------------------------------------------------------------------


def evaluate(argv: Sequence[str]) -> None:
    args = _parse(Evaluate, "evaluate", argv)
    if args.n_prompts is not None and args.n_prompts < 1:
        raise UserError(f"--n_prompts is {args.n_prompts}, expected at least 1")
    _check_evaluate(args)
    from rlbf_jax.runs import execute as runner

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
        evaluate_benchmarks(args.workdir, args.stage, args.benchmark, options)
        print(f"report: {args.workdir / 'report.html'}")
        return
    if args.tradeoff:
        print(
            "curve: "
            f"{runner.tradeoff_stage(args.workdir, args.stage, data=args.data, n_prompts=args.n_prompts)}"
        )
        return
    runner.evaluate_stage(args.workdir, args.stage, data=args.data, n_prompts=args.n_prompts)
    print(f"report: {args.workdir / 'report.html'}")


def _check_evaluate(args: Evaluate) -> None:
    """Raises UserError for an option that the rest of the command would ignore."""
    default = Evaluate(args.workdir)
    of_benchmarks = ("leave_out", "judge", "prefill", "max_tokens", "temperature")
    given = [name for name in of_benchmarks if getattr(args, name) != getattr(default, name)]
    if given and not args.benchmark:
        raise UserError(f"--{given[0]} is for --benchmark NAME=PATH")
    if args.tradeoff and args.benchmark:
        raise UserError("--tradeoff and --benchmark are two commands; give one of them")


def report(argv: Sequence[str]) -> None:
    args = _parse(MakeReport, "report", argv)
    from rlbf_jax.evaluation.results import read_results
    from rlbf_jax.report.document import write_report
    from rlbf_jax.report.files import check_is_run

    if not args.workdirs:
        raise UserError("rlbf report needs WORKDIR, the folder of a run; several are compared")
    for workdir in args.workdirs:
        check_is_run(workdir)
        read_results(workdir / "results.json")
    if len(args.workdirs) > 1:
        from rlbf_jax.report.compare import write_comparison

        print(f"comparison: {write_comparison(args.workdirs, args.out) / 'comparison.html'}")
        return
    if args.out is not None:
        raise UserError(
            f"--out is for comparing several runs; the report of one goes into {args.workdirs[0]}"
        )
    write_report(args.workdirs[0])
    print(f"report: {args.workdirs[0] / 'report.html'}")


# rlbf critic, audit -------------------------------------------------------------------------------


def critic(argv: Sequence[str]) -> None:
    from rlbf_jax.cli import audit as cli_audit

    cli_audit.train_critic(argv)


def audit(argv: Sequence[str]) -> None:
    from rlbf_jax.cli import audit as cli_audit

    cli_audit.audit_critic(argv)


# rlbf data ----------------------------------------------------------------------------------------


def data(argv: Sequence[str]) -> None:
    from rlbf_jax.cli import data as cli_data

    _dispatch(
        {"tokenizer": cli_data.train_tokenizer, "build": cli_data.build_data},
        "rlbf data",
        cli_data.USAGE,
        argv,
    )


# Dispatch -----------------------------------------------------------------------------------------

Command = Callable[[Sequence[str]], None]

USAGE = """usage: rlbf COMMAND ...

Language models that take back what they should not have said.

  run        run an experiment: its stages in order, then the report; resumes where it stopped
  generate   sample from a stage of a run and show what was taken back
  evaluate   evaluate a stage of a run again
  attack     attack a stage of a run with more than its evaluation did
  report     rebuild report.md, report.html and plots/ of a run, or put several runs side by side
  critic     train a classifier as a critic on labelled texts
  audit      measure a critic on labelled texts
  data       train a tokenizer, build BSAFE+ from your own file
  import     read a Hugging Face checkpoint into a model folder
  export     write a model folder, or a stage of a run, as a Hugging Face checkpoint

`rlbf COMMAND --help` lists a command's options; `rlbf run FILE --help` lists every value of an experiment.
"""


def _dispatch(commands: dict[str, Command], prefix: str, usage: str, argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage, end="")
        if not argv:
            raise UserError(f"{prefix} needs a command: {', '.join(commands)}")
        return
    if argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(commands)}"
        raise UserError(f"{prefix} has no command {argv[0]!r}; {hint}")
    commands[argv[0]](argv[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `rlbf`. Returns the exit code: 0, 2 for what the user can mend, 130 when
    interrupted."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's chatter would tear progress bars
    keep_compiled_programs()
    commands: dict[str, Command] = {
        "run": run,
        "generate": generate,
        "evaluate": evaluate,
        "attack": cli_attack.attack,
        "report": report,
        "critic": critic,
        "audit": audit,
        "data": data,
        "import": cli_models.import_model,
        "export": cli_models.export_model,
    }
    argv = sys.argv[1:] if argv is None else list(argv)
    again = f"go on with: {shlex.join(['rlbf', *argv])}"
    return exit_code(lambda: _dispatch(commands, "rlbf", USAGE, argv), again)


def exit_code(command: Callable[[], None], again: str) -> int:
    """Runs a command and says on one line what stopped it.

    Args:
      again: how to go on after an interruption.

    Returns 0, 2 for what the user can mend, 130 when interrupted; all other errors are raised.
    """
    try:
        with interruptible(f"stopped at once; {again}"):
            command()
    except (Preempted, KeyboardInterrupt) as stop:
        print(f"{str(stop) or 'interrupted'}; {again}", file=sys.stderr)
        return EXIT_CODE
    except BrokenPipeError:  # `rlbf generate ... | head`: nobody reads on, which is no mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else machine_error(error)
        if not message:
            raise
        print("error: " + " ".join(message.split()), file=sys.stderr)
        return 2
    return 0


def keep_compiled_programs() -> None:
    """Compiled programs outlive the process (JAX's persistent cache), so that a second command
    starts in seconds."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(home, "rlbf_jax", "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


if __name__ == "__main__":
    sys.exit(main())
