"""Training on what the model itself samples: collect, update, write down.

`collect(params, memory, step)` samples, judges and measures; `train_online` updates on the batches
it gives, journals its rows, and checkpoints the learner with the memory. Everything random must
follow from (seed, step), so that a restarted run repeats itself to the bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlbf_jax.training.forecast import tell
from rlbf_jax.training.learner import Learner
from rlbf_jax.training.loop import Loop
from rlbf_jax.training.state import means
from rlbf_jax.training.supervised import Batches


@dataclasses.dataclass(frozen=True)
class Collected:
    """What one step of collecting gives."""

    batches: Iterable[Any]
    """One update each, in order; may be lazy."""
    metrics: Mapping[str, float]
    """Host floats about what was collected."""
    rows: Mapping[str, Sequence[dict]] = dataclasses.field(default_factory=dict)
    """Journal -> JSON-able rows, written down once the step's updates are made."""
    memory: Any = ()
    """What the next step's collecting remembers: a pytree of arrays of fixed shapes
    (a replay buffer), or ()."""
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Where the time of collecting went, by part (`clock`)."""


Collect = Callable[[Any, Any, int], Collected]
"""(parameters joined with frozen ones, memory, step) -> `Collected`."""


@dataclasses.dataclass(frozen=True)
class Remembered:
    """What checkpoints keep beside the learner's state."""

    journals: tuple[str, ...] = ()
    """Names of the journals that collecting writes."""
    sources: Mapping[str, Batches] = dataclasses.field(default_factory=dict)
    """Data that collecting or updating draws from, by name."""
    memory: Any = ()
    """Memory of the first step."""


def train_online(
    learner: Learner, collect: Collect, loop: Loop, remembered: Remembered = Remembered()
) -> Any:
    """Collects and updates until the loop ends; returns the trained parameters."""
    whole = bool(jax.tree.leaves(remembered.memory))
    structure: Any = jax.tree.structure(remembered.memory)

    def kept_with(state: Any) -> Any:
        return (state, remembered.memory) if whole else state

    # The first parameters may also be a reference, and updates reuse their buffers.
    first, kept, extra = loop.start(
        kept_with(learner.shapes),
        remembered.journals,
        lambda: kept_with(learner.begun(copied=True)),
    )
    for name, source in remembered.sources.items():
        if name in extra:
            source.set_state(extra[name])

    def step(kept: Any, number: int) -> tuple[Any, dict[str, float]]:
        state, memory = kept if whole else (kept, remembered.memory)
        learner.take(state)
        collected = collect(learner.params, memory, number)
        if structure != jax.tree.structure(collected.memory):
            raise ValueError(
                "collect returned a memory of another structure than the first step's; hand that "
                "one in as Remembered(memory=...)"
            )
        loop.clock.add(collected.seconds)
        losses: list[dict[str, float]] = []
        batches = iter(collected.batches)
        while True:
            with loop.clock.part("data"):
                batch = next(batches, None)
            if batch is None:
                break
            with loop.clock.part("update"):
                if number == first and not losses:
                    tell(learner, batch, loop.name)
                losses.append(means(learner.update(batch)))
        for name, rows in collected.rows.items():
            loop.journals[name].write_all(rows)
        averaged = {k: float(np.mean([loss[k] for loss in losses])) for k in (losses or [{}])[0]}
        after = (learner.state, collected.memory) if whole else learner.state
        return after, {**collected.metrics, **averaged}

    kept = loop.run(
        kept, first, step, lambda: {k: s.get_state() for k, s in remembered.sources.items()}
    )
    learner.take(kept[0] if whole else kept)
    return learner.state.params  # no update follows that would use the buffers up
