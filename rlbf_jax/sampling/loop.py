"""The decoding loop: one `lax.while_loop` over fixed-size buffers,
no Python and no host callback inside.

Each turn draws from the logits of the id fed last, records the draw, and feeds it at its position.
After a retraction that position lies further down: that is all there is to rewinding.

Three programs serve a list of requests: `begin` reads contexts, `enter` puts rows that follow them
into a batch, `go_on` decodes until enough rows are over.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh

from rlbf_jax.directives import EditRule, Semantics
from rlbf_jax.parallel.axes import constrain, traced_for
from rlbf_jax.parallel.tables import pick
from rlbf_jax.sampling import prefill
from rlbf_jax.sampling.distribution import draw, legal_logits
from rlbf_jax.sampling.program import Params, Program
from rlbf_jax.sampling.state import Batch, Contexts, Prefilled, SampleState, divided


def decode(
    program: Program,
    params: Params,
    rule: EditRule,
    semantics: Semantics,
    batch: Batch,
    state: SampleState,
    key: Array,
    one_hot: bool,
    enough: Array | int,
    turns: Array | int,
) -> SampleState:
    """Runs until `enough` rows are done, or for so many turns. `one_hot` chooses how cache slots
    are written (see `kv_cache.write`)."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch.id)

    def turn(state: SampleState) -> SampleState:
        edit, active = state.edit, ~state.done
        legal = rule.legal(edit, batch.limits)
        logits = legal_logits(rule, state.logits, legal, batch.control_bias, batch.temperature)
        logits = constrain(logits, "few_rows", "vocab")
        uniform = jax.vmap(lambda key, count: jax.random.uniform(jax.random.fold_in(key, count)))(
            keys, edit.emitted
        )
        drawn = draw(logits, batch.truncation, batch.temperature, uniform)
        # A row without a draw ends here, and the trace gets its mark: see `checks.check_drawn`.
        token = jnp.maximum(drawn, 0)
        logprob = pick(jax.nn.log_softmax(logits, axis=-1), token)

        here = (jnp.arange(state.trace.shape[1])[None] == edit.emitted[:, None]) & active[:, None]
        position = batch.prompt_length + rule.offset(edit, token, semantics)
        after = rule.step(edit, token)
        edit = jax.tree.map(lambda new, old: jnp.where(active, new, old), after, edit)
        stopped = (drawn < 0) | jnp.any(token[:, None] == batch.stop_ids, axis=-1)
        # Rows that are done feed on harmlessly at their last position;
        # nothing reads their cache again.
        hidden, cache = program.step(params, token, position, state.cache, one_hot)
        after_turn = SampleState(
            logits=program.unembed(params, hidden),
            cache=cache,
            edit=edit,
            done=state.done | stopped | (edit.emitted >= batch.limits.max_emitted),
            trace=jnp.where(here, drawn[:, None], state.trace),
            logprobs=jnp.where(here, logprob[:, None], state.logprobs),
        )
        return divided(after_turn)

    return jax.lax.while_loop(
        lambda at: (at[0] < turns) & (jnp.sum(at[1].done) < enough),
        lambda at: (at[0] + 1, turn(at[1])),
        (jnp.int32(0), state),
    )[1]


@partial(
    jax.jit,
    static_argnames=("program", "rule", "semantics", "capacity", "rewound", "int8_cache", "mesh"),
)
def begin(
    params: Params,
    contexts: Contexts,
    *,
    program: Program,
    rule: EditRule,
    semantics: Semantics,
    capacity: int,
    rewound: int,
    int8_cache: bool = False,
    mesh: AbstractMesh | None = None,
) -> Prefilled:
    """What rows that follow these contexts begin with: see `prefill.prefill`.

    `mesh`, here and below: that of the arguments, where there is more than one device.
    """
    return traced_for(mesh, prefill.prefill)(
        program, params, rule, semantics, contexts, capacity, rewound, int8_cache
    )


# Its arguments are not read, and yet say on which devices it is made.
@partial(jax.jit, static_argnames=("rows", "mesh"), keep_unused=True)
def idle(prefilled: Prefilled, *, rows: int, mesh: AbstractMesh | None = None) -> SampleState:
    """A batch whose rows are all idle."""
    return traced_for(mesh, prefill.idle)(prefilled, rows)


@partial(jax.jit, static_argnames=("in_place", "mesh"), donate_argnames=("state",))
def enter(
    state: SampleState,
    prefilled: Prefilled,
    source: Array,
    batch: Batch,
    *,
    in_place: bool,
    mesh: AbstractMesh | None = None,
) -> SampleState:
    """Rows begin anew, see `prefill.insert`; the old state is used up."""
    return traced_for(mesh, prefill.insert)(state, prefilled, source, batch, in_place)


@partial(
    jax.jit,
    static_argnames=("program", "rule", "semantics", "one_hot", "mesh"),
    donate_argnames=("state",),
)
def go_on(
    params: Params,
    batch: Batch,
    state: SampleState,
    key: Array,
    enough: Array | int,
    turns: Array | int,
    *,
    program: Program,
    rule: EditRule,
    semantics: Semantics,
    one_hot: bool,
    mesh: AbstractMesh | None = None,
) -> SampleState:
    """The state once `enough` rows are done, or so many turns later; the old one is used up."""
    return traced_for(mesh, decode)(
        program, params, rule, semantics, batch, state, key, one_hot, enough, turns
    )


def compilations() -> int:
    """Programs compiled so far, of all samplers."""
    programs: tuple[Any, ...] = (begin, idle, enter, go_on)
    return sum(program._cache_size() for program in programs)
