"""Rows on disk and batches: nothing lost, exact resume, parts of a batch, broken data refused."""

import json
import os
import sys

import numpy as np
import pytest

from rlbf_jax.data import datasets
from rlbf_jax.data.datasets import batches, content_hash, open_source, unpack_row, write_dataset
from rlbf_jax.data.sources.files import DataError

LENGTH = 12


def make_rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "tokens": rng.integers(0, 500, LENGTH).astype(np.int32),
            "segment": rng.integers(0, 4, LENGTH).astype(np.int32),
            "in_response": rng.random(LENGTH) < 0.5,
            "in_loss": rng.random(LENGTH) < 0.5,
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("d") / "rows"
    rows = make_rows(23)
    return folder, rows, write_dataset(folder, rows, "some_rows")


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
def test_rows_come_back_in_order(written, memory_bytes):
    folder, rows, _ = written
    source = open_source(folder, memory_bytes=memory_bytes)
    assert isinstance(source, datasets._InMemory) == bool(memory_bytes)
    assert len(source) == len(rows)
    for i, row in enumerate(rows):
        got = unpack_row(source[i]["row"])
        for name, array in row.items():
            assert got[name].dtype == array.dtype
            np.testing.assert_array_equal(got[name], array)


def test_hash_follows_content(written, tmp_path):
    folder, rows, digest = written
    assert content_hash(folder) == digest == write_dataset(tmp_path / "again", rows, "some_rows")
    assert write_dataset(tmp_path / "other", make_rows(23, seed=1), "some_rows") != digest
    assert write_dataset(tmp_path / "swapped", rows[::-1], "some_rows") != digest


def test_what_a_killed_writer_left_goes_away_with_the_next_one(tmp_path):
    left = tmp_path / ".rows-unfinished-abcdefgh"
    (left / "tfds").mkdir(parents=True)
    (tmp_path / ".rows").mkdir()
    write_dataset(tmp_path / "rows", make_rows(3))
    assert sorted(os.listdir(tmp_path)) == [".rows", "rows"]


def test_no_tensorflow(written):
    assert "tensorflow" not in sys.modules


def keys(batch):
    return [row.tobytes() for row in batch["tokens"]]


def test_epochs_cover_the_rows_in_new_orders(written):
    folder, rows, _ = written
    iterator = batches(open_source(folder), 4, seed=3)
    epochs = [[k for _ in range(5) for k in keys(next(iterator))] for _ in range(3)]
    known = {row["tokens"].tobytes() for row in rows}
    assert all(len(set(e)) == 20 and set(e) <= known for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert keys(next(batches(open_source(folder), 4, seed=3))) == epochs[0][:4]
    assert keys(next(batches(open_source(folder), 4, seed=4))) != epochs[0][:4]


@pytest.mark.parametrize("stop", [0, 1, 5, 13])
def test_resume_is_exact(written, stop):
    source = open_source(written[0])
    first = batches(source, 4, seed=0)
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = batches(source, 4, seed=0)
    second.set_state(state)
    for _ in range(8):
        a, b = next(first), next(second)
        assert a.keys() == b.keys() == set(datasets.FIELDS)
        assert all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
def test_processes_read_their_places_of_one_common_batch(written, memory_bytes):
    source = open_source(written[0], memory_bytes=memory_bytes)
    whole = batches(source, 8, seed=0)
    parts = [(0, 1, 4, 5), (2, 3, 6, 7), (7,)]
    readers = [batches(source, 8, seed=0, here=part) for part in parts]
    for _ in range(5):
        wanted = next(whole)
        for part, reader in zip(parts, readers, strict=True):
            found = next(reader)
            for name, array in wanted.items():
                np.testing.assert_array_equal(found[name], array[list(part)])
    # The state is of the batches: another number of processes goes on from it.
    again = batches(source, 8, seed=0, here=(3,))
    again.set_state(readers[0].get_state())
    np.testing.assert_array_equal(next(again)["tokens"], next(whole)["tokens"][[3]])


def test_replaces_whole_or_not_at_all(written, tmp_path, monkeypatch):
    folder = tmp_path / "rows"
    digest = write_dataset(folder, make_rows(3), "r")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "_write_rows", fail)
        with pytest.raises(OSError, match="disk full"):
            write_dataset(folder, make_rows(5), "r")
    assert content_hash(folder) == digest and len(open_source(folder)) == 3
    write_dataset(folder, make_rows(5), "r")
    assert len(open_source(folder)) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


def test_refusals(written, tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        write_dataset(tmp_path / "a", [], "r")
    uneven = [*make_rows(1), {k: v[:-1] for k, v in make_rows(1)[0].items()}]
    with pytest.raises(ValueError, match="one length"):
        write_dataset(tmp_path / "a", uneven, "r")
    with pytest.raises(DataError, match="not a data set"):
        open_source(tmp_path)
    source = open_source(written[0])
    with pytest.raises(ValueError, match="do not fill a batch"):
        batches(source, 24, seed=0)
    with pytest.raises(ValueError, match="must lie in a batch of 2"):
        batches(source, 2, seed=0, here=(1, 2))
    with pytest.raises(ValueError, match="must lie in a batch of 2"):
        batches(source, 2, seed=0, here=())


def test_damage_is_found(tmp_path):
    folder = tmp_path / "rows"
    write_dataset(folder, make_rows(3), "r")
    content = json.loads((folder / "content.json").read_text())
    (folder / "content.json").write_text(json.dumps({**content, "sha256": "0" * 64}))
    with pytest.raises(DataError, match="do not match the hash"):
        open_source(folder)
    (folder / "content.json").write_text(json.dumps({**content, "rows": 4}))
    with pytest.raises(DataError, match="3 rows found, 4 written"):
        open_source(folder)
    (folder / "dataset_info.json").unlink()
    with pytest.raises(DataError, match="incomplete"):
        open_source(folder)
