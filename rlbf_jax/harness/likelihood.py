"""Log-likelihoods of continuations, for harnesses that score text:
one teacher-forced pass, no edits, no mask.

The distribution is the model's plain softmax over all ids, control ids included, as every harness
reads it. Texts hold no directives, so both semantics agree.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlbf_jax.errors import UserError
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import QUERY_BLOCK, Visibility
from rlbf_jax.models.config import ModelConfig, Positions
from rlbf_jax.parallel.tables import pick
from rlbf_jax.sampling.program import Hidden, Params, Program, as_program
from rlbf_jax.sampling.scoring import in_time_chunks

_LEAST_WIDTH = 32


class LogLikelihood(NamedTuple):
    """Of one continuation."""

    logprob: float
    """Nats."""
    is_greedy: bool
    """Every id is the likeliest one in its place."""


class _Row(NamedTuple):
    """What one pass reads: all requests that differ in their last id only."""

    inputs: tuple[int, ...]
    before: int
    """Ids of the continuation but the last."""
    requests: list[int]
    last: list[int]
    """The last id of each request."""


def log_likelihoods(
    model: ModelConfig | Program,
    params: Params,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int,
    max_length: int,
    vocab_size: int | None = None,
) -> list[LogLikelihood]:
    """Of each (context, continuation) pair of ids, in order.

    Choices of one question that are one id each share a pass.
    Rows are padded to few widths, so few programs compile.

    Args:
      max_length: most ids of a pass; longer contexts lose their beginning.
      vocab_size: how many of the model's ids the softmax is over; None: all.

    Raises:
      ValueError: an empty context or continuation, or a continuation longer than `max_length`.
      UserError: logits that are not finite.
    """
    program = as_program(model)
    results: list[LogLikelihood | None] = [None] * len(pairs)
    read = functools.partial(_read, program, params, vocab_size or program.vocab_size)
    for width, before, rows in _batches(program, _rows(pairs, max_length), batch_size):
        choices = _power(8, max(len(row.last) for row in rows))
        tokens = np.zeros((batch_size, width), np.int32)
        last, count = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.int32)
        choice = np.zeros((batch_size, choices), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row.inputs)] = row.inputs
            last[index], count[index] = len(row.inputs) - 1, row.before
            choice[index, : len(row.last)] = row.last
        total, greedy, logprobs, best = jax.device_get(read(before, tokens, last, count, choice))
        for index, row in enumerate(rows):
            for number, (request, token) in enumerate(zip(row.requests, row.last, strict=True)):
                value = float(total[index] + logprobs[index, number])
                if math.isnan(value):
                    raise UserError(
                        f"pair {request}: the model's logits are not finite; look for NaN or inf "
                        "in its parameters, or compute in float32"
                    )
                results[request] = LogLikelihood(
                    value, bool(greedy[index]) and int(best[index]) == token
                )
    return [found for found in results if found is not None]


def _rows(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int) -> list[_Row]:
    shared: dict[tuple[int, tuple[int, ...]], _Row] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise ValueError(
                f"pair {index}: the {'continuation' if context else 'context'} is empty"
            )
        if len(continuation) > max_length:
            raise ValueError(
                f"pair {index}: a continuation of {len(continuation)} ids exceeds max_length "
                f"{max_length}"
            )
        inputs = tuple([*context, *continuation][-(max_length + 1) :][:-1])
        before = len(continuation) - 1
        row = shared.setdefault((before, inputs), _Row(inputs, before, [], []))
        row.requests.append(index)
        row.last.append(continuation[-1])
    return list(shared.values())


def _batches(
    config: Positions, rows: Sequence[_Row], batch_size: int
) -> Iterator[tuple[int, int, list[_Row]]]:
    """(width, most ids before the last, rows) of every batch, the widest first:
    what does not fit fails at once."""
    groups: dict[tuple[int, int], list[_Row]] = defaultdict(list)
    for row in rows:
        groups[_width(config, len(row.inputs)), _power(8, row.before) if row.before else 0].append(
            row
        )
    for (width, before), group in sorted(groups.items(), reverse=True):
        for start in range(0, len(group), batch_size):
            yield width, min(before, width - 1), group[start : start + batch_size]


def _width(config: Positions, length: int) -> int:
    return transformer.padded_width(
        config, length, min(_power(2, length), QUERY_BLOCK), _LEAST_WIDTH
    )


def _power(base: int, count: int) -> int:
    """The least power of `base` that is at least `count`. Few sizes, few programs."""
    power = 1
    while power < count:
        power *= base
    return power


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _read(
    program: Program,
    params: Params,
    vocab_size: int,
    before: int,
    tokens: Array,
    last: Array,
    count: Array,
    choices: Array,
) -> tuple[Array, Array, Array, Array]:
    """Reads rows.

    Args:
      before: E, most ids of a continuation before its last.
      tokens: [B, T] int32, padded on the right.
      last: [B] the query of the last id.
      count: [B] ids before the last that count.
      choices: [B, C] last ids.

    Returns:
      Over the ids before the last: summed log-probability [B] and whether all are the likeliest
      [B]; at the last: log-probabilities of the choices [B, C] and the likeliest id [B].
    """
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = program.forward(params, tokens, Visibility(position))
    rows = jnp.arange(tokens.shape[0])[:, None]

    def logits_of(params: Params, states: Hidden) -> Array:
        return program.unembed(params, states)[..., :vocab_size]

    at_last = logits_of(params, jax.tree.map(lambda states: states[rows[:, 0], last], hidden))
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(at_last, axis=-1), choices, axis=1)
    best = jnp.argmax(at_last, axis=-1)
    if before == 0:
        return jnp.zeros(last.shape), jnp.ones(last.shape, bool), logprobs, best

    def read(params: Params, knobs: tuple, states: Hidden, targets: Array) -> tuple[Array, Array]:
        logits = logits_of(params, states)
        chosen = pick(jax.nn.log_softmax(logits, axis=-1), targets)
        return chosen, jnp.argmax(logits, axis=-1) == targets

    # Query c speaks of the id in column c + 1.
    column = last[:, None] - before + jnp.arange(before)
    counts = column >= (last - count)[:, None]
    column = jnp.maximum(column, 0)
    queries = jax.tree.map(lambda states: states[rows, column], hidden)
    columns = (queries, tokens[rows, column + 1])
    chosen, likeliest = in_time_chunks(read, params, (), columns, vocab_size)
    total = jnp.sum(jnp.where(counts, chosen, 0.0), axis=1)
    return total, jnp.all(likeliest | ~counts, axis=1), logprobs, best
