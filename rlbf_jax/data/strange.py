"""Text of random pieces of a vocabulary, as suffixes look that were searched."""

from __future__ import annotations

import numpy as np

from rlbf_jax.tokenizers import Tokenizer

PIECES = 20
"""As many as searched suffixes have ids."""


def strange_text(tokenizer: Tokenizer, rng: np.random.Generator) -> str:
    """`PIECES` random ids of ordinary printable text, spelled."""
    controls = tokenizer.controls
    pieces: list[str] = []
    while len(pieces) < PIECES:
        token = int(rng.integers(tokenizer.vocab_size))
        if controls.first_id <= token < controls.end_id:
            continue
        piece = tokenizer.decode([token])
        if piece and piece.isascii() and piece.isprintable():
            pieces.append(piece)
    return "".join(pieces).strip()
