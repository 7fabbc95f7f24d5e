"""Text -> hashed TF-IDF features of word and character n-grams, in numpy.

Two blocks of buckets, one of word n-grams and one of the character n-grams within words
(a word's borders count as blanks). Buckets are CRC-32 of the n-gram, which is the same
on every machine and in every process. Every feature knows the words that it covers,
so a critic can ask what a text is without some of them.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
import zlib
from collections.abc import Sequence

import numpy as np

from rlbf_jax.ranges import check_between

WORD = re.compile(r"\w+(?:['’]\w+)*")
BLOCKS = 2
"""Word n-grams, character n-grams."""


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """Which n-grams are counted."""

    word_ngrams: tuple[int, int] = (1, 2)
    """Shortest and longest, in words."""
    char_ngrams: tuple[int, int] = (2, 5)
    """Shortest and longest, in characters of a word with a blank on either side."""
    bits: int = 18
    """Buckets of a block, as a power of two."""

    def __post_init__(self):
        check_between(self, 1, 24, "bits")
        for name in ("word_ngrams", "char_ngrams"):
            low, high = getattr(self, name)
            if not 1 <= low <= high <= 16:
                raise ValueError(
                    f"{name} is {low} {high}, expected two numbers 1 <= shortest <= longest <= 16"
                )

    @property
    def size(self) -> int:
        """Features in all."""
        return BLOCKS << self.bits


@dataclasses.dataclass(frozen=True)
class SparseRows:
    """Texts as sparse rows of sublinear term frequencies, 1 + ln(count)."""

    indptr: np.ndarray
    """int64 [N + 1]: the entries of row i are indptr[i] .. indptr[i + 1]."""
    ids: np.ndarray
    """int32 [nnz]: features, ascending within a row."""
    values: np.ndarray
    """float32 [nnz]"""

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def owner(self) -> np.ndarray:
        """int64 [nnz]: the row of each entry."""
        return np.repeat(np.arange(len(self)), np.diff(self.indptr))

    def take(self, rows: np.ndarray) -> SparseRows:
        """The given rows, in the given order."""
        lengths = np.diff(self.indptr)[rows]
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        entries = np.repeat(self.indptr[rows] - indptr[:-1], lengths) + np.arange(indptr[-1])
        return SparseRows(indptr, self.ids[entries], self.values[entries])


@dataclasses.dataclass(frozen=True)
class Occurrences:
    """Every n-gram of one text and the words it covers."""

    spans: tuple[tuple[int, int], ...]
    """(start, end) characters of each word."""
    ids: np.ndarray
    """int32 [k]: features, repeated as often as they occur."""
    first: np.ndarray
    """int64 [k]: first word of each."""
    last: np.ndarray
    """int64 [k]: last word of each."""


def occurrences(text: str, config: FeatureConfig) -> Occurrences:
    """The n-grams of a text, in any order. Letter case and compatibility forms
    (full-width letters) do not count."""
    matches = list(WORD.finditer(text))
    words = [_normal(match.group()) for match in matches]
    ids, first, last = [], [], []
    low, high = config.word_ngrams
    for n in range(low, min(high, len(words)) + 1):
        grams = [
            _bucket(" ".join(words[i : i + n]), config.bits) for i in range(len(words) - n + 1)
        ]
        ids.append(np.array(grams, np.int32))
        first.append(np.arange(len(grams)))
        last.append(np.arange(len(grams)) + n - 1)
    for i, word in enumerate(words):
        grams_of_word = _char_grams(word, *config.char_ngrams, config.bits)
        ids.append(grams_of_word)
        first.append(np.full(len(grams_of_word), i))
        last.append(first[-1])
    spans = tuple(match.span() for match in matches)
    if not ids:
        return Occurrences(
            spans, np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64)
        )
    return Occurrences(spans, np.concatenate(ids), np.concatenate(first), np.concatenate(last))


def sparse_rows(texts: Sequence[str], config: FeatureConfig) -> SparseRows:
    """Features of texts; a text without a word has an empty row."""
    ids, values, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)], [0]
    for text in texts:
        unique, counts = np.unique(occurrences(text, config).ids, return_counts=True)
        ids.append(unique)
        values.append(term_frequency(counts))
        lengths.append(len(unique))
    return SparseRows(
        np.cumsum(lengths, dtype=np.int64), np.concatenate(ids), np.concatenate(values)
    )


def term_frequency(counts: np.ndarray) -> np.ndarray:
    """float32 1 + ln(count), 0 where the count is 0."""
    return np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0).astype(np.float32)


def inverse_document_frequency(
    rows: SparseRows, config: FeatureConfig, min_rows: int
) -> np.ndarray:
    """float32 [F]: ln((1 + N) / (1 + df)) + 1 (scikit-learn's smooth variant);
    0 for what fewer rows have."""
    found = np.bincount(rows.ids, minlength=config.size)
    idf = np.log((1 + len(rows)) / (1 + found)) + 1
    return np.where(found >= max(1, min_rows), idf, 0).astype(np.float32)


def weighted(rows: SparseRows, idf: np.ndarray, config: FeatureConfig) -> SparseRows:
    """TF-IDF: unknown features (idf 0) left out, each block of a row scaled to length 1."""
    known = idf[rows.ids] > 0
    owner, ids = rows.owner[known], rows.ids[known]
    values = rows.values[known] * idf[ids]
    block = owner * BLOCKS + (ids >> config.bits)
    norms = np.sqrt(np.bincount(block, values.astype(np.float64) ** 2, len(rows) * BLOCKS))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(rows)))]).astype(
        np.int64
    )
    return SparseRows(indptr, ids, (values / norms[block]).astype(np.float32))


def _normal(word: str) -> str:
    return unicodedata.normalize("NFKC", word).lower().replace("’", "'")


def _bucket(gram: str, bits: int) -> int:
    return zlib.crc32(gram.encode("utf-8", "surrogatepass")) & ((1 << bits) - 1)


@functools.lru_cache(maxsize=1 << 16)
def _char_grams(word: str, low: int, high: int, bits: int) -> np.ndarray:
    """int32: features of the character n-grams of a word, in the second block."""
    padded = f" {word} "
    grams = [padded[i : i + n] for n in range(low, high + 1) for i in range(len(padded) - n + 1)]
    return np.array([_bucket(gram, bits) + (1 << bits) for gram in grams], np.int32)
