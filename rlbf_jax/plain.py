"""Dataclasses <-> JSON: configurations as manifests hold them, and how two of them differ."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from rlbf_jax.storage import file_digest

DECIDES_NOTHING = {"decides_nothing": True}
"""Metadata of a field that no result depends on: `dataclasses.field(metadata=DECIDES_NOTHING)`.

A run may go on with another value, and a stage may be adopted by a run that has another."""

PATH = {"path": True}
"""Metadata of a field that names a file or a folder: another spelling of it is the same value."""

FLAT = {"flat": True}
"""Metadata of a field whose own fields stand beside it, in manifests and on the command line."""


def plain(value: Any, decisive: bool = False) -> Any:
    """A configuration as JSON.

    `decisive`: leave out what `DECIDES_NOTHING`, and say what a file holds in place of its path.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            if decisive and _decides_nothing(type(value), field):
                continue
            inner = plain(getattr(value, field.name), decisive)
            if decisive and field.metadata.get("path"):
                inner = _identity(inner)
            if field.metadata.get("flat"):
                found |= inner
            else:
                found[field.name] = inner
        return found
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): plain(v, decisive) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, decisive) for v in value]
    return value


def _identity(path: str) -> str:
    """What a file holds, as a hash; of anything else the path, in its plainest spelling."""
    if path and os.path.isfile(path):
        return f"sha256 {file_digest(path)}"
    return os.path.normpath(path) if path else ""


def same_path(a: Any, b: Any) -> bool:
    """Whether two values of a field of `PATH` name one file or folder, however they are spelled."""
    return isinstance(a, str) and isinstance(b, str) and os.path.realpath(a) == os.path.realpath(b)


def restore(kind: Any, stored: Any) -> Any:
    """The inverse of `plain`, by type hints; fields that are missing keep their defaults.

    Raises ValueError for a value of the wrong type, TypeError for a field
    without a default that is missing.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        values = {}
        for field in dataclasses.fields(kind):
            if field.metadata.get("flat"):
                values[field.name] = restore(hints[field.name], stored)
            elif field.name in stored:
                values[field.name] = restore(hints[field.name], stored[field.name])
        return kind(**values)
    if origin in (typing.Union, types.UnionType):
        if stored is None:
            return None
        return restore(next(arg for arg in args if arg is not type(None)), stored)
    if origin is tuple and isinstance(stored, list):
        return tuple(restore(args[0], value) for value in stored)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(stored)
    accepted = (int, float) if kind is float else kind
    if kind in (bool, int, float, str) and not isinstance(stored, accepted):
        raise ValueError(f"{stored!r} where {kind.__name__} is expected")
    return stored


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted names at which two plain configurations differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in sorted(old.keys() | new.keys()):
            dotted = f"{prefix}.{name}" if prefix else name
            found += differences(old.get(name), new.get(name), dotted)
        return found
    return [] if old == new else [(prefix, old, new)]


def digest(value: Any) -> str:
    """SHA-256 (hex) of plain JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def field_names(
    kind: type, prefix: str = "", *, decides_nothing: bool = False, paths: bool = False
) -> Iterator[str]:
    """Dotted names of all leaf fields of a configuration class, as `plain` nests them.

    `decides_nothing`: only those of `DECIDES_NOTHING`. `paths`: only those of `PATH`.
    """
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        dotted = prefix if field.metadata.get("flat") else f"{prefix}{field.name}."
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from field_names(inner, dotted, decides_nothing=decides_nothing, paths=paths)
        elif (not decides_nothing or _decides_nothing(kind, field)) and (
            not paths or field.metadata.get("path")
        ):
            yield dotted[:-1]


def _decides_nothing(kind: type, field: dataclasses.Field) -> bool:
    return bool(field.metadata.get("decides_nothing")) or field.name in getattr(
        kind, "DECIDE_NOTHING", ()
    )
