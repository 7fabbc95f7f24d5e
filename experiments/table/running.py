"""Runs the pieces that are not finished. Killed anywhere, it goes on there when called again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from rlbf_jax.errors import UserError
from rlbf_jax.progress import say
from rlbf_jax.runs import execute
from rlbf_jax.runs.adopt import adopt
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.runs.manifest import open_workdir

from .pieces import Piece

RunStages = Callable[[Experiment, Path, "Collection[str] | None"], None]
"""(configuration, folder, stages or None for all), as `execute.run`."""


def run_pieces(pieces: Sequence[Piece], workdir: Path, run: RunStages = execute.run) -> None:
    """Runs unfinished pieces in order.

    Raises UserError where a folder was made with other settings: nothing is overwritten.
    """
    began = time.perf_counter()
    for number, piece in enumerate(pieces, 1):
        if finished(piece, workdir):
            continue
        minutes = (time.perf_counter() - began) / 60
        say(f"{number}/{len(pieces)} {piece.name}: {piece.purpose} ({minutes:.0f} min so far)")
        run_piece(piece, workdir, run)


def run_piece(piece: Piece, workdir: Path, run: RunStages) -> None:
    folder = workdir / piece.name
    if not piece.stages:
        run(piece.config, folder, None)
        return
    adopt(workdir / piece.source, piece.config, folder, piece.adopted)
    run(piece.config, folder, piece.stages)


def finished(piece: Piece, workdir: Path) -> bool:
    """All stages done, under this very configuration.
    Raises UserError if the folder has another one."""
    folder = workdir / piece.name
    if not (folder / "manifest.json").exists():
        return False
    open_workdir(piece.config, execute.recipe(piece.config), folder)
    return all((folder / "done" / stage).exists() for stage in stages_of(piece))


def stages_of(piece: Piece) -> tuple[str, ...]:
    """The stages that the piece runs, of those that its recipe has."""
    recipe = [stage.name for stage in execute.recipe(piece.config)]
    return tuple(name for name in recipe if not piece.stages or name in piece.stages)


def seconds(pieces: Sequence[Piece], workdir: Path) -> float:
    """Wall-clock seconds of all finished stages, those that were adopted not counted twice."""
    return sum(
        json.loads(path.read_text(encoding="utf-8")).get("seconds", 0.0)
        for piece in pieces
        for path in sorted((workdir / piece.name / "done").glob("*"))
    )


def commits(pieces: Sequence[Piece], workdir: Path) -> list[str]:
    """Commits that the pieces were run at, in order of appearance."""
    found = []
    for piece in pieces:
        path = workdir / piece.name / "manifest.json"
        if not path.exists():
            raise UserError(f"{path}: missing; run the table again")
        found.append(str(json.loads(path.read_text(encoding="utf-8")).get("commit") or "unknown"))
    return list(dict.fromkeys(found))
