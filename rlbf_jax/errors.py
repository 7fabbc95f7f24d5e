"""Errors that are the user's to mend."""

from __future__ import annotations

import errno
import os
import traceback

_MENDS = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room in your quota",
    errno.EFBIG: "the disk, or a limit as `ulimit -f`, allows no file of this size",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose another place, or change its permissions",
    errno.EPERM: "choose another place, or change its permissions",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another place",
    errno.EEXIST: "a file is there, and a folder is expected; choose another place",
    errno.EISDIR: "this is a folder, a file is expected",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "allow more open files (`ulimit -n`)",
}
"""What a user can do about an error of the operating system."""
_NO_BACKEND = ("Unable to initialize backend", "Unknown backend", "No visible devices")
"""What JAX says where a device was asked for that is not there."""


class UserError(Exception):
    """Something the user asked for cannot be done.

    The message says what is wrong, what was expected and how to mend it; the command line prints it
    on one line, without a traceback, and exits with code 2.
    """


class InputError(UserError, ValueError):
    """A text, a request or a file that cannot be used as it is; says which part is wrong."""


class Preempted(Exception):
    """A run was asked to stop (SIGTERM, SIGINT) and saved its state;
    the same command goes on from there."""


def machine_error(error: BaseException) -> str:
    """One line for what the machine refuses (a file, or memory); empty for any other error:
    that is ours to mend."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"out of memory ({_beginning(error)}); use smaller batches, shorter rows or a smaller "
            "model"
        )
    if _misses_device(error):
        reason = f" ({_beginning(error)})" if str(error) else ""
        return (
            f"JAX finds no such device{reason}; JAX_PLATFORMS is "
            f"{os.environ.get('JAX_PLATFORMS', '')!r}: set it to cpu, or unset it, or install JAX "
            "for the device"
        )
    if not isinstance(error, OSError) or error.errno not in _MENDS:
        return ""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}; {_MENDS[error.errno]}, then start the same command again"


def _misses_device(error: BaseException) -> bool:
    """Whether JAX finds no device of the kind that it was told to use."""
    if isinstance(error, AssertionError):
        # Of platforms that it knows and has no plugin for it says nothing at all.
        frames = traceback.extract_tb(error.__traceback__)
        return bool(frames) and frames[-1].name == "backends"
    return any(words in str(error) for words in _NO_BACKEND)


def _beginning(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
