"""The train state and the one update that every trainer shares.

`jit_update` is where `jax.jit`, shardings and donation meet.
A step reads: split into microbatches -> loss terms with weights and denominators -> summed
gradients -> optax -> metrics as (numerator, denominator) pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding

from rlbf_jax.models.lora import join
from rlbf_jax.objectives.masked import Term
from rlbf_jax.parallel.axes import constrain, over_rows, traced_for
from rlbf_jax.parallel.memory import Memory, memory_of
from rlbf_jax.parallel.mesh import batch_sharding, replicated, shardings
from rlbf_jax.parallel.placing import dealt, placed

TermsFn = Callable[[Any, Any], dict[str, Term]]
"""(params, microbatch) -> named terms. Terms without a weight are metrics only."""


class TrainState(NamedTuple):
    """What an update changes and a checkpoint keeps."""

    params: Any
    opt_state: Any
    step: Array
    """int32 scalar: updates applied."""


class UpdateMetrics(NamedTuple):
    """What an update reports; scalars."""

    terms: dict[str, Term]
    grad_norm: Array
    finite: Array
    """bool: false means that loss or gradient was not finite, and the state is as it was before."""


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def accumulated_gradients(
    terms_fn: TermsFn,
    weights: Mapping[str, float],
    denominators: Mapping[str, Array],
    params,
    batch,
    accumulate: int,
):
    """Gradients of sum_k weight_k * numerator_k / denominator_k, and the summed terms.

    `denominators` are those of the whole batch, so any number of microbatches gives the same sum.
    """

    def scaled(params, micro):
        terms = terms_fn(params, micro)
        loss = sum(
            weight * terms[name].numerator / jnp.maximum(denominators[name], 1e-8)
            for name, weight in weights.items()
        )
        return loss, terms

    gradient = jax.grad(scaled, has_aux=True)
    if accumulate == 1:
        return gradient(params, batch)
    micro = jax.tree.map(lambda x: _dealt(x, accumulate), batch)
    zero = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micro))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zero)
    total, _ = jax.lax.scan(
        lambda sums, m: (jax.tree.map(jnp.add, sums, gradient(params, m)), None), zero, micro
    )
    return total


def _dealt(rows: Array, accumulate: int) -> Array:
    """[A, B / A, ...] microbatches of rows [B, ...], dealt out one by one: each has an equal share
    of every device's rows, so none of them moves."""
    micro = rows.reshape(rows.shape[0] // accumulate, accumulate, *rows.shape[1:])
    return constrain(jnp.swapaxes(micro, 0, 1), None, "rows", *[None] * (rows.ndim - 1))


def jit_update(
    terms_fn: TermsFn,
    denominators_fn: Callable[[Any], dict[str, Array]],
    weights: Mapping[str, float],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state: TrainState,
    accumulate: int = 1,
    frozen: Mapping[str, Any] = MappingProxyType({}),
):
    """The jitted (state, frozen, batch) -> (state, metrics) of `make_update`;
    `state` and `frozen` may be shapes."""

    def update(state: TrainState, frozen, batch) -> tuple[TrainState, UpdateMetrics]:
        def local(whole, batch) -> tuple[tuple, tuple[Any, dict[str, Term]]]:
            params, frozen, denominators = whole

            def joined(params, micro) -> dict[str, Term]:
                return terms_fn(join(params, frozen), micro)

            return (), accumulated_gradients(
                joined, weights, denominators, params, batch, accumulate
            )

        # Rows of other devices are to a device what other microbatches are: terms are sums.
        whole = (state.params, frozen, denominators_fn(batch))
        _, (grads, terms) = over_rows(local, whole, batch, "few_rows")
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
        # A poisoned update is not applied: the state stays the last good one,
        # and the loop stops the run.
        losses = jnp.stack([terms[name].numerator for name in weights])
        finite = jnp.isfinite(norm) & jnp.all(jnp.isfinite(losses))
        new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        return new, UpdateMetrics(terms, norm, finite)

    places = shardings(state, mesh)
    return jax.jit(
        traced_for(mesh, update),
        in_shardings=(places, shardings(dict(frozen), mesh), batch_sharding(mesh)),
        out_shardings=(places, replicated(mesh)),
        donate_argnums=0,
    )


@dataclasses.dataclass(frozen=True)
class Update:
    """`(state, batch) -> (state, metrics)`; the old state's buffers are used up."""

    jitted: Any
    """(state, frozen, batch) -> (state, metrics)."""
    frozen: Mapping[str, Any]
    rows: NamedSharding
    """Of a batch."""

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, UpdateMetrics]:
        return self.jitted(state, self.frozen, dealt(batch, self.rows))

    def memory(self, state: TrainState, batch: Any) -> Memory:
        """What it takes of a device. Compiles, as the first call would, and does not run."""
        batch = dealt(batch, self.rows)
        return memory_of(self.jitted.lower(state, self.frozen, batch).compile())


def make_update(
    terms_fn: TermsFn,
    denominators_fn: Callable[[Any], dict[str, Array]],
    weights: Mapping[str, float],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state: TrainState,
    accumulate: int = 1,
    frozen: Mapping[str, Any] = MappingProxyType({}),
) -> Update:
    """A jitted update over the mesh; `state` gives the shapes and is not kept.

    Every leaf of the batch has rows in front; rows are split over (data, fsdp), the state by
    `parallel.mesh.RULES`. `terms_fn` reads the state's parameters joined with `frozen` ones, which
    have no gradient and no moments.
    """
    update = jit_update(
        terms_fn, denominators_fn, weights, optimizer, mesh, state, accumulate, frozen
    )
    whole = dict(frozen)
    return Update(update, placed(whole, shardings(whole, mesh)), batch_sharding(mesh))


def means(metrics: UpdateMetrics) -> dict[str, float]:
    """Host floats of an update's metrics, terms divided."""
    terms, norm = jax.device_get((metrics.terms, metrics.grad_norm))
    return {name: float(term.mean) for name, term in terms.items()} | {"grad_norm": float(norm)}
