"""Journals that a checkpoint can take back."""

import json

import pytest

from rlbf_jax.training.journal import Journal, read_journal


def test_rows_come_back_in_order_and_a_missing_file_is_empty(tmp_path):
    journal = Journal(tmp_path / "deep" / "rows.jsonl")
    journal.write({"step": 0, "text": "naïve"})
    journal.write_all({"step": i} for i in (1, 2))
    journal.close()
    assert read_journal(tmp_path / "deep" / "rows.jsonl") == [
        {"step": 0, "text": "naïve"},
        {"step": 1},
        {"step": 2},
    ]
    assert read_journal(tmp_path / "none.jsonl") == []


def test_reopening_at_an_offset_cuts_what_came_after_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    first = Journal(path)
    first.write({"step": 0})
    offset = first.sync()
    first.write_all({"step": i, "lost": True} for i in (1, 2))
    first.close()
    # A kill in the middle of a write leaves half a line, which the offset cuts too.
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "lo')
    again = Journal(path, offset)
    again.write({"step": 1})
    assert again.sync() == path.stat().st_size
    again.close()
    assert path.read_bytes() == b"".join(json.dumps({"step": i}).encode() + b"\n" for i in (0, 1))


def test_a_journal_shorter_than_its_checkpoint_says_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n")
    with pytest.raises(ValueError, match="rows.jsonl has 3 bytes, its checkpoint says 99"):
        Journal(path, 99)
