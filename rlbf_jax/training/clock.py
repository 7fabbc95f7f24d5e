"""Where the seconds of a training go: `timing.jsonl`, and a line a minute where nobody sees a bar.

| part | what | bucket of ml-goodput-measurement |
|---|---|---|
| sampling | rollouts | step (productive) |
| judging | critics, seams, rewards | step |
| measuring | behavior, values, advantages, reference | step |
| update | losses, gradients, the optimizer | step |
| data | the next batch | data loading (synchronous) |
| checkpoint | the save before this step | checkpoint save |
| compiling | XLA at work, inside of whatever part asked for it | program startup |

What no part names (journals, metrics) is the rest of a step's seconds.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

import jax

EVERY = 60.0
"""Seconds between two lines."""
_COMPILED = "/jax/core/compile/backend_compile_duration"
_compiling = 0.0


def _note(event: str, duration_secs: float, **_: str | int) -> None:
    global _compiling
    if event == _COMPILED:
        _compiling += duration_secs


jax.monitoring.register_event_duration_secs_listener(_note)


class Clock:
    """Seconds by part, since they were last taken; `compiling` is one of them, if asked for."""

    def __init__(self, compiling: bool = False):
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._compiling = _compiling if compiling else None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what happens inside as a part. Whatever is computed must be waited for there."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] += time.perf_counter() - began

    def add(self, parts: Mapping[str, float]) -> None:
        """Seconds that somebody else counted."""
        for name, seconds in parts.items():
            self._spent[name] += seconds

    def taken(self) -> dict[str, float]:
        """Seconds by part, which start anew."""
        if self._compiling is not None:
            self._spent["compiling"] += _compiling - self._compiling
            self._compiling = _compiling
        spent, self._spent = self._spent, defaultdict(float)
        return {name: round(seconds, 4) for name, seconds in spent.items() if seconds}


class Minutes:
    """Says how far a training is, once in `EVERY` seconds."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps = name, steps
        self._at, self._seconds, self._count = time.perf_counter(), 0.0, 0
        self._parts = Clock()

    def line(self, done: int, seconds: float, parts: Mapping[str, float]) -> str | None:
        """The line after a step, None where none is due."""
        self._seconds, self._count = self._seconds + seconds, self._count + 1
        self._parts.add(parts)
        if time.perf_counter() - self._at < EVERY:
            return None
        most = sorted(self._parts.taken().items(), key=lambda item: -item[1])
        shares = ", ".join(f"{part} {spent / self._seconds:.0%}" for part, spent in most)
        told = f"{self.name}: step {done} of {self.steps}, {self._seconds / self._count:.2f} s each"
        left = (self.steps - done) * self._seconds / self._count
        self._at, self._seconds, self._count = time.perf_counter(), 0.0, 0
        return f"{told}{f' ({shares})' if shares else ''}, about {left / 60:.0f} min left"
