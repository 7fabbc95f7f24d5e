"""`rlbf attack`: a finished stage under attacks beside those of its evaluation."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from rlbf_jax.cli import arguments
from rlbf_jax.errors import UserError

if TYPE_CHECKING:
    from rlbf_jax.attacks.search.optimized import OptimizedConfig

SHOWN = (
    "target_loss",
    "emitted",
    "asr",
    "leak",
    "torn_seam",
    "backtrack_rate",
    "false_backtrack_rate",
)


@dataclasses.dataclass(frozen=True)
class Search:
    """How a suffix is searched."""

    steps: int = 250
    """Steps of GCG; random search gets as many candidates."""
    width: int = 512
    """Candidates a step."""
    topk: int = 256
    """Ids of most negative gradient that a position may take."""
    init: str = " x" * 20
    """What the suffix begins as; it keeps its number of ids."""
    placement: Literal["after", "before"] = "after"
    """Of the suffix, in the user's message."""
    separator: str = ""
    """Between the user's own words and the suffix."""
    kind: Literal["ce", "mellowmax"] = "ce"
    """Loss of the target."""
    alpha: float = 1.0
    """Of mellowmax."""
    positions: Literal["uniform", "stratified"] = "uniform"
    """Where candidates differ from the suffix."""
    n_replace: int = 1
    """Positions in which a candidate differs from the suffix."""
    buffer_size: int = 0
    """Best suffixes that are kept; 0: the newest, even if worse."""
    anneal: bool = False
    """Simulated annealing; not with a buffer."""
    early_stop: bool = False
    """Stop when some candidate makes the whole target the likeliest answer."""
    filter_ids: bool = True
    """Only suffixes that survive as text, with the whole conversation."""
    allow_non_ascii: bool = False
    batch_size: int | None = None
    """Candidates in memory at a time; default: 32 on CPU, else 64. Lower it for a large model."""
    neighbors: int = 8
    """Candidates a generation of random_search."""
    control_weight: float = 0.5
    """Of a directive's log-probability in adaptive_gcg and trigger."""
    control_floor: float | None = None
    """Of adaptive_gcg, in nats: a directive's log-probability below this counts as this;
    default: no floor."""
    window: int = 8
    """Ids over which that log-probability is averaged."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Attack:
    """Attack a finished stage of a run and add what is found to its results and report."""

    workdir: tyro.conf.Positional[Annotated[pathlib.Path, tyro.conf.arg(metavar="WORKDIR")]]
    """Folder of a run."""
    attack: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Name of an attack, at least one; may be given several times. An unknown name lists them all.
    """
    stage: str = ""
    """base, sft, rlbf or another stage of the run."""
    data: Literal["development", "test"] | None = None
    """Tune on development only; default: what the run's evaluation asked."""
    n_prompts: int | None = None
    """Prompts for each attack, split and cell; default: as the run's configuration says, and 8
    where a suffix is searched."""
    max_tokens: int | None = None
    """Most ids of an answer, forced ones included; default: as the run's configuration says."""
    grid: Literal["run", "paper"] = "run"
    """Settings of the attack `decoding`: the run's, or the 49 of the reference implementation."""
    geometry: Literal["run", "wide"] = "run"
    """Lengths of middle_grid, benign_grid and prefilling_depth: the run's, or up to 256 benign ids.
    """
    search: Search = Search()
    """Of the attacks that search a suffix: gcg, adaptive_gcg, trigger, random_search."""


def attack(argv: Sequence[str]) -> None:
    """`rlbf attack RUN --attack NAME`."""
    args: Attack = arguments.parse(Attack, "rlbf attack", argv)
    for name in ("n_prompts", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}, expected at least 1")
    from rlbf_jax.attacks import ATTACKS
    from rlbf_jax.report.document import write_report
    from rlbf_jax.runs import load
    from rlbf_jax.runs.attack import AttackOptions, attack_stage

    if not args.attack:
        raise UserError(f"--attack NAME is missing: there are {', '.join(ATTACKS)}")
    if unknown := [name for name in args.attack if name not in ATTACKS]:
        raise UserError(f"attack {unknown[0]!r}: there are {', '.join(ATTACKS)}")
    if args.grid != "run" and "decoding" not in args.attack:
        raise UserError("--grid is for --attack decoding")
    if args.geometry != "run" and not {"middle_grid", "benign_grid", "prefilling_depth"} & set(
        args.attack
    ):
        raise UserError("--geometry is for --attack middle_grid, benign_grid and prefilling_depth")
    options = AttackOptions(
        tuple(dict.fromkeys(args.attack)), args.data, args.n_prompts, args.max_tokens, args.grid,
        args.geometry, optimized(args.search),
    )  # fmt: skip
    opened = load.open_run(args.workdir)
    records = attack_stage(opened, args.stage or opened.last_stage, options)
    write_report(args.workdir)
    show(records)
    print(f"report: {args.workdir / 'report.html'}")


def optimized(args: Search) -> OptimizedConfig:
    """The search that the options describe. Raises UserError for one that is out of range."""
    from rlbf_jax.attacks.search.gcg import GcgConfig
    from rlbf_jax.attacks.search.optimized import OptimizedConfig

    try:
        told = dataclasses.asdict(args)
        of_all = {name: told.pop(name) for name in ("control_weight", "window", "neighbors")}
        return OptimizedConfig(GcgConfig(search_width=told.pop("width"), **told), **of_all)
    except ValueError as error:
        raise UserError(f"--search: {error}") from error


def show(records: Sequence) -> None:
    """A line an attack, split and cell: the main rates with their intervals."""
    from rich.console import Console
    from rich.table import Table

    from rlbf_jax.evaluation.intervals import METHODS

    methods = {record.ci_method for record in records if record.metric in SHOWN}
    named = [f"{name} ({words})" for name, words in METHODS.items() if name in methods]
    table = Table(caption=f"95 % intervals: {'; '.join(named)}" if named else None)
    for name in ("attack", "split", "cell"):
        table.add_column(name, no_wrap=True)
    for name in SHOWN:
        table.add_column(name.replace("_", " "))
    rows: dict[tuple, dict] = {}
    for record in records:
        if record.benchmark.endswith("long_prefix"):
            continue
        cell = " ".join(
            f"{k} {v}" for k, v in record.knobs.items() if k in ("p", "v", "b", "k", "violations")
        )
        rows.setdefault((record.attack, record.split, cell), {}).setdefault(record.metric, record)
    for head, found in rows.items():
        shown = [found.get(name) for name in SHOWN]
        table.add_row(
            *head, *(f"{r.value:.2f} [{r.ci_low:.2f}, {r.ci_high:.2f}]" if r else "" for r in shown)
        )
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)
