"""Packed rows at scale: written as they come, read in shuffled batches, resumed after a kill.

Synthetic rows of 64 ids in a process that is watched: rows a second, resident memory as it goes on,
and a reader that is killed (-9) and goes on from the state that it wrote down last.
Command: python experiments/benchmarks/data.py --work runs/data [--rows 1000000]
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
import tyro

from rlbf_jax.data.datasets import batches, open_source, write_dataset
from rlbf_jax.training.journal import read_journal

LENGTH, BATCH = 64, 256


@dataclasses.dataclass(frozen=True)
class Args:
    work: pathlib.Path
    rows: int = 1_000_000
    read: int = 2_000
    """Batches of 256 rows that are read."""
    part: Literal["all", "write", "read"] = "all"
    log: pathlib.Path = pathlib.Path("batches.jsonl")
    """Where a reader writes down its state and what it read (`--part read`)."""


def resident() -> int:
    """Bytes of this process in memory."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def synthetic(count: int) -> Iterator[dict[str, np.ndarray]]:
    """Rows that depend on their number alone."""
    ones = np.ones(LENGTH, bool)
    for start in range(0, count, 1000):
        tokens = np.random.default_rng(start).integers(0, 32_000, (1000, LENGTH), np.int32)
        for row in tokens[: count - start]:
            yield {"tokens": row, "segment": ones * 1, "in_response": ones, "in_loss": ones}


def write(args: Args) -> None:
    peaks: list[int] = []

    def watched() -> Iterator[dict[str, np.ndarray]]:
        for number, row in enumerate(synthetic(args.rows), 1):
            if number % (args.rows // 10) == 0:
                peaks.append(resident())
            yield row

    began = time.perf_counter()
    write_dataset(args.work / "rows", watched())
    seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in (args.work / "rows").iterdir())
    told = ", ".join(f"{peak / 1e6:.0f}" for peak in [*peaks, resident()])
    print(f"written: {args.rows / seconds:,.0f} rows a second, {size / 1e6:.0f} MB on disk")
    print(f"  resident MB at each tenth, and at the end: {told}", flush=True)


def read(args: Args) -> None:
    """Reads on from the last line of the log, and writes a line a batch."""
    began = time.perf_counter()
    source = open_source(args.work / "rows", memory_bytes=0)
    opened = time.perf_counter() - began
    rows = batches(source, BATCH, seed=0)
    done = 0
    if args.log.exists():
        whole = args.log.read_bytes().rpartition(b"\n")[0]
        args.log.write_bytes(whole + b"\n" if whole else b"")
        if whole:
            last = json.loads(whole.splitlines()[-1])
            done = last["batch"]
            rows.set_state(last["state"])
    peaks, began = [], time.perf_counter()
    with open(args.log, "ab", buffering=0) as log:
        for number in range(done + 1, args.read + 1):
            digest = zlib.crc32(next(rows)["tokens"].tobytes())
            line = {"batch": number, "crc": digest, "state": rows.get_state()}
            log.write(json.dumps(line).encode() + b"\n")
            if number % (args.read // 10) == 0:
                peaks.append(resident())
    seconds = time.perf_counter() - began
    told = ", ".join(f"{peak / 1e6:.0f}" for peak in peaks)
    rate = (args.read - done) * BATCH / seconds
    print(f"read: {rate:,.0f} rows a second after {opened:.2f} s to open")
    print(f"  resident MB: {told}", flush=True)


def crcs(log: pathlib.Path) -> list[int]:
    return [row["crc"] for row in read_journal(log)]


def everything(args: Args) -> None:
    def child(part: str, log: pathlib.Path) -> subprocess.Popen:
        options = ["--work", args.work, "--rows", args.rows, "--read", args.read, "--log", log]
        return subprocess.Popen([sys.executable, __file__, "--part", part, *map(str, options)])

    args.work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(args.work / "rows", ignore_errors=True)
    whole, struck = args.work / "whole.jsonl", args.work / "struck.jsonl"
    for log in (whole, struck):
        log.unlink(missing_ok=True)
    for part in ("write", "read"):
        assert child(part, whole).wait() == 0
    kills = 0
    for least in (args.read // 5, args.read // 2, args.read * 4 // 5):
        reader = child("read", struck)
        while not struck.exists() or struck.read_bytes().count(b"\n") < least:
            time.sleep(0.01)
        reader.send_signal(signal.SIGKILL)
        kills += reader.wait() == -signal.SIGKILL
    assert child("read", struck).wait() == 0
    same = crcs(whole) == crcs(struck)
    other = crcs(whole)[:-1] == crcs(struck)[1:]
    count = len(crcs(struck))
    print(f"killed {kills} times: the same {count} batches: {same} (moved by one: {other})")


if __name__ == "__main__":
    given = tyro.cli(Args)
    {"all": everything, "write": write, "read": read}[given.part](given)
