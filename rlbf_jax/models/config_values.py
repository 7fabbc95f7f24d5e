"""Values of a published config.json, checked as they are read:
one `UserError` that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlbf_jax.errors import UserError

MOST = 2**31 - 1
"""Of a count: ids, positions and shapes are int32."""
MOST_OF = {"num_layers": 1_000, "vocab_size": 2**24}
"""Of what is listed one by one: far more than any model has. Keys are fields of `ModelConfig`."""
LARGEST = 3.4e38
"""Of a number: what float32 holds."""


def count(
    hf: Mapping[str, Any], field: str, default: int | None = None, least: int = 1, most: int = MOST
) -> int:
    """A whole number; `default` where the field is missing or null. JSON's 16.0 is 16."""
    value = _given(hf, field, default)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most:
        if value == int(value):
            return int(value)
    raise _wrong(field, value, f"a whole number from {least} to {most}")


def positive(hf: Mapping[str, Any], field: str, default: float | None = None) -> float:
    """A finite number above 0; `default` where the field is missing or null."""
    value = _given(hf, field, default)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= LARGEST:
        return value
    raise _wrong(field, value, "a number above 0")


def positive_or_none(hf: Mapping[str, Any], field: str) -> float | None:
    return None if hf.get(field) is None else positive(hf, field)


def flag(hf: Mapping[str, Any], field: str) -> bool:
    value = hf.get(field, False)
    if not isinstance(value, bool):
        raise _wrong(field, value, "true or false")
    return value


def entries(hf: Mapping[str, Any], field: str, within: str = "") -> Mapping[str, Any]:
    """An object; empty where the field is missing or null. `within`: the object that holds it."""
    value = hf.get(field)
    if value is not None and not isinstance(value, Mapping):
        raise _wrong(within + field, value, "an object or null")
    return value or {}


def names(hf: Mapping[str, Any], field: str) -> list[str]:
    """A list of strings; empty where the field is missing or null."""
    value = hf.get(field)
    if value is not None and not (
        isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    ):
        raise _wrong(field, value, "a list of names")
    return value or []


def unsupported(field: str, value: Any, expected: str) -> UserError:
    return UserError(
        f"config.json: {field} is {value!r}, expected {expected}; this decoder computes nothing "
        "else"
    )


def _given(hf: Mapping[str, Any], field: str, default: Any) -> Any:
    value = hf.get(field)
    return default if value is None else value


def _wrong(field: str, value: Any, expected: str) -> UserError:
    return UserError(f"config.json: {field} is {value!r}, expected {expected}")
