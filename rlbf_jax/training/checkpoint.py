"""Checkpoints through Orbax: params, optimizer, step, data iterator and journal offsets, whole or not at all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from rlbf_jax.errors import UserError
from rlbf_jax.parallel.mesh import shardings

logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of one stage. Orbax writes to a temporary folder and renames it: a kill leaves the old ones."""

    def __init__(self, folder: Path, keep: int = 1):
        self.folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Writes `state` (a pytree) and `meta` (JSON) as one checkpoint; a step that is there already stays."""
        if step == self.latest:
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=items)
        self._manager.wait_until_finished()

    def restore(self, state: Any, mesh: Mesh, step: int | None = None) -> tuple[Any, dict]:
        """State and meta of a step (the latest by default), laid out on `mesh`.

        `state` gives structure, shapes and dtypes (arrays or ShapeDtypeStructs). Raises UserError where the checkpoint
        is missing, damaged, or of another shape.
        """
        step = self.latest if step is None else step
        if step is None:
            raise UserError(f"{self.folder}: no checkpoint here; run the stage first")
        places = shardings(state, mesh)
        abstract = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # Orbax raises many kinds; a user needs one line
            raise UserError(
                f"{self.folder}/{step}: cannot be read ({_first_line(error)}); "
                "delete that folder to go on from an earlier checkpoint, or the stage's folder to start it again"
            ) from error
        return restored["state"], restored["meta"]

    def close(self) -> None:
        self._manager.close()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
