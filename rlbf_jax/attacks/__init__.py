"""Attacks by name; `registry.py` holds the list."""

from rlbf_jax.attacks.registry import (
    ATTACKS,
    BENIGN,
    DRAWN,
    HAS_FORMS,
    SEARCHED,
    STANDARD,
    WHOLE,
    WORST_OF_N,
    spec_of,
)

__all__ = [
    "ATTACKS",
    "BENIGN",
    "DRAWN",
    "HAS_FORMS",
    "SEARCHED",
    "STANDARD",
    "WHOLE",
    "WORST_OF_N",
    "spec_of",
]
