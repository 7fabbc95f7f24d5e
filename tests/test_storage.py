"""Files are whole or not there, leftovers of killed writers go away,
and one process at a time holds a folder."""

import os
import signal
import subprocess
import sys

import pytest

from rlbf_jax.storage import held, sweep, sweep_folders, write_whole


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    write_whole(path, "first é")
    assert path.read_text("utf-8") == "first é"

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_whole(path, b"second")
    assert path.read_text("utf-8") == "first é"
    assert os.listdir(path.parent) == ["file.json"]


def test_the_temporary_of_a_killed_writer_is_swept_and_nothing_else(tmp_path):
    program = (
        "import os, pathlib, signal, sys; from rlbf_jax import storage\n"
        "os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "storage.write_whole(pathlib.Path(sys.argv[1]), 'half')"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "in" / "file.json")])
    assert killed.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "in").iterdir()
    assert left.name.startswith("file.json.")
    mine = tmp_path / "in" / "notes.tmp"
    mine.write_text("a user's")
    sweep(tmp_path)
    assert list((tmp_path / "in").iterdir()) == [mine]


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    with held(tmp_path) as first, held(tmp_path, wait=False) as second:
        assert (first, second) == (True, False)
    with held(tmp_path, wait=False) as again:
        assert again


def test_only_folders_that_nobody_holds_are_swept(tmp_path):
    for name in (".set-unfinished-a", ".set-unfinished-b", ".settings"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with held(tmp_path / ".set-unfinished-a"):
        sweep_folders(tmp_path, ".set-unfinished-")
    assert sorted(os.listdir(tmp_path)) == [".set-unfinished-a", ".settings"]
