"""Rows of the tables (embedding, unembedding) that start anew
when a checkpoint gets control tokens."""

from __future__ import annotations

import dataclasses

import numpy as np

from rlbf_jax.errors import UserError
from rlbf_jax.tokenizers import FamilyTokenizer, new_rows

TABLES = ("embedding", "unembedding")


@dataclasses.dataclass(frozen=True)
class NewRows:
    """What becomes of a table while it is read: it grows to `vocab_size` rows,
    and those of `ids` start anew.

    They are the mean of the trained old rows and a little noise (`tokenizers.controls.new_rows`),
    as is every row behind the old ones.
    """

    vocab_size: int
    ids: tuple[int, ...]
    untrained: frozenset[int]
    """Old rows that stay out of the mean."""
    seed: int

    def fill(self, table: np.ndarray, old: int, name: str) -> None:
        """Sets the new rows of `table` [vocab_size, D],
        whose first `old` rows are the checkpoint's."""
        ids = sorted({*self.ids, *range(old, self.vocab_size)})
        if ids:
            seed = (self.seed, TABLES.index(name))
            # Small chunks: their float64 copies would count against the memory
            # that reading may take.
            table[ids] = new_rows(table[:old], len(ids), seed, skip=self.untrained, chunk=1024)


def rows_of(tokenizer: FamilyTokenizer, rows: int, seed: int, where: str) -> NewRows:
    """The new rows that a tokenizer with fresh control tokens needs in a checkpoint of `rows` rows.

    Raises UserError where the tokenizer has fewer ids than the checkpoint has rows.
    """
    if tokenizer.vocab_size < rows:
        raise UserError(
            f"{where}: vocab_size is {rows} in config.json, but the tokenizer has "
            f"{tokenizer.vocab_size}"
        )
    return NewRows(tokenizer.vocab_size, tuple(tokenizer.new_ids), tokenizer.untrained_ids, seed)
