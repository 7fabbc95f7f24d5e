"""What an update will take, told before the first one runs."""

from __future__ import annotations

from typing import Any

from rlbf_jax.parallel.memory import Memory, device_memory
from rlbf_jax.progress import say
from rlbf_jax.training.learner import Learner

GB = 10**9
FLAGS = (
    "--model.remat block, --model.scan_layers true, more microbatches (accumulate), fewer rows, "
    "--mesh.fsdp, or adapters alone (--model.lora.rank)"
)
"""What makes an update smaller, the cheapest first."""


def tell(learner: Learner, batch: Any, name: str) -> None:
    """Says what the update of a stage takes of a device. It is compiled here, which it would be a
    moment later."""
    say(f"{name}: {forecast(learner.memory(batch), device_memory())}")


def forecast(memory: Memory, limit: int | None) -> str:
    """One line; where it is more than there is, with what helps."""
    state, work = memory.arguments, memory.total - memory.arguments
    parts = f"{_size(state)} for state and batch, {_size(work)} to work in"
    told = f"an update takes {_size(memory.total)} of a device ({parts})"
    if limit is None:
        return told
    if memory.total <= limit:
        return f"{told}, which has {_size(limit)}"
    return f"{told}, and it has {_size(limit)}: it may well end here; what helps: {FLAGS}"


def _size(count: int) -> str:
    if count < GB:
        return f"{count / 1e6:.0f} MB"
    return f"{count / GB:.1f} GB" if count < 10 * GB else f"{count / GB:.0f} GB"
