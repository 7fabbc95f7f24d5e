"""The backend that programs are made for: the one at hand, or another that a plan compiles for."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_CHOSEN: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


def backend() -> str:
    """`cpu`, `gpu` or `tpu`: whoever chooses between two ways of computing the same asks here."""
    return _CHOSEN.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Programs that are traced inside are made for `platform`, whatever devices are at hand.

    Traces of another backend's programs are dropped on the way in and out, since JAX would take
    them for the same.
    """
    if platform == backend():
        yield
        return
    jax.clear_caches()
    token = _CHOSEN.set(platform)
    try:
        yield
    finally:
        _CHOSEN.reset(token)
        jax.clear_caches()
