"""What one program will take: bytes by kind, operations, exchanges, and seconds by a roofline.

Bytes come from the compiler (`memory_analysis`), operations, traffic and exchanges from the text of
what it compiled, each with its trips: XLA's own cost analysis counts the body of a loop once.

    seconds >= max(operations / peak, traffic / bandwidth, sent bytes / link)

(Williams, Waterman and Patterson, Roofline, CACM 52, 2009, with the interconnect as a third roof.)
The three may overlap and each may fall short of its peak, so seconds are a bound from below.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence

import jax

from rlbf_jax.parallel.compiled import Collective, collectives, dots
from rlbf_jax.parallel.memory import Memory, memory_of
from rlbf_jax.parallel.traffic import traffic
from rlbf_jax.planning.chips import Chip
from rlbf_jax.planning.phases import Phase

_USED = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm|\(([\d.]+)([KMGT])\) exceeds")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """Collectives of one kind in one run of a program."""

    places: int
    """In the program."""
    trips: int
    """In all, those inside loops of unknown turns as often as was assumed."""
    bytes: int
    """Result bytes of one chip, times trips."""
    sent: float
    """Bytes that one chip sends, times trips."""
    largest: str = ""
    """The place that sends most: arrays, trips, and the traced operation."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """One program on one chip."""

    phase: str
    stages: tuple[str, ...]
    about: str
    runs: float
    """In one step of its stage."""
    steps: int
    memory: Memory | None
    """None: the compiler refused the program, because it needs more than there is."""
    needed: int | None
    """Bytes on one chip; where the compiler refused the program, what it said, and what lies
    beside."""
    flops: int
    traffic: int
    """Bytes to and from memory."""
    exchanged: Mapping[str, Exchanged]
    assumed_turns: int | None
    """What was assumed of a loop whose end the data decide; None where there is none."""
    seconds: Mapping[str, float]
    """Of each roof (compute, memory, exchange); empty where the chip's figures are not known."""
    fits: bool | None
    """None: the chip's memory is not known."""
    compiled_in: float
    """Seconds that the compiler took."""

    @property
    def name(self) -> str:
        return f"{'/'.join(self.stages)} {self.phase}"

    @property
    def bound(self) -> float | None:
        """Seconds of one run, at least."""
        return max(self.seconds.values()) if self.seconds else None

    @property
    def binds(self) -> str:
        """The resource of the highest roof; empty where seconds are not known."""
        return max(self.seconds, key=lambda roof: self.seconds[roof]) if self.seconds else ""

    @property
    def step_seconds(self) -> float | None:
        """Seconds of one step of its stage, at least."""
        return None if self.bound is None else self.bound * self.runs

    def plain(self) -> dict:
        """As JSON."""
        stored = dataclasses.asdict(self)
        stored["memory"] = {**stored["memory"], "total": self.memory.total} if self.memory else None
        return {"name": self.name, **stored, "binds": self.binds}


def forecast(phase: Phase, chip: Chip | None) -> Forecast:
    """Compiles a program and reads what it takes. Raises what the compiler raises, but for a
    program that is too large."""
    began = time.perf_counter()
    lowered = phase.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _refused(str(error))
        if needed is None:
            raise
        memory, text, needed = None, "", needed + phase.beside
    else:
        memory, text = memory_of(compiled, phase.beside), compiled.as_text() or ""
        needed = memory.total
    took = time.perf_counter() - began
    turns = phase.unknown_turns
    exchanges = collectives(text, turns) if text else []
    moved = traffic(text, turns) if text else None
    flops = sum((d.flops or 0) * (d.trips or 0) for d in dots(text, turns)) if text else 0
    bytes_moved = moved.bytes if moved else 0
    sent = sum(c.sent_bytes * (c.trips or 0) for c in exchanges)
    return Forecast(
        phase.name,
        phase.stages,
        phase.about,
        phase.runs,
        phase.steps,
        memory,
        needed,
        flops,
        bytes_moved,
        by_kind(exchanges),
        turns if moved and moved.assumed else None,
        roofs(chip, flops, bytes_moved, sent) if chip and text else {},
        None if chip is None else needed <= chip.memory,
        took,
    )


def roofs(chip: Chip, flops: float, moved: float, sent: float) -> dict[str, float]:
    """Seconds at which each resource would be busy all the time."""
    return {
        "compute": flops / chip.peak,
        "memory": moved / chip.bandwidth,
        "exchange": sent / chip.exchange,
    }


def by_kind(exchanges: Sequence[Collective]) -> dict[str, Exchanged]:
    """Collectives summed by kind, largest first."""
    found: dict[str, Exchanged] = {}
    for c in sorted(exchanges, key=lambda c: -c.sent_bytes * (c.trips or 0)):
        trips = c.trips or 0
        first = f"{', '.join(map(str, c.shapes))} x {trips} over {c.group_size}: {c.where}"
        old = found.get(c.kind, Exchanged(0, 0, 0, 0.0, first))
        found[c.kind] = Exchanged(
            old.places + 1,
            old.trips + trips,
            old.bytes + c.bytes * trips,
            old.sent + c.sent_bytes * trips,
            old.largest,
        )
    return dict(sorted(found.items(), key=lambda item: -item[1].sent))


def _refused(message: str) -> int | None:
    """Bytes that a program would need, where the compiler refused it for that."""
    match = _USED.search(message)
    if match is None:
        return None
    number, unit = match.group(1, 2) if match.group(1) else match.group(3, 4)
    return int(float(number) * _UNITS[unit])
