"""Parquet files, read a batch of rows at a time."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pyarrow
from pyarrow import parquet

from rlbf_jax.data.sources.errors import DataError, Records

ROWS_AT_ONCE = 4096


def parquet_records(path: pathlib.Path) -> tuple[list[str], Records]:
    """Columns and records of a Parquet file; a record's line is its number, from 1.

    Raises DataError where the file is missing, damaged or none; later also while it is read.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None

    def records() -> Iterator[tuple[int, dict[str, Any] | str]]:
        number = 0
        try:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _damaged(path, error) from None

    return list(file.schema_arrow.names), records()


def _damaged(path: pathlib.Path, error: Exception) -> DataError:
    cause = (" ".join(str(error).split()) or type(error).__name__)[:200]
    return DataError(f"{path}: not a readable Parquet file ({cause}); write it again")
