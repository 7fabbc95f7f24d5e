"""The rows that docs/results.md is computed from, in a folder of their own.

    kept.json                                    what the pieces are, and the facts of the document
    PIECE/evaluation/STAGE.jsonl.gz              of each row: its attempt, prompt, slice and metrics
    PIECE/evaluation/clean_text/STAGE.jsonl.gz   as in the run

The document is made from this folder alone, so another method of intervals can be tried on it
without the runs.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlbf_jax.errors import UserError
from rlbf_jax.storage import write_whole

from .pieces import Piece, changed
from .running import commits, finished, seconds

FIELDS = (
    "request_id", "prompt_id", "attack", "split", "cell", "seed", "long_prefix", "metrics",
)  # fmt: skip
"""What is kept of a row: all that `evaluation.comparison` reads."""
_INDEX = "kept.json"


@dataclasses.dataclass(frozen=True)
class KeptPiece:
    """One piece: what it was, and, where it is finished, where and how long it ran."""

    group: str
    seed: int
    purpose: str
    settings: str
    """How its configuration differs from the quickstart's, in words."""
    finished: bool
    commit: str = ""
    seconds: float = 0.0
    """Wall clock of its stages."""

    @property
    def name(self) -> str:
        """Also its folder."""
        return f"{self.group}/seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Kept:
    """A folder of kept rows."""

    folder: Path
    command: str
    """What makes the rows again."""
    ablation_seeds: tuple[int, ...]
    suite: str
    """Which prompts, in words."""
    cores: int
    pieces: tuple[KeptPiece, ...]


def keep(
    pieces: Sequence[Piece],
    workdir: Path,
    folder: Path,
    ablation_seeds: Sequence[int],
    command: str,
) -> Kept:
    """Writes the rows of all finished pieces into `folder`; what it held of others goes.

    Raises UserError where `folder` holds something else.
    """
    index = folder / _INDEX
    if folder.exists() and any(folder.iterdir()) and not index.exists():
        raise UserError(
            f"--rows {folder} holds something else; expected a new folder, or kept rows"
        )
    main = next(piece for piece in pieces if piece.group == "main")
    kept = Kept(
        folder,
        command,
        tuple(ablation_seeds),
        _suite(main),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        tuple(_kept_piece(piece, main, workdir) for piece in pieces),
    )
    plain = {k: v for k, v in dataclasses.asdict(kept).items() if k != "folder"}
    write_whole(index, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    written = {
        path
        for piece in kept.pieces
        if piece.finished
        for path in _keep_rows(workdir / piece.name / "evaluation", folder / piece.name)
    }
    for path in sorted(folder.rglob("*.jsonl.gz")):
        if path not in written:
            path.unlink()
    return kept


def open_kept(folder: Path) -> Kept:
    """What `keep` has written. Raises UserError for another folder, or a damaged one."""
    index = folder / _INDEX
    if not index.exists():
        raise UserError(f"{index}: no such file; expected a folder that --rows has kept")
    try:
        plain = json.loads(index.read_text(encoding="utf-8"))
        pieces = tuple(KeptPiece(**piece) for piece in plain.pop("pieces"))
        ablation_seeds = tuple(plain.pop("ablation_seeds"))
        return Kept(folder=folder, ablation_seeds=ablation_seeds, pieces=pieces, **plain)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{index}: damaged ({error}); keep the rows again") from error


def _suite(main: Piece) -> str:
    suite = main.config.evaluation
    told = (
        f"{suite.pool}, {suite.n} prompts an attack and form split, "
        f"temperature {suite.knobs.temperature:g}"
    )
    if suite.calibrate is None:
        return told
    return (
        f"{told}; models with directives at the bias at which they take {suite.calibrate:.0%} of "
        "harmless answers back (development split)"
    )


def _kept_piece(piece: Piece, main: Piece, workdir: Path) -> KeptPiece:
    about = (piece.group, piece.seed, piece.purpose, changed(piece.config, main.config))
    if not finished(piece, workdir):
        return KeptPiece(*about, finished=False)
    (commit,) = commits([piece], workdir)
    return KeptPiece(*about, True, commit, seconds([piece], workdir))


def _keep_rows(evaluation: Path, target: Path) -> Iterator[Path]:
    """Writes the rows of a run's evaluations, and yields the paths."""
    for pattern, kept in (("*.jsonl", _row), ("clean_text/*.jsonl", dict)):
        for path in sorted(evaluation.glob(pattern)):
            place = target / "evaluation" / path.relative_to(evaluation)
            yield _pack(path, place.with_name(place.name + ".gz"), kept)


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in FIELDS}


def _pack(path: Path, target: Path, kept: Callable[[Mapping[str, Any]], dict]) -> Path:
    with open(path, encoding="utf-8") as file:
        lines = [json.dumps(kept(json.loads(line)), separators=(",", ":")) for line in file]
    packed = gzip.compress("".join(line + "\n" for line in lines).encode(), mtime=0)
    if not target.exists() or target.read_bytes() != packed:
        write_whole(target, packed)
    return target
