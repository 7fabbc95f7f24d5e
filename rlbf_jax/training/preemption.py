"""SIGTERM and SIGINT end a stage at its next step boundary, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class StopFlag:
    """Set by a signal; read by loops between steps."""

    def __init__(self):
        self.set = False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Within this block the first SIGTERM or SIGINT sets the flag; a second SIGINT interrupts at once."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(number, frame):
        if flag.set and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.set = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
