"""The search itself, on the device: propose candidates, find their losses, keep one. GCG and random
search are two settings of it.

Every behavior has a `State` of its own; all functions that take stacked ones (first axis R) do one
behavior after another within one program. A mesh does different behaviors at a time; where there
are fewer behaviors than devices, several devices share a behavior and divide its candidates
(`search_mesh`). Randomness comes from the state's key and step alone, so that a search goes on from
a stored state as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlbf_jax.attacks.search.gcg_candidates import (
    Positions,
    best_ids,
    draw_positions,
    draw_ranks,
    replace,
)
from rlbf_jax.attacks.search.gcg_step import (
    Behavior,
    Objective,
    by_start,
    candidate_losses,
    prefix_of,
    suffix_gradient,
    suffix_losses,
)
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.prefixed import Prefix
from rlbf_jax.parallel.axes import names_of
from rlbf_jax.parallel.mesh import row_shards

BEHAVIORS, CANDIDATES = "behaviors", "candidates"
"""Axes of a search's mesh."""


@dataclasses.dataclass(frozen=True)
class Search:
    """How to look for a suffix. Hashable: a static argument of jitted functions."""

    model: ModelConfig
    """With unrolled layers."""
    objective: Objective
    steps: int
    width: int
    """Candidates a step."""
    topk: int
    """Ids a position may take: the best by gradient, or all allowed ones
    where candidates are random."""
    n_replace: int = 1
    positions: Positions = "uniform"
    proposal: Literal["gradient", "random"] = "gradient"
    accept: Literal["always", "improve", "anneal"] = "always"
    """What becomes of a step's best candidate, without a buffer: it is kept always,
    if it is better than the current suffix, or also with probability exp(-(loss - current) / T)
    where T falls from 1 to 0 over the steps."""
    buffer_size: int = 0
    """Above 0: so many suffixes are kept, a candidate enters if it beats the worst,
    and the search goes on from the best."""
    early_stop: bool = False
    chunk: int = 64
    shares: int = 1
    """Devices that divide a behavior's candidates: the length of the mesh axis CANDIDATES."""


class State(NamedTuple):
    """Where a search stands; S = max(1, buffer size)."""

    key: Array
    """[2] uint32 key data."""
    step: Array
    """int32: steps done."""
    ids: Array
    """[S, n] int32, by loss, the current suffix first."""
    loss: Array
    """[S] float32."""
    best_ids: Array
    """[n] int32: of the lowest loss seen, the start included."""
    best_loss: Array
    losses: Array
    """[steps] float32: lowest candidate loss of each step; +inf where all were
    filtered out, NaN not reached."""
    history: Array
    """[steps, n] int32: current suffix after each step."""
    stopped: Array
    """bool: some candidate had the whole target as its likeliest answer."""
    filtered: Array
    """int32: steps all of whose candidates were filtered out; the suffix stayed as it was."""
    evaluated: Array
    """int32: candidates whose loss was found."""


class Proposal(NamedTuple):
    """Candidates of one step."""

    candidates: Array
    """[width, n] int32."""
    first_change: Array
    """[width] int32."""
    current: Prefix | None
    """Keys and values of the current suffix, where a gradient was found."""


def step_keys(state: State) -> Array:
    """Keys of this step's positions, ranks and acceptance."""
    return jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step), 3)


def begin(
    search: Search, params: dict, behavior: Behavior, key: Array, suffixes: Array
) -> tuple[Prefix, State]:
    """The state before the first step, from `suffixes` [S, n]."""
    prefix = prefix_of(search.model, params, behavior)
    losses, _ = suffix_losses(search.model, params, search.objective, behavior, prefix, suffixes)
    losses = _agreed(search, losses)
    order = jnp.argsort(losses, stable=True)
    ids, losses, zero = suffixes[order], losses[order], jnp.int32(0)
    return prefix, State(
        key=jax.random.key_data(key),
        step=zero,
        ids=ids,
        loss=losses,
        best_ids=ids[0],
        best_loss=losses[0],
        losses=jnp.full(search.steps, jnp.nan),
        history=jnp.zeros((search.steps, ids.shape[1]), jnp.int32),
        stopped=jnp.asarray(False),
        filtered=zero,
        evaluated=zero,
    )


def propose(
    search: Search, params: dict, allowed: Array, behavior: Behavior, prefix: Prefix, state: State
) -> Proposal:
    """Candidates from the current suffix; `allowed` is [V] bool."""
    suffix = state.ids[0]
    key_position, key_rank, _ = step_keys(state)
    positions = draw_positions(
        key_position, search.positions, search.width, suffix.shape[0], search.n_replace
    )
    ranks = draw_ranks(key_rank, search.width, search.n_replace, search.topk)
    current = None
    if search.proposal == "gradient":
        _, gradient, current = suffix_gradient(
            search.model, params, search.objective, behavior, prefix, suffix
        )
        best = _agreed(search, best_ids(gradient, allowed, search.topk))
    else:
        every = jnp.nonzero(allowed, size=search.topk)[0].astype(jnp.int32)
        best = jnp.broadcast_to(every, (suffix.shape[0], search.topk))
    return Proposal(replace(suffix, best, positions, ranks), jnp.min(positions, axis=1), current)


def evaluate(
    search: Search,
    params: dict,
    behavior: Behavior,
    prefix: Prefix,
    state: State,
    proposal: Proposal,
    wanted: Array,
) -> State:
    """The state after a step, given which candidates [width] may be kept."""
    losses, matches = _losses(search, params, behavior, prefix, proposal, wanted)
    after = accept(search, state, proposal.candidates, losses, matches, wanted)
    return jax.tree.map(lambda old, new: jnp.where(state.stopped, old, new), state, after)


def _losses(
    search: Search,
    params: dict,
    behavior: Behavior,
    prefix: Prefix,
    proposal: Proposal,
    wanted: Array,
) -> tuple[Array, Array]:
    """Losses and matches [width] of a step's candidates; every device finds those of its share."""

    def of(candidates: Array, first_change: Array, wanted: Array) -> tuple[Array, Array]:
        return candidate_losses(
            search.model,
            params,
            search.objective,
            behavior,
            prefix,
            proposal.current,
            candidates,
            first_change,
            wanted,
            search.chunk,
        )

    if search.shares == 1:
        return of(proposal.candidates, proposal.first_change, wanted)
    # Dealt out in the order of their cost, so that shares take equally long.
    order = by_start(proposal.first_change, wanted, search.shares)
    mine = order.reshape(-1, search.shares)[:, jax.lax.axis_index(CANDIDATES)]
    parts = of(proposal.candidates[mine], proposal.first_change[mine], wanted[mine])
    place = jnp.argsort(order[: search.width])
    losses, matches = (
        jax.lax.all_gather(part, CANDIDATES, axis=1).reshape(-1)[place] for part in parts
    )
    return losses, matches


def _agreed(search: Search, x: Array) -> Array:
    """The first device's, where several find the same thing. Their last bits may differ on some
    accelerators, and what the search does next must not."""
    return x if search.shares == 1 else jax.lax.all_gather(x, CANDIDATES)[0]


def accept(
    search: Search, state: State, candidates: Array, losses: Array, matches: Array, wanted: Array
) -> State:
    """Which suffix the search goes on with."""
    any_wanted = jnp.any(wanted)
    index = jnp.argmin(losses)
    loss, ids = losses[index], candidates[index]
    if search.buffer_size > 0:
        enters = any_wanted & (loss < state.loss[-1])
    elif search.accept == "always":
        enters = any_wanted
    else:
        enters = any_wanted & (loss < state.loss[0])
        if search.accept == "anneal":
            heat = jnp.maximum(1 - (state.step + 1) / search.steps, 1e-7)
            chance = jnp.exp(-(loss - state.loss[0]) / heat)
            enters |= any_wanted & (jax.random.uniform(step_keys(state)[2]) <= chance)
    held = jnp.where(enters, state.loss.at[-1].set(loss), state.loss)
    order = jnp.argsort(held, stable=True)
    held_ids = jnp.where(enters, state.ids.at[-1].set(ids), state.ids)[order]
    better = any_wanted & (loss < state.best_loss)
    return State(
        key=state.key,
        step=state.step + 1,
        ids=held_ids,
        loss=held[order],
        best_ids=jnp.where(better, ids, state.best_ids),
        best_loss=jnp.where(better, loss, state.best_loss),
        losses=state.losses.at[state.step].set(loss),
        history=state.history.at[state.step].set(held_ids[0]),
        stopped=state.stopped | (jnp.any(matches) if search.early_stop else False),
        filtered=state.filtered + ~any_wanted,
        evaluated=state.evaluated + jnp.sum(wanted, dtype=jnp.int32),
    )


def advance(
    search: Search,
    params: dict,
    allowed: Array,
    until: Array,
    behavior: Behavior,
    prefix: Prefix,
    state: State,
) -> State:
    """Steps up to number `until`, or to an early stop, without a filter."""
    everything = jnp.ones(search.width, bool)

    def step(state: State) -> State:
        proposal = propose(search, params, allowed, behavior, prefix, state)
        return evaluate(search, params, behavior, prefix, state, proposal, everything)

    return jax.lax.while_loop(lambda s: (s.step < until) & ~s.stopped, step, state)


# Several behaviors ------------------------------------------------------------------------------


def search_mesh(mesh: Mesh, behaviors: int) -> Mesh:
    """The devices of a mesh (slice, data, fsdp, tensor) as (BEHAVIORS, CANDIDATES, tensor)."""
    names = (BEHAVIORS, CANDIDATES, "tensor")
    return Mesh(search_devices(mesh, behaviors), names, axis_types=(AxisType.Auto,) * 3)


def search_devices(mesh: Mesh, behaviors: int) -> np.ndarray:
    """[groups, devices that divide a behavior's candidates, tensor] devices.

    As many groups as there are row shards; with fewer behaviors, the fewest that divide the shards
    evenly and give every behavior one.
    """
    rows = row_shards(mesh)
    groups = next(n for n in range(1, rows + 1) if rows % n == 0 and n >= min(behaviors, rows))
    return mesh.devices.reshape(groups, rows // groups, mesh.shape["tensor"])


def whole_rows(mesh: Mesh, shardings: Any) -> Any:
    """Shardings of parameters on a search's mesh: split over the tensor axis alone."""

    def whole(sharding: NamedSharding) -> NamedSharding:
        held = ("tensor" if "tensor" in names_of((entry,)) else None for entry in sharding.spec)
        return NamedSharding(mesh, PartitionSpec(*held))

    return jax.tree.map(whole, shardings)


def _each(mesh: Mesh | None, run: Callable[..., Any], shared: tuple, rows: tuple) -> Any:
    """run(*shared, *row) for every row, one after another;
    groups of devices of a search's mesh take different rows.

    Inside, parameters are whole along the first two axes; the tensor axis keeps splitting them.
    """

    def local(shared: tuple, rows: tuple) -> Any:
        return jax.lax.map(lambda row: run(*shared, *row), rows)

    if mesh is None or mesh.size == 1:
        return local(shared, rows)
    whole, split = PartitionSpec(), PartitionSpec(BEHAVIORS)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(whole, split),
        out_specs=split,
        axis_names={BEHAVIORS, CANDIDATES},
        check_vma=False,
    )(shared, rows)


@functools.partial(jax.jit, static_argnames=("search", "mesh"))
def begin_all(
    search: Search,
    mesh: Mesh | None,
    params: dict,
    behaviors: Behavior,
    keys: Array,
    suffixes: Array,
):
    """Prefixes and states [R, ...] before the first step; keys [R], suffixes [R, S, n]."""
    return _each(mesh, functools.partial(begin, search), (params,), (behaviors, keys, suffixes))


@functools.partial(jax.jit, static_argnames=("search", "mesh"))
def propose_all(
    search: Search, mesh: Mesh | None, params, allowed, behaviors, prefixes, states
) -> Proposal:
    """Proposals [R, ...]."""
    return _each(
        mesh, functools.partial(propose, search), (params, allowed), (behaviors, prefixes, states)
    )


@functools.partial(jax.jit, static_argnames=("search", "mesh"))
def evaluate_all(
    search: Search, mesh: Mesh | None, params, behaviors, prefixes, states, proposals, wanted
) -> State:
    """States [R, ...] after a step."""
    rows = (behaviors, prefixes, states, proposals, wanted)
    return _each(mesh, functools.partial(evaluate, search), (params,), rows)


@functools.partial(jax.jit, static_argnames=("search", "mesh"))
def advance_all(
    search: Search, mesh: Mesh | None, params, allowed, until, behaviors, prefixes, states
) -> State:
    """States [R, ...] after several steps."""
    shared = (params, allowed, jnp.asarray(until))
    return _each(mesh, functools.partial(advance, search), shared, (behaviors, prefixes, states))
