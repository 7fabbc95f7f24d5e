"""Arrays of the sampler: what is prefilled (`Contexts`, `Prefilled`), what rows ask for (`Batch`)
and what the loop carries (`SampleState`).

Of a row with P prompt ids and F forced ids, after it emitted `e` ids in all:

    context  [ prompt P | forced F | padding ]           prefilled in one pass
    trace    [ forced F | drawn e - F | zeros ]          S wide, never shrinks
    cache    slot of an id = its position (mod slots)    under REWIND a retraction moves the cursor
                                                         back

Letters: B rows, U contexts of C ids, S ids of prompt and response together that a row has room for.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
from jax import Array

from rlbf_jax.directives import EditState, Limits
from rlbf_jax.models import kv_cache
from rlbf_jax.parallel.axes import constrain
from rlbf_jax.sampling.distribution import Truncation


class Contexts(NamedTuple):
    """What rows follow, each read once for however many of them."""

    context: Array
    """[U, C] int32: prompt ids, then forced ids, then zeros."""
    prompt_length: Array
    """[U] int32, >= 1."""
    length: Array
    """[U] int32: prompt and forced ids."""


class Prefilled(NamedTuple):
    """What a row begins with, one entry a context."""

    logits: Array
    """[U, V] float32 of the last id."""
    cache: Any
    """Of the program, with room for S ids; a `KVCache` where it is a single decoder."""
    edit: EditState
    """[U] each."""
    trace: Array
    """[U, S] int32: the forced ids, then zeros."""
    logprobs: Array
    """[U, S] float32: NaN for forced ids, then zeros."""
    final: Array
    """[U] int32: the last forced id, -1 where none was; it may end a response."""


class Batch(NamedTuple):
    """What the rows of a batch ask for."""

    prompt_length: Array
    """[B] int32, >= 1."""
    id: Array
    """[B] uint32: the key of a row is fold_in(key, id)."""
    limits: Limits
    temperature: Array
    """[B] float32."""
    truncation: Truncation
    control_bias: Array
    """[B, controls] float32."""
    stop_ids: Array
    """[B, n] int32, padded with -1."""


class SampleState(NamedTuple):
    """What the decoding loop carries; a pytree of fixed shapes."""

    logits: Array
    """[B, V] float32 of the last fed id: the next id is drawn from them."""
    cache: Any
    edit: EditState
    """[B] each. `edit.emitted` is also the row's draw counter, which never goes down."""
    done: Array
    """[B] bool: the response is over, or the row is idle."""
    trace: Array
    """[B, S] int32; a mark of `distribution` (below 0) where logits gave no id: the row ends."""
    logprobs: Array
    """[B, S] float32, NaN for forced ids."""


State = TypeVar("State", Prefilled, SampleState)


def divided(state: State) -> State:
    """Where the arrays live on a mesh: rows on their devices, keys and values by heads as well, and
    logits by ids, for a draw needs little of all of them."""

    def rows(x: Array) -> Array:
        return constrain(x, "rows", *[None] * (x.ndim - 1))

    return jax.tree.map(rows, state._replace(cache=()))._replace(
        cache=kv_cache.divided(state.cache), logits=constrain(state.logits, "few_rows", "vocab")
    )
