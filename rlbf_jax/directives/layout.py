"""Positions and lifetimes of every id of (packed) rows, for one teacher-forced pass."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int32

from rlbf_jax.directives.rule import NEVER, EditRule, EditState, Semantics


class Layout(NamedTuple):
    """Where every id of a batch of rows stands. Arrays are [B, T]; times are indices into T."""

    position: Int32[Array, "B T"]
    """int32: live ids before this one, prompt included, within its packing segment."""
    died: Int32[Array, "B T"]
    """int32: query i of the same segment sees key j iff j <= i < died[j]. NEVER if it stays."""
    erased: Int32[Array, "B T"]
    """int32: one past the retraction that removed this content id from the reader's view, whatever
    the semantics. NEVER for copies, which were not in view."""
    before: EditState
    """The state before each id, from which its legality follows. Zero outside responses."""


def layout(
    rule: EditRule,
    tokens: Int32[Array, "B T"],
    segment: Int32[Array, "B T"],
    in_response: Bool[Array, "B T"],
    semantics: Semantics,
) -> Layout:
    """Positions and lifetimes of rows that may pack several examples.

    Args:
      tokens: [B, T] int32, each segment a prompt followed by a response.
      segment: [B, T] int32, constant within an example, 0 for padding.
      in_response: [B, T] bool, true for emitted ids (forced ones included).
    """
    starts = jnp.concatenate(
        [jnp.ones_like(segment[:, :1], bool), segment[:, 1:] != segment[:, :-1]], 1
    )

    def advance(carry, column):
        state, prompt = carry
        token, start, responding = column
        fresh = rule.initial(token.shape)
        state = jax.tree.map(lambda zero, old: jnp.where(start, zero, old), fresh, state)
        prompt = jnp.where(start, 0, prompt)
        after = jax.tree.map(
            lambda new, old: jnp.where(responding, new, old), rule.step(state, token), state
        )

        def position(state: EditState, token: Array, semantics: Semantics) -> Array:
            return prompt + jnp.where(responding, rule.offset(state, token, semantics), 0)

        rewound = position(state, token, Semantics.REWIND)
        # Where a content id would stand; no control id is called `end_id`.
        content_next = position(after, jnp.full_like(token, rule.end_id), Semantics.REWIND)
        here = position(state, token, semantics)
        return (after, prompt + ~responding), (here, state, rewound, content_next)

    carry = (rule.initial(tokens.shape[:1]), jnp.zeros(tokens.shape[:1], jnp.int32))
    _, columns = jax.lax.scan(advance, carry, (tokens.T, starts.T, in_response.T))
    position, before, rewound, content_next = jax.tree.map(lambda x: x.T, columns)

    goes_on = jnp.concatenate(
        [in_response[:, 1:] & ~starts[:, 1:], jnp.zeros_like(in_response[:, :1])], 1
    )
    following = jnp.where(goes_on, jnp.roll(rewound, -1, axis=1), content_next)
    lifetime = jnp.where(
        in_response, _first_not_above(rewound, following, segment, in_response), NEVER
    )
    copy = before.pending & rule.copies
    shown_once = in_response & ~rule.is_control(tokens) & ~copy
    erased = jnp.where(shown_once, lifetime, NEVER)
    died = jnp.full_like(lifetime, NEVER) if semantics is Semantics.KEEP else lifetime
    return Layout(position, died, erased, before)


def _first_not_above(
    position: Array, following: Array, segment: Array, in_response: Array
) -> Array:
    """[B, T] int32: one past the first id, from j on, after which the response goes on at or below
    the position of j; NEVER where none.

    That is when j dies under REWIND, whatever the rule: an id lives as long as what follows stands
    above it. A cache slot is overwritten by the same arithmetic.

    One sweep from the end, which remembers for every position the first fall to it or below: memory
    is that of the rows, [B, T].
    """
    places = jnp.arange(position.shape[1], dtype=jnp.int32)
    ends = jnp.concatenate(
        [segment[:, 1:] != segment[:, :-1], jnp.ones_like(segment[:, :1], bool)], 1
    )

    def back(first, column):
        number, here, follows, responding, last = column
        first = jnp.where(last[:, None], NEVER, first)
        falls = responding[:, None] & (places[None] >= follows[:, None])
        first = jnp.where(falls, number + 1, first)
        return first, jnp.take_along_axis(first, here[:, None], axis=1)[:, 0]

    columns = (places, position.T, following.T, in_response.T, ends.T)
    return jax.lax.scan(back, jnp.full_like(position, NEVER), columns, reverse=True)[1].T
