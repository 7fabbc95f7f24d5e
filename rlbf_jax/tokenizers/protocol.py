"""What models, samplers, builders and critics need of a tokenizer,
and the checks that every tokenizer makes."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Protocol

from rlbf_jax.directives import Controls
from rlbf_jax.errors import InputError


class Tokenizer(Protocol):
    """What models, samplers, builders and critics need of a tokenizer."""

    @property
    def pad_id(self) -> int: ...

    @property
    def bos_id(self) -> int: ...

    @property
    def eos_id(self) -> int:
        """The id that ends our own targets: end of turn where a chat template has one,
        else end of sequence."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a response, `eos_id` first."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids in all: template and control ids, and rows of the embedding
        that have no spelling, included."""
        ...

    @property
    def opening(self) -> tuple[int, ...]:
        """Ids before a text that is no turn of a conversation: beginning of sequence or nothing."""
        ...

    @property
    def controls(self) -> Controls:
        """Where control ids stand; `controls.rule(kind)` makes a rule of them."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, never a template or control id. Raises InputError for lone surrogates."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """A user's turn and the opening of the model's: the ids a response follows."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; template, control, pad, bos and eos ids vanish,
        invalid UTF-8 becomes U+FFFD."""
        ...

    def piece_bytes(self, token: int) -> bytes:
        """What one id adds to the UTF-8 text; `decode` joins these. See `StreamDecoder`."""
        ...

    def offsets(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Character span in `decode(ids)` of each id."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each id for display."""
        ...

    def name(self, token: int) -> str:
        """One id for display."""
        ...

    def digest(self) -> str:
        """SHA-256 (hex) of all that decides the ids."""
        ...

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the files that `load_tokenizer` reads."""
        ...


def check_text(text: str) -> None:
    """Raises InputError for lone surrogates, which no UTF-8 text can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start} is a lone surrogate ({text[error.start]!a}), which is not "
            "valid Unicode; "
            "decode the source with errors='replace'"
        ) from None


def check_categories(categories: Sequence[str], x_max: int) -> None:
    """Raises ValueError for names that are empty or not distinct, or an x_max below 1."""
    if (
        isinstance(categories, str)
        or len(set(categories)) != len(categories)
        or not all(categories)
    ):
        raise ValueError(f"categories must be distinct, non-empty names, not {categories!r}")
    if x_max < 1:
        raise ValueError(f"x_max is {x_max}, it must be at least 1")
