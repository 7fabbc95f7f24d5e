"""Where control ids go, rows for them, and streams that take text back."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.errors import InputError
from rlbf_jax.tokenizers import StreamDecoder
from rlbf_jax.tokenizers.added import AddedToken, Matcher
from rlbf_jax.tokenizers.controls import Placement, new_rows, place, with_names


def texts(*reserved: int, size: int = 20) -> dict[int, str]:
    return {i: f"<unused{i}>" if i in reserved else f"w{i}" for i in range(size)}


def test_the_end_of_the_last_long_run_of_spare_tokens_is_taken():
    assert place(texts(*range(2, 7), *range(9, 12)), 20, 3) == Placement(9, 3, "reserved", 20)
    assert place(texts(*range(2, 7), *range(9, 12)), 20, 4) == Placement(3, 4, "reserved", 20)
    assert place(texts(*range(2, 7)), 20, 3, taken=[6]) == Placement(3, 3, "reserved", 20)


def test_padding_rows_come_next_then_new_rows():
    assert place(texts(2, 3), 26, 6) == Placement(20, 6, "padding", 26)
    assert place(texts(2, 3), 26, 7) == Placement(26, 7, "appended", 33)
    assert place(texts(2, 3), 0, 7) == Placement(20, 7, "appended", 27)


@given(
    st.sets(st.integers(0, 19)), st.integers(0, 30), st.integers(1, 8), st.sets(st.integers(0, 19))
)
def test_placement_takes_only_what_is_free(reserved, rows, count, taken):
    spellings = texts(*reserved)
    placed = place(spellings, rows, count, taken)
    assert len(placed.ids) == count and placed.ids.stop <= placed.vocab_size >= max(rows, 20)
    assert all(i >= 20 or (i in reserved and i not in taken) for i in placed.ids)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_new_rows_are_the_mean_and_a_little_noise(dtype):
    rng = np.random.default_rng(0)
    old = (rng.standard_normal((3_000, 64)) * 3 + np.arange(64)).astype(dtype)
    old[10:20] = 1e4
    rows = new_rows(old, 200, seed=1, skip=range(10, 20), chunk=700)
    assert rows.shape == (200, 64) and rows.dtype == old.dtype
    known = np.delete(old.astype(np.float64), range(10, 20), 0)
    distance = (rows.astype(np.float64) - known.mean(0)) / known.std(0)
    assert abs(distance.mean()) < 0.01 and 0.08 < distance.std() < 0.12
    assert np.array_equal(rows, new_rows(old, 200, seed=1, skip=range(10, 20)))
    assert not np.array_equal(rows, new_rows(old, 200, seed=2, skip=range(10, 20)))
    with pytest.raises(ValueError, match="all 2 old rows are skipped"):
        new_rows(old[:2], 1, 0, skip=(0, 1))


def test_a_unigram_vocabulary_with_tokens_behind_it_is_refused():
    document = {"model": {"vocab": [["a", 0.0]]}, "added_tokens": [{"id": 1, "content": "<s>"}]}
    with pytest.raises(InputError, match="here: added tokens stand behind a Unigram vocabulary"):
        with_names(document, {2: " [RESET]"}, "here")
    made = with_names(document | {"added_tokens": []}, {2: " [RESET]"}, "here")
    assert made["model"]["vocab"] == [["a", 0.0], [" [UNUSED_1]", 0.0], [" [RESET]", 0.0]]


def split(matcher: Matcher, text: str, trusted: str | None = None) -> list:
    mask = None if trusted is None else bytes(c == "t" for c in trusted)
    return [part if isinstance(part, str) else part.id for _, part in matcher.split(text, mask)]


def test_guarded_tokens_count_in_trusted_text_only():
    matcher = Matcher(
        [AddedToken(0, "<a>"), AddedToken(1, "<a><b>"), AddedToken(2, "<")], frozenset({1})
    )
    assert split(matcher, "x<a><b>") == ["x", 0, 2, "b>"]
    assert split(matcher, "x<a><b>", "ttttttt") == ["x", 1]
    assert split(matcher, "x<a><b>", "tttuttt") == ["x", 0, 2, "b>"]
    assert split(matcher, "<a><b><a><b>", "uuuuuutttttt") == [0, 2, "b>", 1]


def test_flags_of_added_tokens():
    matcher = Matcher(
        [
            AddedToken(0, "<l>", lstrip=True),
            AddedToken(1, "<r>", rstrip=True),
            AddedToken(2, "word", single_word=True),
            AddedToken(3, "late", normalized=True),
        ],
        frozenset({0}),
    )
    assert split(matcher, "a  <l> b", "t" * 8) == ["a", 0, " b"]
    assert split(matcher, "a <r>  b") == ["a ", 1, "b"]
    assert split(matcher, "words a word.") == ["words a ", 2, "."]
    assert split(matcher, "late") == ["late"]
    assert [getattr(part, "id", part) for part in matcher.split_normalized("a late b")] == [
        "a ",
        3,
        " b",
    ]


class Bytes:
    """A tokenizer whose ids are bytes; from 256 on they vanish."""

    def piece_bytes(self, token):
        return bytes([token]) if token < 256 else b""

    def decode(self, ids):
        return b"".join(map(self.piece_bytes, ids)).decode(errors="replace")


ids = st.lists(
    st.one_of(
        st.sampled_from([0xE2, 0x96, 0x81, 0xF0, 0x9F, 0x98, 0x80, 0x41, 256]), st.integers(0, 256)
    )
)
steps = st.lists(st.one_of(ids, st.integers(0, 9)), max_size=6)


@given(steps)
def test_what_is_shown_after_retractions_is_the_decoding_of_what_is_left(steps):
    """Integers rewind, lists push; the reader deletes as many characters as `rewind` says."""
    stream, shown, left = StreamDecoder(Bytes()), "", []
    for step in steps:
        if isinstance(step, int):
            gone = stream.rewind(step)
            shown = shown[: len(shown) - gone]
            left = left[: max(0, len(left) - step)]
        else:
            shown += "".join(map(stream.push, step))
            left += step
        assert Bytes().decode(left).startswith(shown)
    assert shown + stream.flush() == Bytes().decode(left)


def test_no_code_point_is_split():
    stream = StreamDecoder(Bytes())
    assert [stream.push(byte) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert stream.rewind(1) == 1 and stream.push(0x81) == "\U0001f601"
    assert stream.rewind(99) == 2 and stream.push(0x41) == "A"
    stream.push(0xE2)
    assert stream.flush() == "\ufffd"
    with pytest.raises(ValueError, match="flushed"):
        stream.push(0x41)
    with pytest.raises(ValueError, match="flushed"):
        stream.rewind(1)
    with pytest.raises(ValueError, match="below 0"):
        StreamDecoder(Bytes()).rewind(-1)
