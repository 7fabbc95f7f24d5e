"""What every training loop does between updates: log, check, checkpoint, stop.

A `StageRun` owns a stage's folder:

    WORKDIR/stages/NAME/checkpoints/   Orbax
    WORKDIR/stages/NAME/metrics.jsonl  one row a step, byte-for-byte reproducible
    WORKDIR/stages/NAME/timing.jsonl   wall-clock seconds, never reproducible
    WORKDIR/stages/NAME/tensorboard/   the same scalars
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tensorboardX import SummaryWriter

from rlbf_jax.errors import Preempted, UserError
from rlbf_jax.parallel.mesh import shardings
from rlbf_jax.training.checkpoint import Checkpoints
from rlbf_jax.training.journal import Journal
from rlbf_jax.training.preemption import StopFlag, stop_on_signals
from rlbf_jax.training.progress import progress


class StageRun:
    """Runs `step` from where the last checkpoint stands to `steps`."""

    def __init__(self, folder: Path, name: str, steps: int, checkpoint_every: int, mesh: Mesh):
        self.folder, self.name, self.steps, self.every, self.mesh = folder, name, steps, checkpoint_every, mesh
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.journals: dict[str, Journal] = {}

    def start(self, state: Any, journals: tuple[str, ...] = ()) -> tuple[int, Any, dict]:
        """(first step, state, extra): the given state on the mesh and step 0, or what the checkpoint holds.

        Opens `metrics.jsonl` and the named further journals at the checkpoint's offsets.
        """
        meta: dict = {}
        if self.checkpoints.latest is not None:
            state, meta = self.checkpoints.restore(state, self.mesh)
        else:
            state = jax.device_put(state, shardings(state, self.mesh))
        offsets = meta.get("offsets", {})
        for name in ("metrics", *journals):
            self.journals[name] = Journal(self.folder / f"{name}.jsonl", offsets.get(name, 0))
        return meta.get("step", 0), state, meta.get("extra", {})

    def loop(
        self,
        state: Any,
        first: int,
        step: Callable[[Any, int], tuple[Any, dict[str, float]]],
        extra: Callable[[], dict] = dict,
    ) -> Any:
        """Calls step(state, number) -> (state, metrics) up to `steps`.

        `extra` gives what a checkpoint needs besides (a data iterator's state). Raises UserError when a metric is not
        finite, Preempted after a signal; both leave a checkpoint or the last good one.
        """
        timing = Journal(self.folder / "timing.jsonl", _size(self.folder / "timing.jsonl"))
        board = SummaryWriter(str(self.folder / "tensorboard"))
        with stop_on_signals() as stop, progress(self.steps, self.name, first) as bar:
            for number in range(first, self.steps):
                began = time.perf_counter()
                state, metrics = step(state, number)
                _check_finite(metrics, self.name, number)
                self.journals["metrics"].write({"step": number, **metrics})
                timing.write({"step": number, "seconds": round(time.perf_counter() - began, 4)})
                for key, value in metrics.items():
                    board.add_scalar(key, value, number)
                bar.set_postfix({k: f"{v:.3g}" for k, v in list(metrics.items())[:3]}, refresh=False)
                bar.update()
                self._maybe_save(state, number + 1, extra, stop)
        timing.close()
        board.close()
        for journal in self.journals.values():
            journal.sync()
            journal.close()
        self.checkpoints.close()
        return state

    def _maybe_save(self, state: Any, done: int, extra: Callable[[], dict], stop: StopFlag) -> None:
        if not (stop.set or done == self.steps or done % self.every == 0):
            return
        offsets = {name: journal.sync() for name, journal in self.journals.items()}
        self.checkpoints.save(done, state, {"step": done, "offsets": offsets, "extra": extra()})
        if stop.set and done < self.steps:
            raise Preempted(f"stage {self.name} stopped after step {done} of {self.steps}; its state is saved")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_finite(metrics: dict[str, float], name: str, step: int) -> None:
    bad = [key for key, value in metrics.items() if value != value or value in (float("inf"), float("-inf"))]
    if bad:
        raise UserError(
            f"stage {name}, step {step}: {', '.join(bad)} is not finite; the last good state is its newest checkpoint. "
            "Lower the learning rate or the clip norm, or look at that step's rollouts"
        )
