"""How many ids of a device have logits at a time: logits are read chunk by chunk, never kept."""

from __future__ import annotations

from rlbf_jax.parallel.axes import current_mesh, parts_of
from rlbf_jax.parallel.backend import backend

CPU_LOGITS, LOGITS = 1 << 21, 1 << 27
"""Logits (float32) of a chunk. On a CPU about what a cache holds; elsewhere half a gigabyte, with
which 1,024 ids of a vocabulary of 128,000 keep an accelerator's products busy."""
LEAST = 256
"""Fewest ids of a chunk, however large the vocabulary: products with fewer rows wait for the table.
A gradient through 1,024 ids takes, on two cores, 1.09 s at 16 ids a chunk and .47 to .52 s at 64 to
1,024 (vocabulary 32,000, width 256), and 6.6 s and 3.9 to 4.4 s (128,000)."""


def ids_at_once(vocab_size: int) -> int:
    """Ids of a device in a chunk of logits, of which `tensor` may divide each."""
    parts = parts_of("logits", vocab_size, current_mesh())
    logits = CPU_LOGITS if backend() == "cpu" else LOGITS
    return max(LEAST, logits * parts // vocab_size)
