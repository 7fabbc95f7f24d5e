"""Attention of long rows, forward and backward:
the sweep over visible blocks against masks of whole key rows.

Command: python experiments/benchmarks/attention.py --json --repeats 5

The peer is what stood here before: one block of 1,024 queries after the other against all T keys
under a mask, each recomputed in the backward pass. 12 heads of 64, one row. `ours_bytes` and
`peer_bytes` are temporaries as compiled.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from common import arguments, compare, report

from rlbf_jax.directives import NEVER
from rlbf_jax.models.attention import Visibility, attend, attend_rows, can_attend

HEADS, SIZE, QUERIES = 12, 64, 1024


def masked(query, key, value, visibility, window, softcap):
    def block(start):
        part = jax.lax.dynamic_slice_in_dim(query, start, QUERIES, axis=2)
        return attend(part, key, value, can_attend(visibility, start, QUERIES, window), softcap)

    blocks = jax.lax.map(jax.checkpoint(block), jnp.arange(0, query.shape[2], QUERIES))
    return jnp.moveaxis(blocks, 0, 2).reshape(query.shape)


def retracted(time: int) -> Visibility:
    """Every 64 ids a directive takes back the 16 before it."""
    index = np.arange(time)
    died = np.where(index % 64 >= 48, index // 64 * 64 + 64, NEVER).astype(np.int32)
    position = (index - index // 64 * 16).astype(np.int32)
    return Visibility(jnp.asarray(position)[None], None, jnp.asarray(died)[None])


def case(
    name: str,
    time: int,
    visibility: Visibility,
    window: int | None,
    softcap: float | None,
    repeats: int,
) -> dict:
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, back = (jax.random.normal(k, (1, HEADS, time, SIZE)) for k in keys)

    def compiled(attention):
        def total(q, k, v):
            return jnp.sum(attention(q, k, v, visibility, window, softcap) * back)

        return (
            jax.jit(jax.grad(total, argnums=(0, 1, 2)))
            .lower(query * SIZE**-0.5, key, value)
            .compile()
        )

    ours, peer = compiled(attend_rows), compiled(masked)
    row = compare(
        f"{name}, {time} ids",
        lambda: ours(query * SIZE**-0.5, key, value),
        lambda: peer(query * SIZE**-0.5, key, value),
        "masked key rows",
        repeats,
    )
    sizes = {
        f"{n}_bytes": f.memory_analysis().temp_size_in_bytes
        for n, f in (("ours", ours), ("peer", peer))
    }
    return row | sizes


def cases(repeats: int) -> Iterator[dict]:
    for time in (2048, 4096):
        plain = Visibility(jnp.arange(time, dtype=jnp.int32)[None])
        yield case("causal", time, plain, None, None, repeats)
        yield case("window of 512", time, plain, 512, None, repeats)
        yield case("soft cap", time, plain, None, 50.0, repeats)
        yield case("lifetimes", time, retracted(time), None, None, repeats)


if __name__ == "__main__":
    args = arguments(__doc__)
    report(cases(args.repeats), args.json)
