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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rlbf_jax.errors import UserError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100 << 20


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
            header = json.loads(stream.read(length))
    except OSError as error:
        raise UserError(
            f"{file}: {error.strerror}; expected a safetensors file of the checkpoint"
        ) from error
    except ValueError as error:
        raise UserError(f"{file}: its header is not JSON ({error}); copy the file again") from error
    try:
        found = {
            name: _stored(file, name, told, 8 + length)
            for name, told in header.items()
            if name != "__metadata__"
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file}: its header is not that of a safetensors file ({error!r})"
        ) from error
    for tensor in found.values():
        if tensor.start + tensor.size > size:
            raise UserError(
                f"{file}: truncated within tensor {tensor.name} ({size} bytes, expected at least "
                f"{tensor.start + tensor.size}); copy the file again"
            )
    return found


def _stored(file: Path, name: str, told: Mapping[str, Any], base: int) -> StoredTensor:
    begin, end = (int(offset) for offset in told["data_offsets"])
    tensor = StoredTensor(
        file, name, str(told["dtype"]), tuple(map(int, told["shape"])), base + begin, end - begin
    )
    wide = DTYPES.get(tensor.code)
    if (
        begin < 0
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
