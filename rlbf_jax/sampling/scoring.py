"""The one function that reads log-probabilities of traces: ONE teacher-forced pass,
exact under either semantics.

The law of the sampler: for both semantics `score` gives, id by id,
the log-probabilities that the sampler recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float32, Int32

from rlbf_jax.directives import EditRule, EditState, Layout, Limits, Semantics, layout
from rlbf_jax.errors import InputError
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.transformer import ModelConfig
from rlbf_jax.parallel.axes import over_rows
from rlbf_jax.parallel.chunks import ids_at_once
from rlbf_jax.parallel.tables import pick
from rlbf_jax.sampling.batching import control_bias_of, limits_of
from rlbf_jax.sampling.distribution import legal_logits
from rlbf_jax.sampling.program import Hidden, Params, Program, as_program
from rlbf_jax.sampling.request import Generation


class Traces(NamedTuple):
    """A batch of emitted streams, with all that their legality and distribution
    depend on. B rows, T ids."""

    tokens: Int32[Array, "B T"]
    """Prompt, then the trace (forced ids first), then zeros."""
    prompt_length: Int32[Array, " B"]
    num_forced: Int32[Array, " B"]
    length: Int32[Array, " B"]
    """Prompt and emitted ids."""
    limits: Limits
    temperature: Float32[Array, " B"]
    control_bias: Float32[Array, "B controls"]

    @property
    def in_response(self) -> Bool[Array, "B T"]:
        """Emitted ids, forced ones included."""
        time = jnp.arange(self.tokens.shape[1])[None]
        return (time >= self.prompt_length[:, None]) & (time < self.length[:, None])

    @property
    def is_action(self) -> Bool[Array, "B T"]:
        """Ids the model drew itself. Prompt, forced and padding ids are not actions,
        retracted ids are."""
        time = jnp.arange(self.tokens.shape[1])[None]
        return self.in_response & (time >= (self.prompt_length + self.num_forced)[:, None])


class Scores(NamedTuple):
    """[B, T] each; column t speaks of the id in column t, seen from the query
    before it. Column 0 is 0."""

    logprobs: Float32[Array, "B T"]
    """Under mask, bias and temperature."""
    entropy: Float32[Array, "B T"]
    """Nats, of the same distribution."""


def pack_traces(generations: Sequence[Generation], rule: EditRule, length: int) -> Traces:
    """Arrays of finished generations, `length` ids wide. Raises ValueError if one does not fit."""
    knobs = [g.request.knobs for g in generations]
    tokens = np.zeros((len(generations), length), np.int32)
    ends = np.zeros(len(generations), np.int32)
    for row, g in enumerate(generations):
        ids = np.concatenate([g.prompt_ids, g.trace])
        if len(ids) > length:
            raise InputError(
                f"trace {row} has {len(ids)} ids with its prompt, a row holds {length} (in a run, "
                "max_prompt + "
                "rollout_tokens); allow more, or shorten the prompts"
            )
        tokens[row, : len(ids)] = ids
        ends[row] = len(ids)
    return Traces(
        tokens=jnp.asarray(tokens),
        prompt_length=jnp.asarray([len(g.prompt_ids) for g in generations], jnp.int32),
        num_forced=jnp.asarray([g.num_forced for g in generations], jnp.int32),
        length=jnp.asarray(ends),
        limits=jax.tree.map(jnp.asarray, limits_of(knobs)),
        temperature=jnp.asarray([k.temperature for k in knobs], jnp.float32),
        control_bias=jnp.asarray(control_bias_of(rule, knobs)),
    )


def layout_of(rule: EditRule, traces: Traces, semantics: Semantics) -> Layout:
    """Positions and lifetimes of the ids of traces, one segment a row."""
    in_row = jnp.arange(traces.tokens.shape[1])[None] < traces.length[:, None]
    return layout(rule, traces.tokens, in_row.astype(jnp.int32), traces.in_response, semantics)


def hidden_states(
    model: ModelConfig | Program,
    params: Params,
    rule: EditRule,
    traces: Traces,
    semantics: Semantics,
) -> tuple[Hidden, Layout]:
    """Hidden states of every id of the traces ([B, T, D] of a single decoder), and their layout."""
    where = layout_of(rule, traces, semantics)
    died = where.died if semantics is Semantics.REWIND else None
    hidden, _ = as_program(model).forward(
        params, traces.tokens, Visibility(where.position, None, died)
    )
    return hidden, where


def token_scores(
    model: ModelConfig | Program,
    params: Params,
    rule: EditRule,
    traces: Traces,
    hidden: Hidden,
    before: EditState,
    drawn: int | None = None,
) -> Scores:
    """Log-probability and entropy of every emitted id, without a [B, T, V] array
    when that would be large.

    `drawn`: read only the ids the model drew itself, of which no row has more than this (static);
    forced ids get 0. Most columns of an attacked rollout are prompt and forced ids, and their
    logits are the dearest part of a pass.
    """

    def local(params: Params, rows: tuple) -> tuple[Scores, tuple]:
        return _token_scores(as_program(model), params, rule, rows, drawn), ()

    return over_rows(local, params, (traces, hidden, before))[0]


def _token_scores(
    program: Program, params: Params, rule: EditRule, of: tuple, drawn: int | None
) -> Scores:
    """`token_scores` of a device's own rows: (traces, hidden, before)."""
    traces, hidden, before = of

    def read(
        params: Params, knobs: tuple, hidden: Hidden, targets: Array, before: EditState
    ) -> Scores:
        limits, control_bias, temperature = jax.tree.map(lambda x: x[:, None], knobs)
        logits = legal_logits(
            rule,
            program.unembed(params, hidden),
            rule.legal(before, limits),
            control_bias,
            temperature,
        )
        logp = jax.nn.log_softmax(logits, axis=-1)
        chosen = pick(logp, targets)
        finite = jnp.where(jnp.isfinite(logp), logp, 0.0)
        return Scores(chosen, -jnp.sum(jnp.exp(logp) * finite, axis=-1))

    # Queries stand one column before the ids they predict.
    width = traces.tokens.shape[1]
    first = 1 if drawn is None else traces.prompt_length + traces.num_forced
    count = width - 1 if drawn is None else min(drawn, width - 1)
    column = jnp.minimum(
        jnp.broadcast_to(first, traces.length.shape)[:, None] + jnp.arange(count), width - 1
    )

    def at(x: Array, index: Array) -> Array:
        return jax.vmap(lambda row, i: row[i])(x, index)

    states = jax.tree.map(lambda x: at(x, column), before)
    queries = jax.tree.map(lambda x: at(x, column - 1), hidden)
    knobs = (traces.limits, traces.control_bias, traces.temperature)
    columns = (queries, at(traces.tokens, column), states)
    scores = in_time_chunks(read, params, knobs, columns, program.vocab_size)
    counts = traces.in_response if drawn is None else traces.is_action
    rows = jnp.arange(column.shape[0])[:, None]
    placed = jax.tree.map(
        lambda x: jnp.zeros(counts.shape, x.dtype).at[rows, column].set(x), scores
    )
    return jax.tree.map(lambda x: jnp.where(counts, x, 0.0), placed)


def in_time_chunks(
    read: Callable[..., Any], params: Params, knobs: Any, columns: tuple, vocab_size: int
) -> Any:
    """`read(params, knobs, *columns)` over [B, T, ...] columns, in time chunks of `ids_at_once`.

    Chunks are recomputed in the backward pass, so their logits are never kept; the gradient of
    `params` is exchanged between devices once.

    Args:
      knobs: a pytree with rows in front, the same at every time.
    """

    def local(params: Params, rows: tuple) -> tuple[Any, tuple]:
        knobs, columns = rows
        return _in_time_chunks(read, params, knobs, columns, vocab_size), ()

    return over_rows(local, params, (knobs, columns))[0]


def _in_time_chunks(read, params: Params, knobs, columns: tuple, vocab_size: int):
    batch, time = jax.tree.leaves(columns)[0].shape[:2]
    chunk = max(1, ids_at_once(vocab_size) // batch)
    if chunk >= time:
        return read(params, knobs, *columns)
    count = -(-time // chunk)
    width = count * chunk

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, width - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    again = jax.checkpoint(read)
    pieces = jax.lax.map(lambda piece: again(params, knobs, *piece), jax.tree.map(split, columns))
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, width, *x.shape[3:])[:, :time], pieces
    )


def score(
    model: ModelConfig | Program,
    params: Params,
    rule: EditRule,
    traces: Traces,
    semantics: Semantics,
    drawn: int | None = None,
) -> Scores:
    """Log-probabilities of traces in one pass: equal to what the sampler recorded,
    under the same semantics."""
    hidden, where = hidden_states(model, params, rule, traces, semantics)
    return token_scores(model, params, rule, traces, hidden, where.before, drawn)
