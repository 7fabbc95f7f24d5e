"""The safetensors format: an 8-byte length, a JSON header, raw little-endian numbers.

Read with plain reads into memory that the caller owns, not through a memory map,
whose pages would count as resident memory; written with sorted names and a fixed header,
so that equal tensors are equal bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rlbf_jax.errors import UserError
from rlbf_jax.storage import parse_object

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_EXPONENTS = {
    "F32": (np.uint32, np.uint32(0x7F800000)),
    "F16": (np.uint16, np.uint16(0x7C00)),
    "BF16": (np.uint16, np.uint16(0x7F80)),
}
"""Words of a number's size and the bits of its exponent, which are all set in NaN and inf alone.
Several times as fast as `np.isfinite` on bfloat16."""
_LONGEST_HEADER = 100 << 20
_PIECE = 1 << 22
"""Numbers that are looked at together: what that takes counts against the memory of reading."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, not yet read."""

    file: Path
    name: str
    code: str
    """Of the dtype, as the format names it."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    size: int
    """Bytes."""

    @property
    def dtype(self) -> np.dtype:
        """Raises UserError for numbers that are not float32, float16 or bfloat16."""
        if self.code not in DTYPES:
            raise UserError(
                f"{self.file}: tensor {self.name} is {self.code}, expected one of "
                f"{', '.join(DTYPES)}; "
                "convert the checkpoint (quantized weights are not supported)"
            )
        return DTYPES[self.code]

    def read_into(self, target: np.ndarray) -> None:
        """Fills `target`, a contiguous array of `size` bytes."""
        view = target.reshape(-1).view(np.uint8).data
        done = 0
        with open(self.file, "rb", buffering=0) as file:
            while done < self.size:
                # One call reads at most 2 GiB.
                count = os.preadv(file.fileno(), [view[done : done + (1 << 30)]], self.start + done)
                if count == 0:
                    raise UserError(
                        f"{self.file}: ends within tensor {self.name}; copy the file again"
                    )
                done += count

    def read(self) -> np.ndarray:
        """The tensor, [*shape]."""
        array = np.empty(self.shape, self.dtype)
        if self.size:
            self.read_into(array)
        return array

    def equals(self, other: StoredTensor) -> bool:
        """Whether both hold the same bytes; read piece by piece."""
        if (self.code, self.shape) != (other.code, other.shape):
            return False
        with open(self.file, "rb") as ours, open(other.file, "rb") as theirs:
            ours.seek(self.start)
            theirs.seek(other.start)
            for begin in range(0, self.size, _PIECE):
                count = min(_PIECE, self.size - begin)
                if ours.read(count) != theirs.read(count):
                    return False
        return True

    def check_finite(self, values: np.ndarray) -> None:
        """Raises UserError where some of its values are not finite, and says how many."""
        words, exponent = _EXPONENTS[self.code]
        flat = values.reshape(-1).view(words)
        pieces = (flat[i : i + _PIECE] & exponent for i in range(0, flat.size, _PIECE))
        if bad := sum(int(np.count_nonzero(piece == exponent)) for piece in pieces):
            raise UserError(
                f"{self.file}: tensor {self.name} has {bad} values that are not finite (NaN or "
                "inf); the checkpoint is damaged, or was saved after training broke down"
            )


def open_tensors(file: Path) -> dict[str, StoredTensor]:
    """Header of a safetensors file. Raises UserError for a missing, damaged or truncated one."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                raise UserError(
                    f"{file}: truncated, or not a safetensors file ({size} bytes); copy the file "
                    "again"
                )
            text = stream.read(length)
    except OSError as error:
        raise UserError(
            f"{file}: {error.strerror}; expected a safetensors file of the checkpoint"
        ) from error
    header = parse_object(text, f"{file}: its header", "copy the file again", strict=True)
    notes = header.get("__metadata__", {})
    try:
        if not all(isinstance(value, str) for value in notes.values()):
            raise TypeError("__metadata__ holds what is no text")
        found = {
            name: _stored(file, name, told, 8 + length)
            for name, told in header.items()
            if name != "__metadata__"
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file}: its header is not that of a safetensors file ({error!r})"
        ) from error
    _check_bytes(file, found.values(), 8 + length, size)
    return found


def _check_bytes(file: Path, tensors: Iterable[StoredTensor], begin: int, size: int) -> None:
    """Every byte belongs to one tensor, as the safetensors library demands: no file has two
    readings. Raises UserError."""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start + tensor.size > size:
            raise UserError(
                f"{file}: truncated within tensor {tensor.name} ({size} bytes, expected at least "
                f"{tensor.start + tensor.size}); copy the file again"
            )
        if tensor.start != begin:
            what = "overlaps another" if tensor.start < begin else "leaves bytes before it unused"
            raise UserError(f"{file}: tensor {tensor.name} {what}; copy the file again")
        begin += tensor.size
    if begin != size:
        raise UserError(f"{file}: {size - begin} bytes behind the last tensor; copy the file again")


def _stored(file: Path, name: str, told: Mapping[str, Any], base: int) -> StoredTensor:
    (begin, end), shape, code = told["data_offsets"], told["shape"], told["dtype"]
    if not isinstance(code, str) or not all(type(n) is int for n in (begin, end, *shape)):
        raise ValueError(f"{name}: offsets and shape must be whole numbers, dtype a name")
    tensor = StoredTensor(file, name, code, tuple(shape), base + begin, end - begin)
    wide = DTYPES.get(tensor.code)
    if (
        min(begin, *shape, 0) < 0
        or end < begin
        or (wide is not None and math.prod(tensor.shape) * wide.itemsize != tensor.size)
    ):
        raise ValueError(
            f"{name}: {end - begin} bytes for shape {list(tensor.shape)} of {tensor.code}"
        )
    return tensor


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """One tensor that is made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(file: Path, tensors: list[TensorToWrite]) -> None:
    """Writes a safetensors file, one tensor in memory at a time;
    the file is there only when it is whole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                array = np.ascontiguousarray(tensor.make())
                stream.write(array.reshape(-1).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
