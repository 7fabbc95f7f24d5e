"""Progress bars on long work: on a terminal only, and only on process 0."""

from __future__ import annotations

import sys

from tqdm import tqdm

from rlbf_jax.parallel import hosts


def progress(total: int, label: str, initial: int = 0) -> tqdm:
    """A tqdm bar, silent where stderr is not a terminal."""
    quiet = not sys.stderr.isatty() or not hosts.is_first()
    return tqdm(
        total=total, desc=label, initial=initial, disable=quiet, dynamic_ncols=True, leave=True
    )


def say(message: str) -> None:
    """One line for a person, on stderr, from process 0."""
    if hosts.is_first():
        tqdm.write(message, file=sys.stderr)
