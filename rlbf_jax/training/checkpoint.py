"""Checkpoints through Orbax: params, optimizer, step, data iterator and journal offsets,
whole or not at all, written beside the training."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from rlbf_jax.errors import UserError
from rlbf_jax.parallel import hosts
from rlbf_jax.parallel.mesh import shardings
from rlbf_jax.storage import file_digest, write_whole

# What Orbax says of a damaged file reaches the user as a UserError, once.
logging.getLogger("absl").setLevel(logging.CRITICAL)

CHECKSUMS = "checksums.json"
"""In a step's folder: size and SHA-256 of every other file there.
Orbax reads a flipped bit as another number."""
_TIMES = "_CHECKPOINT_METADATA"
"""When a checkpoint was written: Orbax puts down the end of it after everything else."""
_UNFINISHED = ".orbax-checkpoint-tmp*"
"""Ends the name of a folder that Orbax has not renamed yet."""
QUIET_S, PATIENCE_S = 1.0, 20.0
"""How long nothing must come back before what is half-written counts as removed,
and how long that is waited for."""
HASHED_BYTES = 8 << 30
"""Of larger checkpoints the sizes are checked alone,
so that a restart does not read everything twice."""


class Checkpoints:
    """The checkpoints of one stage. Orbax writes to a temporary folder and renames it; what is old
    then goes when the next one is finished with: a kill or a full disk leaves the last whole ones.

    All processes of a run make the same calls: each writes its own part of the arrays."""

    def __init__(self, folder: Path, keep: int = 1, mend: str = "", writes: bool = False):
        """`keep`: so many of the newest stay. `mend` is what a user does about a damaged
        checkpoint; by default, to start the stage again.

        `writes`: this is the one run that saves here,
          so what looks half-written was left by a killed one.
        """
        self.folder = folder
        self.mend = mend or f"delete {folder.parent} to start the stage again"
        self._saving: int | None = None
        self._keep = keep
        # Orbax would remove old ones itself, from a thread that goes on to do so where `check` has
        # heard of a failure before it.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,
            enable_async_checkpointing=writes,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._sum_up)
            if writes
            else None,
            cleanup_tmp_directories=writes,
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, which is whole once it is finished."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Writes `state` (a pytree) and `meta` (JSON) as one checkpoint;
        a step that is there already stays.

        Returns once the arrays are copied; they are written while the caller goes on. Raises
        UserError where an earlier one or this one cannot be written, as on a full disk; older
        checkpoints stay as they were.
        """
        self.finish()
        if step == self.latest:
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._saving = step
        with self._told(), _aftermath_unheard():
            self._manager.save(step, args=items)

    def finish(self) -> None:
        """Waits until what was saved is on disk, and removes what it makes old. Raises UserError
        where it cannot be written; all that was there stays then."""
        if self._saving is not None:
            with self._told(), _aftermath_unheard():
                self._manager.wait_until_finished()
            self._saving = None
            for old in sorted(self._manager.all_steps())[: -self._keep]:
                self._manager.delete(old)

    def check(self) -> None:
        """Raises UserError where it is known already that what was saved cannot be written."""
        if self._saving is not None:
            with self._told(), _aftermath_unheard():
                self._manager.check_for_errors()

    def _sum_up(self) -> None:
        """Called by Orbax, on the first process, between the last byte and the renaming."""
        for folder in self.folder.glob(f"{self._saving}{_UNFINISHED}"):
            write_checksums(folder)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as in restore
            hosts.await_verdict(error)
            step, self._saving = self._saving, None
            _remove_for_good(self.folder, f"{step}{_UNFINISHED}")
            raise UserError(
                f"{self.folder}/{step}: cannot be written ({_cause(error)}); make room and start "
                "the same "
                "command again: it goes on from the last whole checkpoint"
            ) from error

    def restore(self, state: Any, mesh: Mesh, step: int | None = None) -> tuple[Any, dict]:
        """State and meta of a step (the latest by default), laid out on `mesh`.

        `state` gives structure, shapes and dtypes (arrays or ShapeDtypeStructs). Raises UserError
        where the checkpoint is missing, damaged, or of another shape.
        """
        step = self.latest if step is None else step
        if step is None:
            raise UserError(f"{self.folder}: no checkpoint here; run the stage first")
        places = shardings(state, mesh)
        abstract = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
        )
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
        )
        if damage := hosts.from_first(lambda: find_damage(self.folder / str(step))):
            raise UserError(f"{self.folder}/{step}: damaged ({damage}); {self._mend(step)}")
        try:
            with _aftermath_unheard():
                restored = self._manager.restore(step, args=items)
        except Exception as error:  # Orbax raises many kinds; a user needs one line
            message = f"{self.folder}/{step}: cannot be read ({_cause(error)}); {self._mend(step)}"
            raise UserError(message) from error
        return restored["state"], restored["meta"]

    def meta(self) -> dict:
        """Meta of the newest checkpoint, without its state.
        Raises UserError where it is missing or damaged."""
        step = self.latest
        if step is None:
            raise UserError(f"{self.folder}: no checkpoint here; run the stage first")
        try:
            with _aftermath_unheard():
                return self._manager.restore(
                    step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
                )["meta"]
        except Exception as error:  # as in restore
            message = f"{self.folder}/{step}: cannot be read ({_cause(error)}); {self._mend(step)}"
            raise UserError(message) from error

    def _mend(self, step: int) -> str:
        earlier = any(other < step for other in self._manager.all_steps())
        return (
            f"delete that folder to go on from an earlier checkpoint, or {self.mend}"
            if earlier
            else self.mend
        )

    def close(self) -> None:
        """Finishes what was saved. Raises UserError where it cannot be written."""
        try:
            self.finish()
        finally:
            self._manager.close()


def write_checksums(folder: Path) -> None:
    """Writes down size and SHA-256 of every file of a checkpoint, for `find_damage`."""
    files = {
        str(p.relative_to(folder)): p
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in (CHECKSUMS, _TIMES)
    }
    known = {name: [path.stat().st_size, file_digest(path)] for name, path in files.items()}
    write_whole(folder / CHECKSUMS, json.dumps(known, indent=1) + "\n")


def find_damage(folder: Path) -> str:
    """The first file of a checkpoint that is not as it was written, and how;
    empty where all are, or nothing is known (a checkpoint from elsewhere)."""
    if not (folder / CHECKSUMS).is_file():
        return ""
    try:
        known = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        whole = sum(size for size, _ in known.values()) <= HASHED_BYTES
        for name, (size, digest) in known.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes of {size}"
            if whole and file_digest(path) != digest:
                return f"{name} has other bytes than were written"
        if _TIMES not in known and not _holds_object(folder / _TIMES):
            return f"{_TIMES} is missing, or no JSON object"
    except (ValueError, TypeError, AttributeError):
        return f"{CHECKSUMS} is not JSON of the expected form"
    return ""


def _holds_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _aftermath_unheard() -> Iterator[None]:
    """Leaves out what follows the failure of a checkpoint, which itself is raised and told.

    Orbax then closes its event loop, and each array that is still under way prints a traceback:
    about the closed loop, or about its own reading having been broken off.

    After a failure the filter stays, for the stragglers report from threads of their own.
    """
    printed, unraisable = sys.excepthook, sys.unraisablehook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not _follows(error):
            printed(kind, error, trace)

    def other_hook(told: sys.UnraisableHookArgs) -> None:
        if not _follows(told.exc_value):
            unraisable(told)

    sys.excepthook, sys.unraisablehook = hook, other_hook
    yield
    sys.excepthook, sys.unraisablehook = printed, unraisable


def _remove_for_good(folder: Path, pattern: str) -> None:
    """Removes what is half-written, and again what stragglers make of it.

    After the first array has failed, Orbax still writes others, in threads that nobody can wait
    for, and those make their folders anew. So this ends once nothing has come back for `QUIET_S`,
    and after `PATIENCE_S` at the latest; what comes later goes with the next start.
    """
    end = time.monotonic() + PATIENCE_S
    quiet_since = time.monotonic()
    while (now := time.monotonic()) < end and now - quiet_since < QUIET_S:
        for half in folder.glob(pattern):
            shutil.rmtree(half, ignore_errors=True)
            quiet_since = time.monotonic()
        time.sleep(0.02)


def _follows(error: BaseException | None) -> bool:
    if isinstance(error, RuntimeError) and str(error) == "Event loop is closed":
        return True
    # A reader that is thrown away while it waits turns its GeneratorExit into this.
    broken_off = error is not None and isinstance(error.__context__, GeneratorExit)
    return broken_off and str(error).startswith("Encountered error while reading array index")


def _cause(error: Exception) -> str:
    """What the operating system said where it said something, otherwise the error's first line."""
    text = str(error).strip()
    if told := re.search(r": ([^:[\]]+) \[[^\]]*os_error_code=", text):
        return told[1]
    # TensorStore wraps its errors in several ways, and which write fails first is chance.
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if os.strerror(number) in text:
            return os.strerror(number)
    return (text.splitlines() or [type(error).__name__])[0][:200]
