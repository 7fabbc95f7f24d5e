"""`rlbf report`: the report of a run made anew, or several runs side by side."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro

from rlbf_jax.cli import arguments
from rlbf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class MakeReport:
    """Rebuild report.md, report.html and plots/ from what a run has written,
    or compare several runs."""

    workdirs: tyro.conf.Positional[
        Annotated[tuple[pathlib.Path, ...], tyro.conf.arg(metavar="WORKDIR [WORKDIR ...]")]
    ]
    """Folder of a run; of several, which then stand side by side in a report of their own."""
    out: pathlib.Path | None = None
    """Folder of the comparison; default: comparison, or the next free comparison_2,
    ..., beside the first run."""


def report(argv: Sequence[str]) -> None:
    """`rlbf report WORKDIR [WORKDIR ...]`."""
    args: MakeReport = arguments.parse(MakeReport, "rlbf report", argv)
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
