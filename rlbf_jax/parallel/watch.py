"""Whether the other processes of a run are still there, and how one ends all of them.

Each process writes a sign of life into the store of `jax.distributed` once a second and reads those
of the others. One that is silent for too long, or that has left with a reason, ends this process:
in a collective with a peer that is gone XLA waits for minutes, or forever.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

EXIT_CODE = 2
"""Of a process that ends because another one is gone."""
BEAT_S = 1.0
"""Between two signs of life."""
GRACE_S = 2.0
"""For saying one's own error: all processes of a run may meet the same."""
LINGER_S = 5.0
"""So long process 0, which serves the store, stays for the others to read its last words."""
LEAVE_S = 60
"""So long processes that are done wait for each other."""
LEFT = "hosts/left"
ALIVE = "hosts/alive/"
FOREVER_MS = 30 * 24 * 3600 * 1000
"""For what may take long: whether the others are alive is asked here."""


class Watch:
    """Threads that give signs of life and look for those of the others.

    Args:
      client: the client of `jax.distributed`, a store of strings that process 0 serves.
      patience: seconds of silence after which a process counts as gone.
    """

    def __init__(self, client: Any, process: int, processes: int, patience: float):
        self._client, self._me, self._patience = client, process, patience
        self._over, self._ending = threading.Event(), threading.Lock()
        now = time.monotonic()
        self._served = now
        self._heard = {other: ("", now) for other in range(processes) if other != process}
        """Of each other process its last sign of life, and since when it stands."""
        works = (self._beat, self._listen, self._look)
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def leave(self, code: int, reason: str) -> None:
        """Ends the watch: with a reason all processes end, without one they wait for each other."""
        try:
            if reason:
                self._over.set()
                self._tell(code, reason)
            else:
                self._client.wait_at_barrier("hosts/leave", LEAVE_S * 1000)
                self._over.set()
                # A thread must not wait in JAX's client while the interpreter ends.
                self._tell(0, "")
                for thread in self._threads:
                    thread.join()
        except RuntimeError:  # another one is gone as well
            self._over.set()

    def wait_for_verdict(self) -> None:
        """Waits as long as it may take to notice that another process is gone; then this one ends
        meanwhile."""
        time.sleep(self._patience + 3 * BEAT_S)
        if self._ending.locked():
            time.sleep(2 * LINGER_S)

    def _beat(self) -> None:
        count = 0
        while not self._over.wait(BEAT_S):
            count += 1
            try:
                self._client.key_value_set(f"{ALIVE}{self._me}", str(count), allow_overwrite=True)
                signs = dict(self._client.key_value_dir_get(ALIVE))
            except RuntimeError:  # `_listen` hears of it as well
                continue
            now = self._served = time.monotonic()
            for other, (sign, _) in self._heard.items():
                if (new := signs.get(f"{ALIVE}{other}", "")) != sign:
                    self._heard[other] = new, now

    def _listen(self) -> None:
        """Waits for the word that one has left, or for the store to close."""
        try:
            said = self._client.blocking_key_value_get(LEFT, FOREVER_MS)
        except RuntimeError:
            # JAX, which notices at the same moment, may come first and abort.
            self._end(EXIT_CODE, "process 0 is gone")
            return
        other, code, reason = json.loads(said)
        if other != self._me:
            self._end(code, f"process {other} stopped: {reason}", GRACE_S)

    def _look(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(BEAT_S):
            now = time.monotonic()
            if now - looked > self._patience / 2:  # it was this process that stood still
                self._served = now
                self._heard = {other: (sign, now) for other, (sign, _) in self._heard.items()}
            looked = now
            silent = f"gave no sign of life for {self._patience:.0f} s"
            if now - self._served > self._patience:
                self._end(EXIT_CODE, f"process 0 is gone: it {silent}")
            for other, (_, since) in self._heard.items():
                if self._served - since > self._patience:
                    self._end(EXIT_CODE, f"process {other} is gone: it {silent}")

    def _tell(self, code: int, reason: str) -> None:
        said = json.dumps([self._me, code, reason])
        self._client.key_value_set(LEFT, said, allow_overwrite=True)
        if self._me == 0 and reason:
            time.sleep(LINGER_S)

    def _end(self, code: int, reason: str, grace: float = 0.0) -> None:
        if self._over.wait(grace) or not self._ending.acquire(blocking=False):
            return
        mend = "start the same command on every host again: it goes on from the last checkpoint"
        write_error(f"{reason}; {mend}")
        if self._me == 0:
            self._tell(code, reason)
        os._exit(code)


def write_error(message: str) -> None:
    """One line on standard error, from any thread, before a process is ended."""
    stream = sys.__stderr__.fileno() if sys.__stderr__ else 2
    os.write(stream, f"error: {message}\n".encode())
