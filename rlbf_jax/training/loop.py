"""What every training loop does between updates: log, check, checkpoint, stop.

A `Loop` owns a stage's folder:

    WORKDIR/stages/NAME/checkpoints/   Orbax
    WORKDIR/stages/NAME/metrics.jsonl  one row a step, byte-for-byte reproducible
    WORKDIR/stages/NAME/timing.jsonl   wall-clock seconds by part, never reproducible
    WORKDIR/stages/NAME/starts.jsonl   a row a start, and goodput.json at the end (`goodput`)
    WORKDIR/stages/NAME/tensorboard/   the same scalars; readers drop what a resumed run repeats
"""

from __future__ import annotations

import contextlib
import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from rlbf_jax.errors import Preempted, UserError
from rlbf_jax.parallel import hosts
from rlbf_jax.parallel.mesh import shardings
from rlbf_jax.parallel.placing import placed
from rlbf_jax.progress import progress, say
from rlbf_jax.training.board import Board
from rlbf_jax.training.checkpoint import Checkpoints
from rlbf_jax.training.clock import Clock, Minutes
from rlbf_jax.training.goodput import Starts
from rlbf_jax.training.journal import Journal
from rlbf_jax.training.preemption import StopFlag, stop_on_signals


class Loop:
    """Runs `step` from where the last checkpoint stands to `steps`."""

    def __init__(
        self,
        folder: Path,
        name: str,
        steps: int,
        checkpoint_every: int,
        mesh: Mesh,
        keep: int = 1,
    ):
        """`keep`: so many of the newest checkpoints stay."""
        self.folder, self.name, self.steps, self.every, self.mesh = (
            folder,
            name,
            steps,
            checkpoint_every,
            mesh,
        )
        self.checkpoints = Checkpoints(folder / "checkpoints", keep, writes=True)
        self.journals: dict[str, Journal] = {}
        self.clock = Clock(compiling=True)

    def start(
        self,
        state: Any,
        journals: tuple[str, ...] = (),
        make: Callable[[], Any] | None = None,
    ) -> tuple[int, Any, dict]:
        """(first step, state, extra): the given state on the mesh and step 0,
        or what the checkpoint holds.

        With `make`, which is called where there is no checkpoint, `state` may be shapes: a state
        that another one takes the place of is never made.

        Opens `metrics.jsonl`, `timing.jsonl` and the named further journals
        at the checkpoint's offsets.
        """
        meta: dict = {}
        began = time.perf_counter()
        if self.checkpoints.latest is not None:
            state, meta = self.checkpoints.restore(state, self.mesh)
        else:
            state = state if make is None else make()
            state = placed(state, shardings(state, self.mesh))
        offsets = meta.get("offsets", {})
        restored = time.perf_counter() - began if meta else 0.0
        self.starts = Starts(self.folder, offsets.get("timing", 0), restored)
        for name in ("metrics", "timing", *journals):
            self.journals[name] = Journal(self.folder / f"{name}.jsonl", offsets.get(name, 0))
        return meta.get("step", 0), state, meta.get("extra", {})

    def run(
        self,
        state: Any,
        first: int,
        step: Callable[[Any, int], tuple[Any, dict[str, float]]],
        extra: Callable[[], dict] = dict,
    ) -> Any:
        """Calls step(state, number) -> (state, metrics) up to `steps`.

        `extra` gives what a checkpoint needs besides (a data iterator's state).
        Raises UserError when a metric is not finite, Preempted after a signal;
        both leave a checkpoint or the last good one.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self.checkpoints.close)
            for journal in self.journals.values():
                stack.callback(journal.close)
            board = stack.enter_context(open_board(self.folder / "tensorboard", first))
            stop = stack.enter_context(stop_on_signals())
            bar = stack.enter_context(progress(self.steps, self.name, first))
            minutes = Minutes(self.name, self.steps)
            self.starts.stepping()
            for number in range(first, self.steps):
                began = time.perf_counter()
                state, metrics = step(state, number)
                self.checkpoints.check()
                _check_finite(metrics, self.name, number, self.checkpoints.latest)
                self.journals["metrics"].write({"step": number, **metrics})
                seconds, parts = time.perf_counter() - began, self.clock.taken()
                self.journals["timing"].write(
                    {"step": number, "seconds": round(seconds, 4), **parts}
                )
                line = minutes.line(number + 1, seconds, parts)
                if line and bar.disable:
                    say(line)
                for key, value in metrics.items():
                    board.add_scalar(key, value, number)
                bar.set_postfix(
                    {k: f"{v:.3g}" for k, v in list(metrics.items())[:3]}, refresh=False
                )
                bar.update()
                stop.set = self._agreed(number, metrics, stop.set)
                if stop.set or number + 1 == self.steps or (number + 1) % self.every == 0:
                    board.flush()
                    with self.clock.part("checkpoint"):
                        self._save(state, number + 1, extra, stop)
        if first < self.steps:
            self.starts.ended()
        return state

    def _agreed(self, number: int, metrics: dict[str, float], stop: bool) -> bool:
        """Whether any process was asked to stop. Raises UserError where they have different
        metrics: each would go on with another model."""
        if not hosts.several():
            return stop
        told = zlib.crc32(json.dumps(metrics).encode())
        flags, sums = hosts.all_of([stop, told]).T
        if len(set(sums.tolist())) > 1:
            raise UserError(
                f"stage {self.name}, step {number}: the processes of this run have come to "
                f"different metrics; the checkpoint after step {self.checkpoints.latest} is kept. "
                "Look whether all hosts have the same packages and the same kind of device"
            )
        return bool(flags.any())

    def _save(self, state: Any, done: int, extra: Callable[[], dict], stop: StopFlag) -> None:
        offsets = {name: journal.sync() for name, journal in self.journals.items()}
        self.checkpoints.save(done, state, {"step": done, "offsets": offsets, "extra": extra()})
        if stop.set:
            self.checkpoints.finish()
            raise Preempted(
                f"stage {self.name} stopped after step {done} of {self.steps}; its state is saved"
            )


def open_board(folder: Path, first: int) -> Board:
    """A writer of TensorBoard events whose first step is `first`.

    A run that goes on repeats the steps since its last checkpoint: `purge_step` tells TensorBoard
    to drop what earlier files say of them. The suffix keeps a run that is started again within a
    second from overwriting the earlier file.
    """
    return Board(folder, purge_step=first or None, suffix=f".{first}")


def _check_finite(metrics: dict[str, float], name: str, step: int, kept: int | None) -> None:
    bad = [
        key
        for key, value in metrics.items()
        if value != value or value in (float("inf"), float("-inf"))
    ]
    if bad:
        raise UserError(
            f"stage {name}, step {step}: {', '.join(bad)} is not finite; "
            + (
                "no checkpoint was due before it. "
                if kept is None
                else f"the checkpoint after step {kept} is kept. "
            )
            + "Lower the learning rate or the clip norm, or look at that step's rollouts"
        )
