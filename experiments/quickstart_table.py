"""docs/results.md: quickstart_hold.py over several seeds, PPO and GRPO,
KEEP and REWIND, and the ablations.

Paper: arXiv 2602.08377, sections 4 and 5, at toy scale.
Command: python experiments/quickstart_table.py
    --list shows what is run; --only NAME (may be repeated) runs that piece and what it builds on.
    Killed anywhere, the same command goes on where it stopped, and finished pieces are not run
    again. The document is written from whatever is finished, and names what is not. Its rows are
    kept in WORKDIR/rows (--rows); --from_rows FOLDER makes the document from such a folder alone.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from rlbf_jax.cli.main import exit_code, keep_compiled_programs
from rlbf_jax.cli.run import load_experiment
from rlbf_jax.errors import UserError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workdir", type=Path, help="folder of all runs (default: runs/table, or runs/table_POOL)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds of the methods"
    )
    parser.add_argument(
        "--ablation_seeds", type=int, nargs="+", help="seeds of the ablations (default: the first)"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="run this piece only"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="the document")
    parser.add_argument(
        "--rows", type=Path, help="where rows and metrics are kept (default: WORKDIR/rows)"
    )
    parser.add_argument(
        "--from_rows", type=Path, metavar="FOLDER", help="run nothing: write from kept rows alone"
    )
    parser.add_argument(
        "--pool", choices=("development", "test"), default="test", help="tune on development only"
    )
    parser.add_argument("--list", action="store_true", help="show the pieces and run nothing")
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(__file__).parent / "quickstart_hold.py",
        help=argparse.SUPPRESS,
    )
    args = parser.parse_args(argv)
    args.ablation_seeds = args.ablation_seeds or args.seeds[:1]
    args.workdir = args.workdir or Path("runs") / (
        "table" if args.pool == "test" else f"table_{args.pool}"
    )
    args.rows = args.rows or args.workdir / "rows"
    return args


def command(args: argparse.Namespace) -> str:
    """What makes the whole document again, folders left out."""
    words = ["python", "experiments/quickstart_table.py"]
    words += ["--seeds", *map(str, args.seeds)] if args.seeds != [0, 1, 2] else []
    words += (
        ["--ablation_seeds", *map(str, args.ablation_seeds)]
        if args.ablation_seeds != args.seeds[:1]
        else []
    )
    words += ["--pool", args.pool] if args.pool != "test" else []
    return shlex.join(words)


def run(args: argparse.Namespace) -> None:
    import dataclasses

    from table import document, kept, pieces, running

    if args.from_rows:
        if args.only or args.list:
            raise UserError("--from_rows runs nothing and writes all; leave out --only and --list")
        document.write_document(kept.open_kept(args.from_rows), args.out)
        print(f"results: {args.out}")
        return
    config, _ = load_experiment(args.config)
    config = dataclasses.replace(
        config, evaluation=dataclasses.replace(config.evaluation, pool=args.pool)
    )
    try:
        everything = pieces.plan(config, args.seeds, args.ablation_seeds)
        chosen = pieces.chosen(everything, args.only)
    except ValueError as error:
        raise UserError(str(error)) from error
    if args.list:
        for piece in chosen:
            mark = "done" if running.finished(piece, args.workdir) else ""
            print(f"{piece.name:24} {mark:5} {piece.purpose}")
        return
    running.run_pieces(chosen, args.workdir)
    rows = kept.keep(everything, args.workdir, args.rows, args.ablation_seeds, command(args))
    document.write_document(rows, args.out)
    print(f"results: {args.out}")


def main(argv: list[str] | None = None) -> int:
    keep_compiled_programs()
    args = parse(argv)
    return exit_code(lambda: run(args), "the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main())
