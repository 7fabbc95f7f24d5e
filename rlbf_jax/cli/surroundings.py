"""What a command finds around it: standard streams, and settings of JAX in the environment."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Mapping

from rlbf_jax.errors import UserError

_OFF = frozenset({"", "0", "f", "false", "n", "no", "off"})
_NUMBERS = {
    "JAX_ENABLE_X64": _OFF,
    "JAX_DEFAULT_DTYPE_BITS": frozenset({"", "32"}),
    "JAX_NUMPY_DTYPE_PROMOTION": frozenset({"", "standard"}),
    "JAX_NUMPY_RANK_PROMOTION": frozenset({"", "allow"}),
    "JAX_DEFAULT_PRNG_IMPL": frozenset({"", "threefry2x32"}),
    "JAX_DEBUG_NANS": _OFF,
    "JAX_DEBUG_INFS": _OFF,
}
"""Settings with which programs fail, or draw other ids from the same seed, and the values of them
that change nothing. Ids, positions and numbers are 32 bits wide; log-probabilities of ids that
nobody drew are NaN, and those of illegal ones -inf."""


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises UserError for a setting of JAX under which our programs do not hold."""
    for name, harmless in _NUMBERS.items():
        value = environment.get(name, "")
        if value.strip().lower() not in harmless:
            raise UserError(
                f"the environment sets {name}={value}, under which results would be others, or "
                f"none: unset {name}"
            )


def mend_streams() -> None:
    """Makes standard output and error able to take any text.

    A character that a terminal cannot show is written as an escape; a stream that is closed
    (cron, a daemon) loses what is written, and nothing else.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(ValueError):  # closed by whoever called us
                stream.reconfigure(errors="backslashreplace")
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")
