"""Packing keeps every example whole and tells them apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.data.packing import pack, pad_rows
from rlbf_jax.data.schema import Example

LENGTH = 16


@st.composite
def example_lists(draw):
    sizes = draw(st.lists(st.integers(1, LENGTH), max_size=40))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return [
        Example(
            rng.integers(1, 50, n).astype(np.int32),
            int(rng.integers(0, n + 1)),
            rng.random(n) < 0.5,
        )
        for n in sizes
    ]


def unpack(rows):
    """(tokens, prompt length, in_loss) of each example, read back from rows."""
    for row in rows:
        for number in range(1, row["segment"].max() + 1):
            here = row["segment"] == number
            yield (
                tuple(row["tokens"][here]),
                int((~row["in_response"][here]).sum()),
                tuple(row["in_loss"][here]),
            )


def content(examples):
    return sorted((tuple(e.tokens), e.prompt_length, tuple(e.in_loss)) for e in examples)


@given(example_lists(), st.sampled_from([pack, pad_rows]))
def test_every_example_comes_back_whole(examples, method):
    rows = method(examples, LENGTH)
    assert sorted(unpack(rows)) == content(examples)
    for row in rows:
        padding = row["segment"] == 0
        assert not (
            row["tokens"][padding].any()
            or row["in_response"][padding].any()
            or row["in_loss"][padding].any()
        )
        used = LENGTH - padding.sum()
        assert not padding[:used].any() and (np.diff(row["segment"][:used]) >= 0).all()
        assert [row[k].dtype for k in ("tokens", "segment", "in_response", "in_loss")] == [
            np.int32,
            np.int32,
            bool,
            bool,
        ]


@given(example_lists())
def test_first_fit(examples):
    """A slow first-fit gives the same rows."""
    bins = []
    for e in examples:
        home = next(
            (b for b in bins if sum(len(x.tokens) for x in b) + len(e.tokens) <= LENGTH), None
        )
        if home is None:
            bins.append(home := [])
        home.append(e)
    rows = pack(examples, LENGTH)
    assert len(rows) == len(bins)
    for row, group in zip(rows, bins, strict=True):
        ids = np.concatenate([e.tokens for e in group])
        np.testing.assert_array_equal(row["tokens"][: len(ids)], ids)


def test_many_examples_fill_rows():
    ones = [Example(np.array([7], np.int32), 0, np.array([True]))] * 16_000
    assert len(pack(ones, LENGTH)) == 1000
    halves = [Example(np.full(9, i % 50 + 1, np.int32), 1, np.ones(9, bool)) for i in range(700)]
    assert len(pack([*halves, *ones[:700]], LENGTH)) == 700 + (700 - 256 * 7 > 0)


@pytest.mark.parametrize("method", [pack, pad_rows])
def test_too_long_is_refused_by_index(method):
    short, long = (Example(np.ones(n, np.int32), 1, np.ones(n, bool)) for n in (LENGTH, LENGTH + 1))
    with pytest.raises(ValueError, match=r"example 1 has 17 ids, a row 16"):
        method([short, long], LENGTH)
