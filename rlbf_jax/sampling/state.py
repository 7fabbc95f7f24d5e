"""Arrays of the sampler: what a batch brings (`Batch`) and what the loop carries (`SampleState`).

Of a row with P prompt ids and F forced ids, after it emitted `e` ids in all:

    context  [ prompt P | forced F | padding ]           prefilled in one pass
    trace    [ forced F | drawn e - F | zeros ]          E wide, never shrinks
    cache    slot of an id = its position (mod slots)    under REWIND a retraction moves the cursor
                                                         back
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jax import Array

from rlbf_jax.directives import EditState, Limits
from rlbf_jax.sampling.distribution import Truncation


class Batch(NamedTuple):
    """One batch of requests as arrays. B rows, C context ids, E room for emitted ids, U contexts: B
    is a multiple of U, and every B / U neighbors share one."""

    context: Array
    """[U, C] int32: prompt ids, then forced ids, then zeros."""
    prompt_length: Array
    """[B] int32, >= 1."""
    context_length: Array
    """[B] int32: prompt and forced ids. Of neighbors that share a context the first one's counts,
    and the others are the same or idle."""
    key: Array
    """[B] typed PRNG keys, one a request."""
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
    """Of the program; a `KVCache` where it is a single decoder."""
    edit: EditState
    """[B] each. `edit.emitted` is also the row's draw counter, which never goes down."""
    done: Array
    """[B] bool."""
    trace: Array
    """[B, E] int32; a mark of `distribution` (below 0) where logits gave no id: the row ends."""
    logprobs: Array
    """[B, E] float32, NaN for forced ids."""
