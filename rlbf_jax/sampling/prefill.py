"""Prompt and forced ids in one teacher-forced pass,
then a cache as if they had been fed one by one; and how rows of a running batch begin from it.

Forced ids may contain directives: the pass runs under their lifetimes, and every cache slot takes
the id that was written to it last.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from rlbf_jax.directives import EditRule, Semantics, layout
from rlbf_jax.models import kv_cache
from rlbf_jax.models.attention import Visibility
from rlbf_jax.sampling.program import Params, Program
from rlbf_jax.sampling.state import Batch, Contexts, Prefilled, SampleState, divided


def prefill(
    program: Program,
    params: Params,
    rule: EditRule,
    semantics: Semantics,
    contexts: Contexts,
    capacity: int,
    rewound: int,
    int8_cache: bool = False,
) -> Prefilled:
    """What rows that follow these contexts begin with.

    Args:
      contexts: U of them.
      capacity: S, ids of prompt and response that a row has room for.
      rewound: most ids a row may take back (sizes sliding-window rings), 0 under KEEP.
      int8_cache: whether keys and values are kept in a byte each.
    """
    context, prompt_length, length = contexts
    width = context.shape[1]
    time = jnp.arange(width, dtype=jnp.int32)[None]
    in_context = time < length[:, None]
    in_response = in_context & (time >= prompt_length[:, None])
    where = layout(rule, context, in_context.astype(jnp.int32), in_response, semantics)
    died = where.died if semantics is Semantics.REWIND else None
    hidden, pairs = program.forward(params, context, Visibility(where.position, None, died))

    last = length - 1
    ends = jax.tree.map(lambda states: jax.vmap(lambda h, i: h[i])(states, last), hidden)

    def at_last(x: Array) -> Array:
        return jnp.take_along_axis(x, last[:, None], axis=1)[:, 0]

    answered, final = at_last(in_response), at_last(context)
    before = jax.tree.map(at_last, where.before)
    edit = jax.tree.map(
        lambda new, old: jnp.where(answered, new, old), rule.step(before, final), before
    )
    cache = program.cache(pairs, where.position, length, capacity, rewound)
    source = prompt_length[:, None] + jnp.arange(capacity, dtype=jnp.int32)[None]
    is_forced = source < length[:, None]
    ids = jnp.take_along_axis(context, jnp.minimum(source, width - 1), axis=1)
    prefilled = Prefilled(
        logits=program.unembed(params, ends),
        cache=kv_cache.quantized(cache) if int8_cache else cache,
        edit=edit,
        trace=jnp.where(is_forced, ids, 0),
        logprobs=jnp.where(is_forced, jnp.nan, jnp.zeros(ids.shape, jnp.float32)),
        final=jnp.where(answered, final, -1),
    )
    return divided(prefilled)


def idle(shapes: Prefilled, rows: int) -> SampleState:
    """A batch of `rows` idle rows, for what has the shapes (and dtypes) of `shapes`."""
    empty = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), shapes)
    state = SampleState(
        logits=empty.logits,
        cache=empty.cache,
        edit=empty.edit,
        done=jnp.ones(rows, bool),
        trace=empty.trace,
        logprobs=empty.logprobs,
    )
    return divided(state)


def insert(
    state: SampleState, prefilled: Prefilled, source: Array, batch: Batch, in_place: bool
) -> SampleState:
    """Rows begin anew; the others are as they were.

    Args:
      source: [B] int32, the context that a row begins from, -1 for a row that goes on.
      batch: what the rows ask for from now on.
      in_place: new rows are written one by one into what is there, which costs what they hold. By
        default all rows are selected anew, which costs the whole cache, and needs no exchange where
        rows are divided among devices.
    """
    fresh = source >= 0
    at = jnp.maximum(source, 0)
    edit = jax.tree.map(lambda x: x[at], prefilled.edit)
    stopped = jnp.any(prefilled.final[at][:, None] == batch.stop_ids, axis=-1)
    over = stopped & (prefilled.final[at] >= 0) | (edit.emitted >= batch.limits.max_emitted)

    def chosen(new: Array, old: Array) -> Array:
        return jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    held = (state.logits, state.cache, state.trace, state.logprobs)
    given = (prefilled.logits, prefilled.cache, prefilled.trace, prefilled.logprobs)
    if in_place:
        slots = jnp.argsort(~fresh, stable=True)

        def put(number: Array, held):
            slot = slots[number]
            return jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new[at[slot]], slot, 0),
                held,
                given,
            )

        held = jax.lax.fori_loop(0, jnp.sum(fresh), put, held)
    else:
        held = jax.tree.map(lambda old, new: chosen(new[at], old), held, given)
    logits, cache, trace, logprobs = held
    entered = SampleState(
        logits=logits,
        cache=cache,
        edit=jax.tree.map(chosen, edit, state.edit),
        done=chosen(over, state.done),
        trace=trace,
        logprobs=logprobs,
    )
    return divided(entered)
