"""Positions and lifetimes of every id of (packed) rows, for one teacher-forced pass."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlbf_jax.directives.rule import NEVER, EditRule, EditState, Semantics


class Layout(NamedTuple):
    """Where every id of a batch of rows stands. Arrays are [B, T]; times are indices into T."""

    position: Array
    """int32: live ids before this one, prompt included, within its packing segment."""
    died: Array
    """int32: query i of the same segment sees key j iff j <= i < died[j]. NEVER if it stays."""
    erased: Array
    """int32: one past the retraction that removed this content id from the reader's view, whatever
    the semantics."""
    before: EditState
    """The state before each id, from which its legality follows. Zero outside responses."""


def layout(
    rule: EditRule, tokens: Array, segment: Array, in_response: Array, semantics: Semantics
) -> Layout:
    """Positions and lifetimes of rows that may pack several examples.

    Args:
      tokens: [B, T] int32, each segment a prompt followed by a response.
      segment: [B, T] int32, constant within an example, 0 for padding.
      in_response: [B, T] bool, true for emitted ids (forced ones included).
    """
    time = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    starts = jnp.concatenate(
        [jnp.ones_like(segment[:, :1], bool), segment[:, 1:] != segment[:, :-1]], 1
    )

    def advance(carry, column):
        state, prompt = carry
        token, start, responding = column
        fresh = rule.initial(token.shape)
        state = jax.tree.map(lambda zero, old: jnp.where(start, zero, old), fresh, state)
        prompt = jnp.where(start, 0, prompt)
        position = prompt + jnp.where(responding, rule.offset(state, token, semantics), 0)
        after = jax.tree.map(
            lambda new, old: jnp.where(responding, new, old), rule.step(state, token), state
        )
        return (after, prompt + ~responding), (position, state, after.visible)

    carry = (rule.initial(tokens.shape[:1]), jnp.zeros(tokens.shape[:1], jnp.int32))
    _, columns = jax.lax.scan(advance, carry, (tokens.T, starts.T, in_response.T))
    position, before, visible_after = jax.tree.map(lambda x: x.T, columns)

    retraction = in_response & rule.is_retraction(tokens)
    control = in_response & rule.is_control(tokens)
    content = in_response & ~control
    # Content id j falls at the first later retraction that leaves no more ids visible than stood
    # before j.
    falls = (
        (time[None, None, :] > time[None, :, None])
        & retraction[:, None, :]
        & (segment[:, None, :] == segment[:, :, None])
        & (visible_after[:, None, :] <= before.visible[:, :, None])
    )
    first = jnp.min(jnp.where(falls, time[None, None, :] + 1, NEVER), axis=-1)
    erased = jnp.where(content, first, NEVER)
    if semantics is Semantics.KEEP:
        return Layout(position, jnp.full_like(erased, NEVER), erased, before)
    closed = control & jnp.concatenate(
        [retraction[:, 1:] & ~starts[:, 1:], jnp.zeros_like(control[:, :1])], 1
    )
    closed &= rule.is_category(tokens)
    died = jnp.where(control, time[None] + 1 + closed, erased)
    return Layout(position, died, erased, before)
