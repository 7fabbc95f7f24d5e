"""Files that are replaced only when the new one is whole, folders that one process holds at a
time, and JSON that others wrote."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlbf_jax.errors import InputError

_TEMPORARY = re.compile(r"\.\d+-\d+\.tmp$")
"""Ends the names under which `write_whole` writes."""


def parse_json(content: str | bytes, where: str | Path, mend: str, strict: bool = False) -> Any:
    """Any JSON value. Raises InputError that names `where` and ends with how to `mend` it.

    `strict`: as programs outside of Python read it, without NaN and inf, and no name twice.
    """
    try:
        if strict:
            return json.loads(content, parse_constant=_no_number, object_pairs_hook=unique_fields)
        return json.loads(content)
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # of JSON, of UTF-8, or a number of thousands of digits
        reason = str(error)
    raise InputError(f"{where}: not JSON ({reason}); {mend}")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of `json.loads`. Raises ValueError for a name that occurs twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return made


def parse_object(
    content: str | bytes, where: str | Path, mend: str, strict: bool = False
) -> dict[str, Any]:
    """As `parse_json`, of an object alone."""
    found = parse_json(content, where, mend, strict)
    if not isinstance(found, dict):
        raise InputError(f"{where}: holds a {type(found).__name__}, expected an object; {mend}")
    return found


def file_digest(path: str | Path) -> str:
    """SHA-256 (hex) of a file, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes text (as UTF-8) or bytes beside `path`, puts them on disk, and moves them there;
    makes a missing folder.

    A kill leaves the old file as it was, and writers in other threads or processes do not meet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (
        BaseException
    ) as error:  # a full disk, above all: the half-written file would keep it full
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
    sync_folder(
        path.parent
    )  # the new name is on disk too, before whoever relies on it writes anything


def sync_folder(folder: Path) -> None:
    """Puts a folder's list of names on disk; a file's own sync does not."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(
            OSError
        ):  # some network file systems refuse, and keep names in order themselves
            os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Puts every file and name below `folder` on disk, for writers that do not do so themselves."""
    for place, _, names in os.walk(folder):
        for name in names:
            with open(Path(place) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


@contextlib.contextmanager
def held(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Keeps other processes' `held` out of `folder`; a kill lets go. Yields whether it is held.

    Args:
        wait: until the other process lets go; otherwise yields False at once.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks: its users must keep apart by themselves
            pass
        yield True
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Removes what killed writers left in `folder` and below: temporaries of `write_whole`.

    Only for whoever `held` the folder: it does not look whether a writer is still alive.
    """
    for place, _, names in os.walk(folder):
        for name in names:
            if _TEMPORARY.search(name):
                (Path(place) / name).unlink(missing_ok=True)


def sweep_folders(parent: Path, prefix: str) -> None:
    """Removes the folders `PREFIX...` in `parent` that no process has `held`."""
    for folder in [
        path for path in parent.iterdir() if path.name.startswith(prefix) and path.is_dir()
    ]:
        with held(folder, wait=False) as mine:
            if mine:
                shutil.rmtree(folder, ignore_errors=True)
