"""What is wrong with a data file, and records as every kind of file gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlbf_jax.errors import InputError

Records = Iterator[tuple[int, "dict[str, Any] | str"]]
"""(line, record or the reason why there is none)."""


class DataError(InputError):
    """A data file that cannot be used as it is."""


class MalformedRow(DataError):
    """One row of a file cannot be used; with a quarantine file the others can."""
