"""Rows on disk (array_record, written and described by TFDS, no TensorFlow)
and batches in memory (Grain)."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np
import tensorflow_datasets as tfds

from rlbf_jax.data.packing import Row
from rlbf_jax.data.sources.files import DataError
from rlbf_jax.storage import held, sweep_folders, sync_folder, sync_tree

FIELDS = ("tokens", "segment", "in_response", "in_loss")
CONTENT_FILE = "content.json"
MAX_SHARD_ROWS = 1 << 18
"""Rows of one file of a data set."""
ROWS_AT_ONCE = 1 << 12
"""Rows that TFDS is handed at a time; it writes its description anew each time."""


class Source(Protocol):
    """Random access to packed rows, int32 [4, T] in the order of FIELDS."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any) -> dict[str, np.ndarray]: ...


def _info(folder: pathlib.Path, name: str, length: int) -> tfds.core.DatasetInfo:
    """What TFDS writes beside the rows, for whoever reads them with it."""
    # One tensor a row: TFDS decodes every feature of every example by itself,
    # so four would cost four times that.
    shape, encoding = (len(FIELDS), length), tfds.features.Encoding.BYTES
    tensor = tfds.features.Tensor(shape=shape, dtype=np.int32, encoding=encoding)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=__name__
    )
    features = tfds.features.FeaturesDict({"row": tensor})
    return tfds.core.DatasetInfo(builder=identity, disable_shuffling=True, features=features)


def _write_rows(folder: pathlib.Path, rows: _Stacked, name: str) -> None:
    """Writes rows one after the other, without keeping them."""
    folder.mkdir()
    info = _info(folder, name, rows.length)
    writer = tfds.core.SequentialWriter(info, MAX_SHARD_ROWS, file_format="array_record")
    writer.initialize_splits(["train"])
    waiting = iter(rows)
    while some := list(itertools.islice(waiting, ROWS_AT_ONCE)):
        writer.add_examples({"train": [{"row": row} for row in some]})
    writer.close_all()


class _Stacked:
    """Rows as int32 [4, T], once; counts them and takes their hash as they pass.
    Raises ValueError where there are none."""

    def __init__(self, rows: Iterable[Row]):
        self._rows = map(_stack, rows)
        first = next(self._rows, None)
        if first is None:
            raise ValueError("there are no rows to write")
        self._first, self.length, self.count = first, first.shape[1], 0
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[np.ndarray]:
        for row in itertools.chain([self._first], self._rows):
            if row.shape[1] != self.length:
                lengths = sorted({self.length, row.shape[1]})
                raise ValueError(f"all rows must have one length, these have {lengths}")
            self.count += 1
            self.digest.update(_bytes(row))
            yield row


def _stack(row: Row) -> np.ndarray:
    return np.stack([row[field].astype(np.int32) for field in FIELDS])


def write_dataset(folder: str | pathlib.Path, rows: Iterable[Row], name: str = "rows") -> str:
    """Writes rows (see `packing`) of one length as they come, without keeping them; the folder
    appears only when it is whole.

    A folder that is there already is replaced.

    Returns:
        SHA-256 (hex) of the rows in order, also kept in `content.json`.

    Raises:
        ValueError: no rows, or rows of different lengths.
    """
    stacked = _Stacked(rows)
    folder = pathlib.Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-unfinished-"
    sweep_folders(folder.parent, prefix)  # of writers that were killed
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary)
        stack.enter_context(held(temporary))
        version = temporary / "rows"
        try:
            _write_rows(version, stacked, name)
        except RuntimeError as error:  # array_record tells of a full disk by a RuntimeError
            raise DataError(
                f"{folder}: cannot be written ({str(error)[:200]}); make room, then start again"
            ) from error
        digest = stacked.digest.hexdigest()
        counts = {"rows": stacked.count, "length": stacked.length}
        content = {"sha256": digest, **counts, "name": name}
        (version / CONTENT_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        sync_tree(version)
        if folder.exists():
            os.replace(folder, temporary / "old")
        os.replace(version, folder)
        sync_folder(folder.parent)
    return digest


def check_writable(folder: str | pathlib.Path) -> None:
    """Raises OSError where `write_dataset` could not write;
    to be asked before rows are made that it should write."""
    folder = pathlib.Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent):
        pass


class _InMemory:
    """Rows that were read once; reading a record at random costs a disk seek,
    a decompression and a parse."""

    def __init__(self, rows: np.ndarray):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return {"row": self._rows[index]}


def open_source(folder: str | pathlib.Path, *, memory_bytes: int = 1 << 30) -> Source:
    """Opens what `write_dataset` wrote.

    Args:
        memory_bytes: data sets up to this size are read into memory and checked against their hash;
            larger ones are read record by record, and only their number is checked.

    Raises:
        DataError: the folder is missing or incomplete, or its rows are not those that were hashed.
    """
    folder = pathlib.Path(folder)
    content = _content(folder)
    with _readable(folder):
        source = tfds.builder_from_directory(str(folder)).as_data_source(split="train")
        count = len(source)
    if count != content["rows"]:
        raise DataError(f"{folder}: {count} rows found, {content['rows']} written; build it again")
    shape = (count, len(FIELDS), content["length"])
    if 4 * int(np.prod(shape)) > memory_bytes:
        return source
    rows = np.empty(shape, np.int32)
    with _readable(folder):
        for start in range(0, count, 1024):
            stop = min(start + 1024, count)
            rows[start:stop] = [
                record["row"] for record in source.__getitems__(list(range(start, stop)))
            ]
    if _digest(rows) != content["sha256"]:
        raise DataError(
            f"{folder}: the rows do not match the hash in {CONTENT_FILE}; build it again"
        )
    return _InMemory(rows)


@contextlib.contextmanager
def _readable(folder: pathlib.Path) -> Iterator[None]:
    """Makes a DataError of whatever TFDS, protobuf and array_record raise over damaged files."""
    try:
        yield
    except Exception as error:
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{folder}: incomplete data set ({cause}); build it again") from error


def _content(folder: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / CONTENT_FILE).read_text(encoding="utf-8"))
        missing = [name for name in ("sha256", "rows", "length") if name not in content]
    except FileNotFoundError:
        raise DataError(
            f"{folder}: not a data set (no {CONTENT_FILE}); write_dataset makes one"
        ) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{folder / CONTENT_FILE}: not JSON ({error}); build the data set again"
        ) from error
    if missing:
        raise DataError(f"{folder / CONTENT_FILE}: has no {missing[0]}; build the data set again")
    return content


def content_hash(folder: str | pathlib.Path) -> str:
    """The SHA-256 that `write_dataset` returned."""
    return _content(pathlib.Path(folder))["sha256"]


def unpack_row(packed: np.ndarray) -> Row:
    """int32 [..., 4, T] -> the arrays of a row (or a batch of them)."""
    tokens, segment, in_response, in_loss = np.moveaxis(packed, -2, 0)
    return {
        "tokens": tokens,
        "segment": segment,
        "in_response": in_response.astype(bool),
        "in_loss": in_loss.astype(bool),
    }


def batches(
    source: Source, batch_size: int, seed: int, here: Sequence[int] | None = None
) -> grain.DatasetIterator[Row]:
    """Batches without end, shuffled anew each epoch.

    The order depends on source, seed and batch size alone: an example has its place in it whichever
    process reads it. `get_state()` is small and JSON-able; `set_state` resumes exactly there, under
    another `here` as well.

    Args:
        batch_size: rows of a batch, over all processes.
        here: places in the batch of the rows that are read; None: all of them.

    Raises:
        ValueError: fewer rows than one batch needs, or a place that no batch has.
    """
    if len(source) < batch_size:
        raise ValueError(
            f"{len(source)} rows do not fill a batch of {batch_size}; add rows or shrink the batch"
        )
    places = np.arange(batch_size) if here is None else np.asarray(here, np.int64)
    if not len(places) or places.min() < 0 or places.max() >= batch_size:
        raise ValueError(f"places {places.tolist()} must lie in a batch of {batch_size}")
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    # Batches of indices rather than of rows: one gather a batch instead of a Python call a row.
    chosen = order.batch(batch_size, drop_remainder=True)
    rows = chosen.map(lambda indices: unpack_row(_gather(source, indices[places])))
    return iter(rows.repeat().to_iter_dataset(grain.ReadOptions(num_threads=1)))


def _gather(source: Source, indices: np.ndarray) -> np.ndarray:
    """int32 [B, 4, T]: the rows at these indices."""
    if isinstance(source, _InMemory):
        return source[indices]["row"]
    records = source.__getitems__(indices.tolist())  # type: ignore[attr-defined]
    return np.stack([record["row"] for record in records])


def _digest(rows: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_bytes(row))
    return digest.hexdigest()


def _bytes(row: np.ndarray) -> bytes:
    return np.ascontiguousarray(row, "<i4").tobytes()
