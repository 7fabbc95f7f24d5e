"""Checks of numbers in configurations; each names the field, its value and what was expected."""

from __future__ import annotations

import math
from typing import Any


def check_at_least(config: Any, least: float, *names: str) -> None:
    """Raises ValueError for the first of the named fields that is below `least`
    or not finite; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name} is {value}, expected {least} or more")


def check_between(config: Any, low: float, high: float, *names: str) -> None:
    """Raises ValueError for the first named field that lies outside low..high; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} is {value}, expected {low}..{high}")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError for the first of the named fields that is not a finite
    number above 0; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, expected more than 0")


def check_finite(config: Any, *names: str) -> None:
    """Raises ValueError for the first of the named fields that is infinite
    or not a number; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} is {value}, expected a finite number")
