"""Groups of processes on loopback that are one run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from tests.conftest import QUICKLY_COMPILED, ROOT

CHATTER = ("[Gloo]", "Expected number", "peer ranks")
"""What the collectives of CPUs print of themselves."""


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process of a group ended."""

    code: int
    """Exit code; minus the signal that killed it."""
    log: str
    """What it wrote to stdout and stderr, without the chatter of collectives."""


class Group:
    """Processes that were started together."""

    def __init__(self, processes: list[subprocess.Popen], logs: list[pathlib.Path]):
        self.processes, self.logs = processes, logs

    def log(self, process: int) -> str:
        lines = self.logs[process].read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if not any(word in line for word in CHATTER))

    def wait_for(self, word: str, process: int = 0, timeout: float = 120) -> None:
        """Until a process has written `word`."""
        end = time.monotonic() + timeout
        while word not in self.log(process):
            assert time.monotonic() < end, self.log(process)[-3000:]
            assert self.processes[process].poll() is None, self.log(process)[-3000:]
            time.sleep(0.05)

    def strike(self, process: int, number: int = signal.SIGKILL) -> None:
        self.processes[process].send_signal(number)

    def ended(self, timeout: float = 240) -> list[Ended]:
        """Waits for all."""
        end = time.monotonic() + timeout
        found = []
        for place, process in enumerate(self.processes):
            try:
                code = process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(
                    f"process {place} is still there after {timeout} s:\n{self.log(place)[-3000:]}"
                ) from None
            found.append(Ended(code, self.log(place)))
        return found


@contextlib.contextmanager
def started(
    folder: pathlib.Path,
    argv: Sequence[str],
    count: int = 2,
    devices: int = 2,
    own: Sequence[Sequence[str]] = (),
    patience: float = 30,
) -> Iterator[Group]:
    """Starts `python argv`, as `count` processes with virtual devices, whose environment says that
    they are one run; kills those that are left at the end.

    Args:
      own: further arguments of each process.
      patience: what the arguments say of it, for `Hosts.patience`; "--patience" is added.
    """
    folder.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"{QUICKLY_COMPILED} --xla_force_host_platform_device_count={devices}",
    }
    processes, logs = [], []
    for process in range(count):
        command = [sys.executable, *argv, *(own[process] if own else ())]
        if count > 1:
            command += ["--coordinator", address, "--processes", str(count)]
            command += ["--process", str(process), "--patience", str(patience)]
        logs.append(folder / f"process_{process}.log")
        with open(logs[-1], "wb") as log:
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    try:
        yield Group(processes, logs)
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()
