"""What learns: an objective, an optimizer, and the state that one update changes.

    L = sum_k weight_k * numerator_k / denominator_k

over named terms; terms without a weight are metrics. `train` (supervised.py) and `train_online`
(online.py) feed a learner; a paper brings its objective and, if it samples, how it collects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from rlbf_jax.models.lora import join
from rlbf_jax.parallel.memory import Memory
from rlbf_jax.parallel.mesh import replicated, shardings
from rlbf_jax.parallel.placing import placed
from rlbf_jax.training.state import TermsFn, TrainState, UpdateMetrics, init_state, make_update

Params = Any
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss as named terms."""

    terms: TermsFn
    """(parameters, microbatch) -> named terms, each a (numerator, denominator) pair."""
    denominators: Callable[[Any], dict[str, Array]]
    """Whole batch -> denominators of the weighted terms, whatever its microbatches."""
    weights: Mapping[str, float]
    """Weight of each term in the loss; terms not named here are metrics."""


class Learner:
    """Parameters that an objective changes, update by update.

    Args:
      params: the parameters that are trained; buffers are used up by the first update. A function
        without arguments that makes them is called when they are first needed, which in a training
        that goes on from a checkpoint is never.
      frozen: parameters that the objective reads joined with them: no gradient, no moments.
      accumulate: microbatches of an update; divides the rows of a batch.

    Raises ValueError for parameters in half precision, in which small updates are lost.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        params: Params | Callable[[], Params],
        mesh: Mesh,
        accumulate: int = 1,
        frozen: Mapping[str, Any] = NOTHING,
    ):
        self.mesh, self.frozen = mesh, frozen
        self._optimizer, self._params = optimizer, params
        self._state: TrainState | None = None
        self.shapes = jax.eval_shape(lambda: init_state(self._made(), optimizer))
        """Of the state, which need not be made to be known."""
        _check_precision(self.shapes.params)
        self._update = make_update(
            objective.terms,
            objective.denominators,
            objective.weights,
            optimizer,
            mesh,
            self.shapes,
            accumulate,
            frozen,
        )

    @property
    def state(self) -> TrainState:
        """What updates change; made when it is first asked for."""
        if self._state is None:
            self.take(self.begun())
        assert self._state is not None
        return self._state

    def begun(self, copied: bool = False) -> TrainState:
        """The state before the first update, on the mesh. `copied`: updates leave the parameters
        that were handed in alone."""
        params = placed(self._made(), shardings(self.shapes.params, self.mesh))
        if copied and not callable(self._params):
            params = jax.tree.map(jnp.copy, params)
        places = shardings(self.shapes.opt_state, self.mesh)
        opt_state = jax.jit(self._optimizer.init, out_shardings=places)(params)
        step = placed(jnp.zeros((), jnp.int32), replicated(self.mesh))
        return TrainState(params, opt_state, step)

    def _made(self) -> Params:
        return self._params() if callable(self._params) else self._params

    @property
    def params(self) -> Params:
        """Trained parameters joined with the frozen ones: what samples and scores."""
        return join(self.state.params, self.frozen)

    @property
    def trained(self) -> Params:
        """A copy of the trained parameters alone, for a stage to keep."""
        return jax.tree.map(jnp.copy, self.state.params)

    def update(self, batch: Any) -> UpdateMetrics:
        """One update on a batch (leading axis of leaves: rows); reuses the old state's buffers."""
        after, metrics = self._update(self.state, batch)
        self.take(after)
        return metrics

    def memory(self, batch: Any) -> Memory:
        """What an update on such a batch takes of a device; compiles it."""
        return self._update.memory(self.state, batch)

    def take(self, state: TrainState) -> None:
        """Goes on from another state, as a checkpoint holds it."""
        self._state, self._params = state, None


def _check_precision(params: Params) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4:
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path)} is {leaf.dtype}, in which small updates "
                "are lost; train it in float32 (a model computes in its config's dtype)"
            )
