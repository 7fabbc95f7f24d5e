"""Data sets that TFDS has prepared, as tables of prompts and answers: `tfds:NAME[/CONFIG][:SPLIT]`,
or the folder that holds `dataset_info.json`."""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlbf_jax.data.sources.errors import DataError, Records
from rlbf_jax.storage import file_digest

INFO = "dataset_info.json"
ROWS_AT_ONCE = 4096
_NAME = re.compile(r"tfds:(?P<name>\w+(?:/[\w.-]+)*)(?::(?P<split>\w+))?")


def is_tfds(path: pathlib.Path) -> bool:
    """Whether a path names a data set of TFDS."""
    return str(path).startswith("tfds:") or (path / INFO).is_file()


def tfds_records(path: pathlib.Path) -> tuple[list[str], Records]:
    """Columns and records of a data set; a record's line is its number, from 1.

    Raises DataError where it is not prepared here, in another format than array_record, has no such
    split, or is damaged; later also while it is read.
    """
    folder, split = _found(path)
    try:
        source = _builder(folder).as_data_source(split=split)
        columns = list(source.dataset_info.features)
    except Exception as error:
        # Of TFDS, protobuf and array_record, over anything that is wrong.
        raise _unreadable(path, error) from error

    def records() -> Iterator[tuple[int, dict[str, Any] | str]]:
        for start in range(0, len(source), ROWS_AT_ONCE):
            places = range(start, min(start + ROWS_AT_ONCE, len(source)))
            try:
                some = source.__getitems__(list(places))
            except Exception as error:
                raise _unreadable(path, error) from error
            for place, record in zip(places, some, strict=True):
                yield place + 1, {name: _plain(value) for name, value in record.items()}

    return columns, records()


def tfds_digest(path: pathlib.Path) -> str:
    """SHA-256 (hex) of the files of a data set. Raises DataError where it is not prepared here."""
    folder, _ = _found(path)
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file():
            found.update(f"{file.name} {file_digest(file)}\n".encode())
    return found.hexdigest()


def _found(path: pathlib.Path) -> tuple[pathlib.Path, str]:
    """The folder of a data set, and the split."""
    split = ""
    if str(path).startswith("tfds:"):
        named = _NAME.fullmatch(str(path))
        if named is None:
            raise DataError(f"{path}: expected tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:SPLIT")
        split = named["split"] or ""
        try:
            import tensorflow_datasets as tfds

            folder = pathlib.Path(tfds.builder(named["name"], try_gcs=False).data_dir)
        except Exception as error:
            raise _unreadable(path, error) from error
    else:
        folder = path
    if not (folder / INFO).is_file():
        raise DataError(
            f"{path}: not prepared on this machine ({folder} has no {INFO}); prepare it with "
            "`tfds build --file_format=array_record`"
        )
    try:
        splits = list(_builder(folder).info.splits)
    except Exception as error:
        raise _unreadable(path, error) from error
    split = split or ("train" if len(splits) > 1 else splits[0])
    if split not in splits:
        raise DataError(f"{path}: has no split {split}; it has {', '.join(splits)}")
    return folder, split


def _builder(folder: pathlib.Path) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(str(folder))


def _plain(value: Any) -> Any:
    """A value as JSON would have it: texts of TFDS are bytes."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value


def _unreadable(path: pathlib.Path, error: Exception) -> DataError:
    told, _, _ = " ".join(str(error).split()).partition(" Available datasets:")
    cause = told[:200] or type(error).__name__
    return DataError(
        f"{path}: cannot be read as a data set of TFDS ({cause}); it must be prepared on this "
        "machine as array_record"
    )
