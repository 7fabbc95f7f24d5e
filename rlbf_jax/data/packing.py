"""Examples -> rows of fixed length: several examples a row, told apart by segment numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlbf_jax.data.schema import Example

Row = dict[str, np.ndarray]
"""tokens int32 [T], segment int32 [T] (1, 2, ...; 0 is padding),
in_response bool [T], in_loss bool [T]."""

_OPEN_ROWS = 256
"""Rows looked through for room; older ones are closed, which keeps packing linear
in the number of examples."""


def pack(examples: Sequence[Example], length: int) -> list[Row]:
    """Packs examples first-fit, in order, into rows of `length` ids.

    Raises:
        ValueError: an example is longer than a row; names its index. Nothing is ever cut.
    """
    _check(examples, length)
    bins: list[list[Example]] = []
    room = np.zeros(0, np.int64)
    for example in examples:
        size = len(example.tokens)
        first = max(0, len(bins) - _OPEN_ROWS)
        fits = np.flatnonzero(room[first:] >= size)
        if fits.size:
            index = first + int(fits[0])
            bins[index].append(example)
            room[index] -= size
        else:
            bins.append([example])
            if len(bins) > len(room):
                room = np.concatenate([room, np.full(max(64, len(room)), -1, np.int64)])
            room[len(bins) - 1] = length - size
    return [_row(group, length) for group in bins]


def pad_rows(examples: Sequence[Example], length: int) -> list[Row]:
    """One example a row, padded. Raises ValueError like `pack`."""
    _check(examples, length)
    return [_row([example], length) for example in examples]


def _check(examples: Sequence[Example], length: int) -> None:
    for index, example in enumerate(examples):
        if len(example.tokens) > length:
            raise ValueError(
                f"example {index} has {len(example.tokens)} ids, a row {length}; raise the row "
                "length or lower the "
                "builder's max_tokens"
            )


def _row(group: Sequence[Example], length: int) -> Row:
    row = {
        "tokens": np.zeros(length, np.int32),
        "segment": np.zeros(length, np.int32),
        "in_response": np.zeros(length, bool),
        "in_loss": np.zeros(length, bool),
    }
    start = 0
    for number, example in enumerate(group, 1):
        end = start + len(example.tokens)
        row["tokens"][start:end] = example.tokens
        row["segment"][start:end] = number
        row["in_response"][start + example.prompt_length : end] = True
        row["in_loss"][start:end] = example.in_loss
        start = end
    return row
