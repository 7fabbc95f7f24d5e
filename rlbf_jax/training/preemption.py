"""What SIGTERM and SIGINT do: a training loop ends at its next step with a checkpoint,
everything else ends at once.

Ending at once is safe anywhere, because every file is written whole
or is cut back when a run goes on.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator

EXIT_CODE = 130
"""Of a process that a signal asked to stop, whichever signal it was."""
GRACE = 10.0
"""Seconds that a command outside a training loop has to unwind before it is ended."""


class StopFlag:
    """Set by a signal; read by loops between steps."""

    def __init__(self):
        self.set = False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Within this block the first SIGTERM or SIGINT sets the flag;
    a second SIGINT interrupts at once.

    A signal that nobody acted on before the block's normal end is delivered again after it.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    received: list[int] = []

    def handle(number, frame):
        if flag.set and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.set = True
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    except BaseException:
        received.clear()  # Preempted, or an error: the block is being left already
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


@contextlib.contextmanager
def interruptible(last_words: str) -> Iterator[None]:
    """Within this block, outside `stop_on_signals`, the first SIGTERM
    or SIGINT raises KeyboardInterrupt.

    A second SIGINT ends the process at once, even in the middle of a compilation;
    so does an interruption that has not reached the end of this block after GRACE seconds.
    Then `last_words` go to stderr.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def interrupt(number, frame):
        nonlocal asked
        if not asked:
            asked = True
            raise KeyboardInterrupt

    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)
    }
    wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(read_end, interrupt, last_words), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write_end)
        watcher.join()
        os.close(read_end)


def _watch(read_end: int, interrupt, last_words: str) -> None:
    """A thread's work: Python runs signal handlers between bytecodes only,
    and a compilation is none."""
    first = os.read(read_end, 1)
    if first and sys.stderr.isatty():
        os.write(2, b"\nstopping; Ctrl-C again stops at once\n")
    left = GRACE
    while first:
        ready, _, _ = select.select([read_end], [], [], 0.5)
        if ready:
            again = os.read(read_end, 1)
            if not again:  # the block was left
                return
            if again[0] != signal.SIGINT:
                continue
        elif (
            signal.getsignal(signal.SIGTERM) is not interrupt
        ):  # a training loop, which ends at its next step
            left = GRACE
            continue
        else:
            left -= 0.5
            if left > 0:
                continue
        os.write(2, f"\n{last_words}\n".encode())
        os._exit(EXIT_CODE)
