"""The shape that all attacks share: behaviors in, attempts out.

An attempt is a request (prompt, forced ids, knobs) with a note of what was forced, so that metrics
can tell benign words from violating ones by id counts and nobody re-tokenizes anything.
"""

from __future__ import annotations

import dataclasses
import zlib

from rlbf_jax.data.schema import Prompt, Violation
from rlbf_jax.sampling.request import Request


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attacked (or plain) prompt. The forced ids are `prefix + bridge + span + tail`, in this
    order."""

    request: Request
    prompt: Prompt
    attack: str
    split: str = "all"
    """Form split of the forced span, or `all`."""
    num_prefix: int = 0
    """Forced ids of benign words before the bridge."""
    num_bridge: int = 0
    """Forced ids of the bridge or compliance opener."""
    num_span: int = 0
    """Forced ids of the (possibly cut) span: a violation, or a harmless one in a benign twin."""
    num_tail: int = 0
    """Forced ids after the span."""
    prefix: str = ""
    """Text of the prefix."""
    violation: Violation | None = None
    """The whole violation of which the span is (a beginning of); None in benign twins and unforced
    attempts."""
    by_construction: bool = False
    """A whole violation is forced: any model that cannot erase scores asr 1 here."""
    cell: tuple[tuple[str, int], ...] = ()
    """Names and lengths of a geometry, where an attack has several; each is measured apart."""


def unused_id(label: str, used: set[int]) -> int:
    """The id of an attempt's request: 31 bits, from the label alone but for the rare collision (the
    next one is taken).

    It is added to `used`."""
    id_ = zlib.crc32(label.encode()) & 0x7FFFFFFF
    while id_ in used:
        id_ = (id_ + 1) & 0x7FFFFFFF
    used.add(id_)
    return id_
