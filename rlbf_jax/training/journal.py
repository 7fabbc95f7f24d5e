"""Append-only JSON lines that a checkpoint can take back: metrics, rollouts, verdicts.

A checkpoint stores each journal's byte offset. After a crash the journal is cut to it, so a
restarted run writes the same bytes as an undisturbed one. Wall-clock figures live in another file
(`timing.jsonl`), for they never repeat.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlbf_jax.errors import InputError
from rlbf_jax.parallel import hosts
from rlbf_jax.storage import sync_folder


class Journal:
    """One JSON lines file, opened for appending."""

    def __init__(self, path: Path, offset: int = 0):
        """Cuts the file to `offset` bytes and goes on from there. Of several processes the first
        one writes; the others' journals are empty devices."""
        if not hosts.is_first():
            self.path, self._file = path, open(os.devnull, "ab")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = open(path, "ab")
        sync_folder(path.parent)  # a checkpoint will rely on this name
        size = self._file.tell()
        if size < offset:
            self._file.close()
            raise InputError(
                f"{path} has {size} bytes, its checkpoint says {offset}: something cut it; "
                f"put it back, or delete {path.parent} to start the stage again"
            )
        self._file.truncate(offset)
        self._file.seek(offset)

    def write(self, row: Mapping[str, Any]) -> None:
        self.write_all([row])

    def write_all(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows at once, for whoever is watching the file;
        on disk for certain only after `sync`."""
        with self._told():
            self._file.write(
                b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
            )
            self._file.flush()

    def sync(self) -> int:
        """Puts everything on disk and returns the offset that a checkpoint stores."""
        with self._told():
            self._file.flush()
            if hosts.is_first():
                os.fsync(self._file.fileno())
            return self._file.tell()

    def close(self) -> None:
        with self._told():
            self._file.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """A full disk becomes a UserError that names the file."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); make room and start the same "
                "command again: "
                "it goes on from the last checkpoint"
            ) from error


def read_journal(path: Path) -> list[dict]:
    """All rows of a journal; empty where there is no file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
