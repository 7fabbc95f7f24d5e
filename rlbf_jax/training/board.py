"""TensorBoard events, written by the loop itself.

`tensorboardX.SummaryWriter` writes from a thread behind a bounded queue: on a full disk the thread
dies with a traceback, and the next `add_scalar` waits for it forever. A loop logs a few scalars a
step, so it needs no thread.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from rlbf_jax.parallel import hosts


class Board:
    """One event file, written by the first of several processes. Raises OSError where it cannot be
    written."""

    def __init__(self, folder: Path, purge_step: int | None = None, suffix: str = ""):
        """`purge_step`: TensorBoard drops what earlier files say of this step and later ones."""
        self._writer: EventsWriter | None = None
        if not hosts.is_first():
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), suffix)
        if purge_step is not None:
            self._writer.write_event(Event(step=purge_step, file_version="brain.Event:2"))
            self._writer.write_event(
                Event(step=purge_step, session_log=SessionLog(status=SessionLog.START))
            )

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if self._writer is None:
            return
        self._writer.write_event(
            Event(wall_time=time.time(), step=step, summary=scalar(name, value))
        )

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # otherwise the disk has been heard of already, with more to say
                raise
