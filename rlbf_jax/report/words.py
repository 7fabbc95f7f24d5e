"""What the report says of each metric."""

from __future__ import annotations

from rlbf_jax.evaluation import columns

LONG_PREFIX = "suffix of an attack: only rows with a long benign prefix before the forced span."


def definitions() -> dict[str, str]:
    """name -> its definition, in the report's order."""
    return columns.definitions() | {"long_prefix": LONG_PREFIX}
