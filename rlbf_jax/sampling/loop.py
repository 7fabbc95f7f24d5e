"""The decoding loop: one `lax.while_loop` over fixed-size buffers,
no Python and no host callback inside.

Each turn draws from the logits of the id fed last, records the draw, and feeds it at its position.
After a retraction that position lies further down: that is all there is to rewinding.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from rlbf_jax.directives import EditRule, Semantics
from rlbf_jax.sampling.distribution import draw, legal_logits
from rlbf_jax.sampling.prefill import prefill
from rlbf_jax.sampling.program import Params, Program
from rlbf_jax.sampling.state import Batch, SampleState


def decode(
    program: Program,
    params: Params,
    rule: EditRule,
    semantics: Semantics,
    batch: Batch,
    state: SampleState,
    one_hot: bool = False,
    turns: int | None = None,
) -> SampleState:
    """Runs until every row is done, or for so many turns. `one_hot` chooses how cache slots are
    written (see `kv_cache.write`)."""

    def turn(state: SampleState) -> SampleState:
        edit, active = state.edit, ~state.done
        legal = rule.legal(edit, batch.limits)
        logits = legal_logits(rule, state.logits, legal, batch.control_bias, batch.temperature)
        uniform = jax.vmap(lambda key, count: jax.random.uniform(jax.random.fold_in(key, count)))(
            batch.key, edit.emitted
        )
        drawn = draw(logits, batch.truncation, batch.temperature, uniform)
        # A row without a draw ends here, and the trace gets its mark: see `checks.check_drawn`.
        token = jnp.maximum(drawn, 0)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=1)[
            :, 0
        ]

        here = (jnp.arange(state.trace.shape[1])[None] == edit.emitted[:, None]) & active[:, None]
        position = batch.prompt_length + rule.offset(edit, token, semantics)
        after = rule.step(edit, token)
        edit = jax.tree.map(lambda new, old: jnp.where(active, new, old), after, edit)
        stopped = (drawn < 0) | jnp.any(token[:, None] == batch.stop_ids, axis=-1)
        # Rows that are done feed on harmlessly at their last position;
        # nothing reads their cache again.
        hidden, cache = program.step(params, token, position, state.cache, one_hot)
        return SampleState(
            logits=program.unembed(params, hidden),
            cache=cache,
            edit=edit,
            done=state.done | stopped | (edit.emitted >= batch.limits.max_emitted),
            trace=jnp.where(here, drawn[:, None], state.trace),
            logprobs=jnp.where(here, logprob[:, None], state.logprobs),
        )

    if turns is None:
        return jax.lax.while_loop(lambda s: ~jnp.all(s.done), turn, state)
    return jax.lax.while_loop(
        lambda at: (at[0] < turns) & ~jnp.all(at[1].done),
        lambda at: (at[0] + 1, turn(at[1])),
        (jnp.int32(0), state),
    )[1]


@partial(jax.jit, static_argnames=("program", "rule", "semantics", "room", "rewound", "one_hot"))
def generate(
    params: Params,
    batch: Batch,
    *,
    program: Program,
    rule: EditRule,
    semantics: Semantics,
    room: int,
    rewound: int,
    one_hot: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prefill and decode in one program.

    Returns:
      trace [B, E] int32, logprobs [B, E] float32, emitted [B] int32. Where logits gave no id, the
      trace ends with `distribution.NOT_FINITE` or `NONE_LEGAL`.
    """
    state = prefill(program, params, rule, semantics, batch, room, rewound)
    state = decode(program, params, rule, semantics, batch, state, one_hot)
    return state.trace, state.logprobs, state.edit.emitted


# In pieces, for rows that may end between them ----------------------------------------------------


@partial(jax.jit, static_argnames=("program", "rule", "semantics", "room", "rewound"))
def begin(
    params: Params,
    batch: Batch,
    *,
    program: Program,
    rule: EditRule,
    semantics: Semantics,
    room: int,
    rewound: int,
) -> SampleState:
    """The state after the prefill."""
    return prefill(program, params, rule, semantics, batch, room, rewound)


@partial(
    jax.jit,
    static_argnames=("program", "rule", "semantics", "one_hot", "turns"),
    donate_argnames=("state",),
)
def go_on(
    params: Params,
    batch: Batch,
    state: SampleState,
    *,
    program: Program,
    rule: EditRule,
    semantics: Semantics,
    one_hot: bool,
    turns: int,
) -> SampleState:
    """The state some turns later; the old one is used up."""
    return decode(program, params, rule, semantics, batch, state, one_hot, turns)
