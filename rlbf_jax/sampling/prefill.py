"""Prompt and forced ids in one teacher-forced pass,
then a cache as if they had been fed one by one.

Forced ids may contain directives: the pass runs under their lifetimes, and every cache slot takes
the id that was written to it last.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from rlbf_jax.directives import EditRule, Semantics, layout
from rlbf_jax.models.attention import Visibility
from rlbf_jax.sampling.program import Params, Program
from rlbf_jax.sampling.state import Batch, SampleState


def prefill(
    program: Program,
    params: Params,
    rule: EditRule,
    semantics: Semantics,
    batch: Batch,
    room: int,
    rewound: int,
) -> SampleState:
    """The state before the first free draw.

    Args:
      batch: B rows, U contexts of C ids.
      room: E, width of the trace.
      rewound: most ids a row may take back (sizes sliding-window rings), 0 under KEEP.
    """
    (contexts, width), rows = batch.context.shape, len(batch.prompt_length)
    # A context is read once for all rows that share it.
    prompt_length, length = (
        x[:: rows // contexts] for x in (batch.prompt_length, batch.context_length)
    )
    time = jnp.arange(width, dtype=jnp.int32)[None]
    in_context = time < length[:, None]
    in_response = in_context & (time >= prompt_length[:, None])
    segment = in_context.astype(jnp.int32)
    where = layout(rule, batch.context, segment, in_response, semantics)
    died = where.died if semantics is Semantics.REWIND else None
    hidden, pairs = program.forward(params, batch.context, Visibility(where.position, None, died))

    last = length - 1
    ends = jax.tree.map(lambda states: jax.vmap(lambda h, i: h[i])(states, last), hidden)
    logits = program.unembed(params, ends)

    def at_last(x: Array) -> Array:
        return jnp.take_along_axis(x, last[:, None], axis=1)[:, 0]

    before = jax.tree.map(at_last, where.before)
    edit = jax.tree.map(
        lambda new, old: jnp.where(at_last(in_response), new, old),
        rule.step(before, at_last(batch.context)),
        before,
    )
    trace, is_forced = _forced(batch.context, prompt_length, length, room)
    cache = program.cache(pairs, where.position, length, width + room, rewound)
    read = (logits, cache, edit, trace, is_forced, at_last(in_response), at_last(batch.context))
    if rows > contexts:
        read = jax.tree.map(lambda x: jnp.repeat(x, rows // contexts, axis=0), read)
    logits, cache, edit, trace, is_forced, answered, final = read
    stopped = answered & jnp.any(final[:, None] == batch.stop_ids, axis=-1)
    return SampleState(
        logits=logits,
        cache=cache,
        edit=edit,
        done=stopped | (edit.emitted >= batch.limits.max_emitted),
        trace=trace,
        logprobs=jnp.where(is_forced, jnp.nan, jnp.zeros((rows, room), jnp.float32)),
    )


def _forced(context: Array, prompt_length: Array, length: Array, room: int) -> tuple[Array, Array]:
    """(trace [U, E] that holds the forced ids and zeros, which of its ids are forced)."""
    width = context.shape[1]
    source = prompt_length[:, None] + jnp.arange(room, dtype=jnp.int32)[None]
    is_forced = source < length[:, None]
    ids = jnp.take_along_axis(context, jnp.minimum(source, width - 1), axis=1)
    return jnp.where(is_forced, ids, 0), is_forced
