"""A GGUF file (llama.cpp's format): what it says, and its tensors, dequantized by the `gguf`
package (extra `[gguf]`).

Everything that reads checkpoints takes such a file in place of a folder: `models.weights.read`,
`models.config_of_gguf`, `tokenizers.of_gguf`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlbf_jax.errors import UserError

SUFFIX = ".gguf"
_MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether a checkpoint is such a file, by its name."""
    return path.suffix == SUFFIX


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file, not yet read."""

    name: str
    shape: tuple[int, ...]
    """Outermost axis first, as numpy has it: the file lists it the other way around."""
    kind: str
    """Of its numbers, as the format names them: F32, Q4_K, ..."""
    stored: Any
    """As the `gguf` package has it: a memory map of the file."""

    def read(self) -> np.ndarray:
        """[*shape] float32, dequantized by the `gguf` package."""
        from gguf import dequantize

        values = dequantize(self.stored.data, self.stored.tensor_type)
        return np.ascontiguousarray(values, np.float32).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """What a file says."""

    path: Path
    fields: Mapping[str, Any]
    """Texts, numbers, and lists of them, by their full names."""
    tensors: Mapping[str, GgufTensor]

    def field(self, name: str, default: Any = None) -> Any:
        """A field, or what it is taken for where the file does not have it."""
        return self.fields.get(name, default)

    def needs(self, name: str) -> Any:
        """A field. Raises UserError where the file does not have it."""
        if name not in self.fields:
            raise UserError(f"{self.path}: says nothing of {name}; convert the model again")
        return self.fields[name]

    @property
    def architecture(self) -> str:
        """As llama.cpp names it."""
        return str(self.needs("general.architecture"))

    def of_architecture(self, name: str, default: Any = None) -> Any:
        """A field of the architecture's own, as `llama.block_count`."""
        return self.field(f"{self.architecture}.{name}", default)

    def needs_own(self, name: str) -> Any:
        """The same; raises UserError where the file does not have it."""
        return self.needs(f"{self.architecture}.{name}")

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number of the architecture's own, alike in all layers. Raises UserError where it
        is not, or is missing and has no default."""
        value = self.of_architecture(name, default)
        if value is None:
            value = self.needs_own(name)
        if isinstance(value, list):
            if len(set(value)) != 1:
                full = f"{self.architecture}.{name}"
                raise UserError(f"{self.path}: {full} differs from layer to layer")
            value = value[0]
        return int(value)

    def token_id(self, role: str) -> int | None:
        """Of a token with a role: bos, eos, eot, eom, padding, unknown."""
        value = self.field(f"tokenizer.ggml.{role}_token_id")
        return None if value is None else int(value)


def open_gguf(path: Path) -> GgufFile:
    """What a file says; read once for as long as it stays as it is.

    Raises UserError where the `gguf` package is missing, or the file is, is damaged or one of
    several, or has numbers that the package cannot dequantize.
    """
    try:
        told = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a GGUF file") from error
    return _opened(path, told.st_size, told.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _opened(path: Path, size: int, changed: int) -> GgufFile:
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"{path}: GGUF files are read with the package gguf, which is missing; "
            "pip install 'rlbf_jax[gguf]'"
        ) from error
    with path.open("rb") as stream:
        if stream.read(4) != _MAGIC:
            raise UserError(f"{path}: not a GGUF file (it does not begin with GGUF)")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
        raise UserError(
            f"{path}: truncated or damaged ({type(error).__name__}: {error}); copy the file again"
        ) from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if (parts := int(fields.get("split.count", 0))) > 1:
        raise UserError(
            f"{path}: one of {parts} parts; join them with llama.cpp's gguf-split --merge"
        )
    tensors = {}
    for stored in reader.tensors:
        kind, shape = stored.tensor_type.name, tuple(int(n) for n in reversed(stored.shape))
        if not _can_dequantize(gguf, stored.tensor_type):
            raise UserError(
                f"{path}: tensor {stored.name} is {kind}, which the gguf package cannot dequantize"
            )
        tensors[stored.name] = GgufTensor(stored.name, shape, kind, stored)
    return GgufFile(path, fields, tensors)


def _can_dequantize(gguf: Any, kind: Any) -> bool:
    known = gguf.GGMLQuantizationType
    return kind in (known.F32, known.F16) or kind in gguf.quants._type_traits
