"""Which share of a training's wall-clock time made steps that count: `goodput.json`.

Buckets are those of ml-goodput-measurement, as far as a training knows them. They are read off
`timing.jsonl`, which has a row a step, and `starts.jsonl`, which has one a start and is never cut:

    {"at": ..., "waited": ..., "wasted": ..., "restored": ..., "prepared": ...}

`at` is a time of the clock (seconds of the epoch), the rest are seconds: since the last sign of the
start before, in steps that no checkpoint knows, in reading a checkpoint, and until the first step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from rlbf_jax.parallel import hosts
from rlbf_jax.storage import write_whole
from rlbf_jax.training.journal import Journal, read_journal

PRODUCTIVE = "productive"
BUCKETS = {
    PRODUCTIVE: "steps that count, without what follows",
    "program_startup": "XLA at work",
    "data_loading_sync": "a step waited for its batch",
    "unproductive_checkpoint_save_time": "a step waited for a checkpoint",
    "unproductive_checkpoint_restore_time": "a start read a checkpoint",
    "training_prep": "from a start to its first step, without that",
    "wasted_progress_from_disruption": "steps that no checkpoint knew when the run was struck",
    "infrastructure_recovery_time": "from the last sign of a start to the next start",
    "other": "between steps",
}
"""Every bucket, and what it holds. Their seconds add up to those since the first start."""
_PARTS = {
    "compiling": "program_startup",
    "data": "data_loading_sync",
    "checkpoint": "unproductive_checkpoint_save_time",
}


class Starts:
    """Notes this start of a stage. `timing.jsonl` must not be cut yet.

    Args:
      offset: bytes of `timing.jsonl` that the checkpoint knows.
    """

    def __init__(self, folder: Path, offset: int, restored: float):
        """`restored`: seconds that reading the checkpoint has taken just now; 0 without one."""
        self.folder, self._ready = folder, time.time()
        at = self._ready - restored
        self._row = {"at": at, "waited": 0.0, "wasted": 0.0, "restored": restored}
        timing = folder / "timing.jsonl"
        if timing.exists():
            self._row["waited"] = max(0.0, at - timing.stat().st_mtime)
            self._row["wasted"] = _seconds_beyond(timing, offset)

    def stepping(self) -> None:
        """To be called before the first step."""
        self._row["prepared"] = time.time() - self._ready
        path = self.folder / "starts.jsonl"
        whole = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
        journal = Journal(path, len(whole[0] + whole[1]))  # without what a kill left half-written
        journal.write({name: round(value, 3) for name, value in self._row.items()})
        journal.close()

    def ended(self) -> None:
        """Writes `goodput.json`."""
        if hosts.is_first():
            seconds = buckets(self.folder, time.time())
            total = sum(seconds.values())
            told = {
                "goodput": round(seconds[PRODUCTIVE] / total, 4) if total else None,
                "seconds": {name: round(value, 2) for name, value in seconds.items()},
                "starts": len(read_journal(self.folder / "starts.jsonl")),
            }
            write_whole(self.folder / "goodput.json", json.dumps(told, indent=1) + "\n")


def buckets(folder: Path, until: float) -> dict[str, float]:
    """Seconds by bucket from the first start to `until`, of a stage's folder."""
    seconds = dict.fromkeys(BUCKETS, 0.0)
    starts = read_journal(folder / "starts.jsonl")
    for start in starts:
        seconds["infrastructure_recovery_time"] += start["waited"]
        seconds["wasted_progress_from_disruption"] += start["wasted"]
        seconds["unproductive_checkpoint_restore_time"] += start["restored"]
        seconds["training_prep"] += start["prepared"]
    for row in read_journal(folder / "timing.jsonl"):
        seconds[PRODUCTIVE] += _productive(row)
        for part, bucket in _PARTS.items():
            seconds[bucket] += row.get(part, 0.0)
    total = until - starts[0]["at"] if starts else 0.0
    seconds["other"] = max(0.0, total - sum(seconds.values()))
    return seconds


def _productive(row: Mapping[str, float]) -> float:
    # The save that a step's row names was made before that step began.
    inside = sum(row.get(part, 0.0) for part in _PARTS if part != "checkpoint")
    return max(0.0, row["seconds"] - inside)


def _seconds_beyond(timing: Path, offset: int) -> float:
    """Seconds of steps in the bytes from `offset` on; a last line that a kill cut off is none."""
    with open(timing, "rb") as file:
        file.seek(offset)
        lines = file.read().split(b"\n")[:-1]
    return sum(json.loads(line)["seconds"] for line in lines)
