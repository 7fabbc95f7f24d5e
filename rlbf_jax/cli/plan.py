"""`rlbf plan FILE`: what an experiment will take, before it runs and without its devices."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rlbf_jax.cli import arguments
from rlbf_jax.cli.run import parse_experiment
from rlbf_jax.errors import UserError

if TYPE_CHECKING:
    from rlbf_jax.planning.forecast import Forecast
    from rlbf_jax.planning.table import Row

USAGE = """usage: rlbf plan FILE [--topology NAME] [--mesh data=1,fsdp=64,tensor=4] [--table] \
[--json] [--dotted.override value ...]

What the programs of an experiment will take on each chip: bytes by kind, operations, exchanges, and
seconds by a roofline. They are compiled from shapes; no parameters, data, checkpoint or accelerator
is needed. For a TPU slice (v5e:16x16, v5p:2x2x4, ...): pip install 'jax[tpu]'. h100:8 is
planned by formula and the CPU's compiler. Without --topology: the devices at hand.
`rlbf plan FILE --help` lists every option.
"""
_AXIS = re.compile(r"(slice|data|fsdp|tensor)=(-?\d+)")
Flag = tyro.conf.FlagCreatePairsOff[bool]


def _option(kind: Any, default: Any, text: str) -> tuple[Any, Any]:
    return Annotated[kind, tyro.conf.arg(help=text)], dataclasses.field(default=default)


OPTIONS = [
    (name, *_option(*said))
    for name, said in {
        "topology": (str, "", "Devices to compile for, as v5e:16x16 or h100:8; empty: at hand."),
        "phases": (str, "", "Programs to plan, as update,decode; empty: all."),
        "table": (Flag, False, "Several meshes, and batch sizes of --scales."),
        "scales": (str, "1", "With --table: rows as multiples of the experiment's, as 0.5,1,2."),
        "minutes": (float, 15.0, "With --table: after so long no further mesh is begun."),
        "json": (Flag, False, "One JSON object a line."),
    }.items()
]


def plan(argv: Sequence[str]) -> None:
    """`rlbf plan FILE`."""
    if not argv or argv[0].startswith("-"):
        print(USAGE, end="")
        if argv and argv[0] in ("-h", "--help"):
            return
        raise UserError("plan needs a FILE first" + (f", found {argv[0]}" if argv else ""))
    try:
        args = parse_experiment("plan", pathlib.Path(argv[0]), with_axes(argv[1:]), OPTIONS)
    except ValueError as error:  # a configuration that checks its own values
        raise UserError(f"{argv[0]}: {error}") from error
    from rlbf_jax.planning.topology import topology

    where = topology(args.topology)
    with where.chosen():
        if args.table:
            _table(args, where)
        else:
            _one(args, where)


def with_axes(rest: Sequence[str]) -> list[str]:
    """`--mesh data=1,fsdp=64` as `--mesh.data 1 --mesh.fsdp 64`. Raises UserError for what is no
    axis."""
    written: list[str] = []
    waiting = iter(rest)
    for word in waiting:
        name, _, value = word.partition("=")
        if name != "--mesh":
            written.append(word)
            continue
        value = value or next(waiting, "")
        for part in value.split(","):
            axis = _AXIS.fullmatch(part.strip())
            if axis is None:
                raise UserError(
                    f"--mesh {value}: expected axes and sizes, as data=1,fsdp=64,tensor=4"
                )
            written += [f"--mesh.{axis.group(1)}", axis.group(2)]
    return written


def _wanted(text: str, there: Sequence[str]) -> list[str]:
    wanted = arguments.names(text)
    if unknown := [name for name in wanted if name not in there]:
        known = ", ".join(dict.fromkeys(there))
        raise UserError(f"--phases: no program {unknown[0]!r} in this experiment; it has {known}")
    return wanted


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# One mesh -----------------------------------------------------------------------------------------


def _one(args: Any, where: Any) -> None:
    from rlbf_jax.planning.forecast import forecast
    from rlbf_jax.planning.phases import phases, unplanned

    mesh = where.mesh(args.config.mesh)
    every = phases(args.config, mesh)
    wanted = _wanted(args.phases, [phase.name for phase in every])
    chosen = [phase for phase in every if not wanted or phase.name in wanted]
    found = []
    for number, phase in enumerate(chosen, 1):
        _say(f"[{number}/{len(chosen)}] {phase.title}: {phase.about}")
        found.append(forecast(phase, where.chip))
        if args.json:
            sizes = {axis: int(size) for axis, size in mesh.shape.items()}
            print(json.dumps({"topology": where.name, "mesh": sizes, **found[-1].plain()}))
    if left := unplanned(args.config):
        _say(f"not planned, because their programs are not known here: {', '.join(left)}")
    if not args.json:
        axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        print(f"{where.name}, mesh {axes}\n")
        print("\n".join([*memory_lines(found), "", *work_lines(found), "", *ending(found, where)]))


def memory_lines(found: Sequence[Forecast]) -> list[str]:
    """Bytes on one chip as a Markdown table, in GB of 10^9 bytes."""
    head = "GB a chip|arguments|temporaries|outputs|reused|program|beside|total|fits"
    lines = _begun(head.split("|"))
    for f in found:
        m, cells = f.memory, ["more than there is"] * 6
        if m is not None:
            sizes = m.arguments, m.temporaries, m.outputs, m.reused, m.code, m.beside
            cells = [_gb(size) for size in sizes]
        cells += ["-" if f.needed is None else _gb(f.needed), _verdict(f.fits)]
        lines.append(_line([f.name, *cells]))
    return lines


def work_lines(found: Sequence[Forecast]) -> list[str]:
    """Operations, traffic, exchanges and seconds of one run of each program, on one chip."""
    head = (
        "one run, one chip|what|Tflop|GB moved|GB sent|by kind|runs a step|seconds at least|binds"
    )
    lines = _begun(head.split("|"))
    for f in found:
        sent = sum(x.sent for x in f.exchanged.values())
        kinds = ", ".join(f"{k} {_gb(x.sent)}" for k, x in f.exchanged.items() if x.sent > 5e4)
        bound = "-" if f.bound is None else f"{f.bound:.3g}"
        work = [f"{f.flops / 1e12:.3g}", _gb(f.traffic), _gb(sent), kinds or "-"]
        lines.append(_line([f.name, f.about, *work, f"{f.runs:g}", bound, f.binds or "-"]))
    return lines


def ending(found: Sequence[Forecast], where: Any) -> list[str]:
    """What fits, what binds, and what the figures rest on."""
    lines = []
    if where.chip is None:
        lines.append(
            "No figures of this device are known: no seconds, and nothing said of fitting."
        )
    elif found:
        most = max(found, key=lambda f: f.needed or 0)
        verdict = "fits" if all(f.fits for f in found) else "does not fit"
        share = (most.needed or 0) / where.chip.memory
        lines.append(
            f"{verdict}: {most.name} takes most, {_gb(most.needed or 0)} of "
            f"{_gb(where.chip.memory)} GB a chip ({share:.0%})"
        )
        for stage in dict.fromkeys(stage for f in found for stage in f.stages):
            lines.append(_step(stage, [f for f in found if stage in f.stages]))
        if where.chip.remark:
            lines.append(f"{where.chip.name}: {where.chip.remark}")
    if turns := {f.assumed_turns for f in found if f.assumed_turns}:
        lines.append(f"decoding is taken as {max(turns)} turns, the most ids a row draws itself")
    return [line for line in lines if line]


def _step(stage: str, found: Sequence[Forecast]) -> str:
    known = [f for f in found if f.step_seconds is not None]
    if not known:
        return ""
    seconds = sum(f.step_seconds or 0 for f in known)
    most = max(known, key=lambda f: f.step_seconds or 0)
    return (
        f"{stage}: a step takes {seconds:.3g} s at least, {known[0].steps} steps "
        f"{seconds * known[0].steps / 3600:.3g} h; most of it {most.phase} ({most.binds})"
    )


# Several ------------------------------------------------------------------------------------------


def _table(args: Any, where: Any) -> None:
    from rlbf_jax.planning import table
    from rlbf_jax.planning.phases import phases
    from rlbf_jax.planning.shapes import vocabulary

    try:
        scales = [float(text) for text in arguments.names(args.scales)]
    except ValueError:
        scales = []
    if not scales or min(scales) <= 0:
        raise UserError(f"--scales {args.scales}: expected numbers above 0, as 0.5,1,2")
    model = vocabulary(args.config).model
    laid_out = table.meshes(len(where.devices), model)
    wanted = arguments.names(args.phases)
    if wanted:
        _wanted(
            args.phases, [phase.name for phase in phases(args.config, where.mesh(args.config.mesh))]
        )
    choice = table.Choice(laid_out, scales, wanted, args.minutes * 60)
    found = []
    for row in table.rows(args.config, where, choice, _say):
        found.append(row)
        if args.json:
            print(json.dumps({"topology": where.name, **row.plain()}), flush=True)
    if not args.json:
        print(f"{where.name}\n")
        print("\n".join(table_lines(found)))


def table_lines(found: Sequence[Row]) -> list[str]:
    """A row a mesh and batch size as a Markdown table."""
    from rlbf_jax.planning.table import mesh_name

    head = "mesh|rows x|GB a chip|by|fits|a step takes at least|most of it"
    lines = _begun(head.split("|"))
    for row in found:
        cells = [mesh_name(row.mesh), f"{row.scale:g}"]
        worst, slowest = row.worst, row.slowest
        if row.refused or worst is None:
            verdict = _verdict(row.fits)
            lines.append(_line([*cells, "-", "-", verdict, "-", row.refused or "no program"]))
            continue
        step, most = "-", "-"
        if slowest is not None and row.fits:
            stage = [f for f in row.forecasts if slowest.stages == f.stages]
            step = f"{slowest.stages[-1]} {sum(f.step_seconds or 0 for f in stage):.3g} s"
            most = f"{slowest.phase} ({slowest.binds})"
        lines.append(_line([*cells, _gb(row.needed), worst.name, _verdict(row.fits), step, most]))
    return lines


def _begun(head: Sequence[str]) -> list[str]:
    return [_line(head), _line(["---"] * len(head))]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _gb(size: float) -> str:
    if size >= 1e11:
        return f"{size / 1e9:,.0f}"
    return f"{size / 1e9:,.2f}" if size >= 1e8 or not size else f"{size / 1e9:.2g}"


def _verdict(fits: bool | None) -> str:
    return {True: "yes", False: "no", None: "-"}[fits]
