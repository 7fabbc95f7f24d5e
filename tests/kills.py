"""Runs that are struck down at chosen or random moments, and a fingerprint of what must be the same
afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rlbf_jax.runs.load import open_run

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXPERIMENT = str(ROOT / "tests" / "training" / "tiny_experiment.py")
DEADLINE = 400
"""Seconds that a child may take on a crowded machine."""


@dataclasses.dataclass(frozen=True)
class Strike:
    """When a run is struck, and by what."""

    stage: str
    touch: int = 0
    """At this touch of a file in the stage (or at the stage's end, if there are fewer); 0: at its
    beginning."""
    match: str = ""
    """Only touches of paths with this in them count."""
    delay: float = 0.0
    """Seconds later."""
    signal: int = signal.SIGKILL


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int
    """Exit code; minus the signal that killed it."""
    struck_in: str
    log: str
    """What it wrote to stdout and stderr."""


class Nursery:
    """A process that forks children which run `rlbf`; forking saves each of them the imports."""

    def __init__(self, process: subprocess.Popen):
        self.process = process
        self._buffer = b""

    def run(
        self,
        folder: pathlib.Path,
        argv: Sequence[str],
        strike: Strike | None = None,
        only: Sequence[str] = (),
        touches: pathlib.Path | None = None,
    ) -> Ended:
        """`rlbf ARGV`, whose files are in `folder`, until it ends; `only`: the stages of a run to
        go through."""
        log = folder.with_suffix(".log")
        before = log.stat().st_size if log.exists() else 0
        order: dict[str, Any] = {
            "folder": str(folder),
            "argv": list(argv),
            "log": str(log),
            "only": list(only),
        }
        order["plan"] = dataclasses.asdict(strike) if strike else None
        order["touches"] = str(touches) if touches else None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        pid = self._hear("began", before, log)["pid"]
        struck_in = ""
        while True:
            event = self._hear("", before, log)
            if event["event"] == "ended":
                return Ended(event["code"], struck_in, log.read_bytes()[before:].decode())
            struck_in = event["stage"]
            if strike and strike.delay:
                time.sleep(strike.delay)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, strike.signal)

    def _hear(self, wanted: str, before: int, log: pathlib.Path) -> dict:
        """The next event."""
        assert self.process.stdout is not None
        end = time.monotonic() + DEADLINE
        while b"\n" not in self._buffer:
            ready, _, _ = select.select(
                [self.process.stdout], [], [], max(0.0, end - time.monotonic())
            )
            chunk = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            assert chunk, (
                "no word from the "
                f"child\n{log.read_bytes()[before:].decode()[-3000:] if log.exists() else ''}"
            )
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        event = json.loads(line)
        assert not wanted or event["event"] == wanted, event
        return event


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    """A nursery; it and all of its children are gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "kills_child.py")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    made = Nursery(process)
    try:
        made._hear("ready", 0, pathlib.Path(os.devnull))
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def fingerprint(workdir: pathlib.Path) -> dict[str, str]:
    """SHA-256 of everything in a finished run that must repeat to the bit: files, and parameters by
    value.

    Left out is what holds clock times (timing.jsonl, starts.jsonl, done/, tensorboard/) and how
    Orbax spreads values over files.
    """
    skipped = ("done", "stages")
    files = [p for p in sorted(workdir.rglob("*")) if p.is_file()]
    found: dict[str, str] = {}
    for path in files:
        name = path.relative_to(workdir)
        if name.parts[0] not in skipped or (
            path.suffix == ".jsonl" and path.name not in ("timing.jsonl", "starts.jsonl")
        ):
            found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    opened = open_run(workdir)
    for folder in sorted(workdir.glob("stages/*/model")):
        digest = hashlib.sha256()
        for place, leaf in jax.tree_util.tree_leaves_with_path(
            opened.policy(folder.parent.name).params
        ):
            digest.update(jax.tree_util.keystr(place).encode() + np.asarray(leaf).tobytes())
        found[f"{folder.parent.name} (parameters)"] = digest.hexdigest()
    return found


def leftovers(workdir: pathlib.Path) -> list[str]:
    """Half-written files and folders."""
    marks = (".tmp", "-tmp", "-unfinished-")
    return [str(p) for p in workdir.rglob("*") if any(mark in p.name for mark in marks)]
