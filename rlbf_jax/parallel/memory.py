"""What a compiled program takes of a device's memory, and what there is."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says what a container may use."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a program runs."""

    arguments: int
    temporaries: int
    """Activations, gradients, gathered parameters."""
    outputs: int
    reused: int
    """Of the outputs, what takes the place of a donated argument."""
    beside: int
    """Kept while it runs and no argument of it: moments, the reference, the policy that a sampler's
    copy was made of."""
    code: int = 0

    @property
    def total(self) -> int:
        """The peak that the compiler plans, and what lies beside."""
        program = self.arguments + self.temporaries + self.outputs - self.reused
        return program + self.beside + self.code


def memory_of(compiled: jax.stages.Compiled, beside: int = 0) -> Memory:
    """What the compiler plans for a program; `beside`: what is kept while it runs."""
    plan: Any = compiled.memory_analysis()
    return Memory(
        plan.argument_size_in_bytes,
        plan.temp_size_in_bytes,
        plan.output_size_in_bytes,
        plan.alias_size_in_bytes,
        beside,
        plan.generated_code_size_in_bytes,
    )


def device_memory() -> int | None:
    """Bytes of a device at hand: what its runtime may allocate, or of a CPU its share of what this
    machine (or container) has. None where nobody says."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform != "cpu":
        return None
    known = [_read(path) for path in _LIMITS]
    try:
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        pass  # not every system says
    found = [size for size in known if size]
    return min(found) // jax.local_device_count() if found else None


def _read(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
