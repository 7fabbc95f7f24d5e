"""Training, checkpoints and sampling of several processes against one with as many devices."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest

from rlbf_jax.training.journal import read_journal
from tests.multi_process.groups import started

CHILD = "tests/multi_process/training_child.py"


def train(folder: pathlib.Path, steps: int, count: int, data: int = 1) -> pathlib.Path:
    """The folder of a training on four devices, by one process or two."""
    argv = [CHILD, "--folder", str(folder), "--steps", str(steps), "--data", str(data)]
    with started(folder / "logs", argv, count, devices=4 // count) as group:
        for ended in group.ended():
            assert ended.code == 0, ended.log[-3000:]
            assert f"4 devices, {0 if count == 2 else ''}" in ended.log
    return folder


def outcome(folder: pathlib.Path) -> tuple[list[np.ndarray], list]:
    """(parameters and moments, what was sampled)."""
    with np.load(folder / "out.npz") as arrays:
        return list(arrays.values()), json.loads((folder / "out.json").read_text())


def check_same(found: pathlib.Path, wanted: pathlib.Path) -> None:
    arrays, said = outcome(found)
    expected, expected_said = outcome(wanted)
    assert said == expected_said
    for one, other in zip(arrays, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-5)
    rows = [read_journal(folder / "metrics.jsonl") for folder in (found, wanted)]
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys() and one["step"] == other["step"]
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-4)


@pytest.fixture(scope="module")
def of_one(tmp_path_factory) -> pathlib.Path:
    return train(tmp_path_factory.mktemp("one"), 6, count=1)


def begun(folder: pathlib.Path, count: int, steps: int = 4) -> pathlib.Path:
    """A training that stands after four steps: its checkpoint, and longer journals."""
    train(folder, steps, count)
    for name in ("out.npz", "out.json"):
        (folder / name).unlink()
    return folder


def test_begun_by_two_and_ended_by_one_it_is_the_same_training(of_one, tmp_path):
    folder = begun(tmp_path / "run", count=2)
    check_same(train(folder, 6, count=1), of_one)


@pytest.mark.slow
def test_begun_by_one_and_ended_by_two_it_is_the_same_training(of_one, tmp_path):
    folder = begun(tmp_path / "run", count=1)
    shutil.copytree(folder, tmp_path / "other")
    check_same(train(folder, 6, count=2), of_one)
    # Another mesh as well: whole copies a process, and parts between its devices.
    check_same(train(tmp_path / "other", 6, count=2, data=2), of_one)


@pytest.mark.slow
def test_two_processes_come_to_the_same_bytes_twice(tmp_path):
    first, second = (train(tmp_path / name, 6, count=2) for name in "ab")
    for one, other in zip(outcome(first)[0], outcome(second)[0], strict=True):
        np.testing.assert_array_equal(one, other)
    for name in ("metrics.jsonl", "out.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_another_training_is_told_apart(of_one, tmp_path):
    shutil.copytree(of_one, tmp_path / "other")
    with np.load(of_one / "out.npz") as arrays:
        changed = [x + 1e-3 for x in arrays.values()]
    np.savez(tmp_path / "other" / "out.npz", *changed)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_same(tmp_path / "other", of_one)
