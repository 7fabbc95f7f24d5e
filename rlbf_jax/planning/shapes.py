"""Shapes of everything that a run's programs take, with their places on a mesh; nothing is
allocated.

Letters: B rows, T ids of a row.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlbf_jax.data.builders.injectors import CATEGORIES
from rlbf_jax.data.worlds.toy_violations import FORMS
from rlbf_jax.directives import EditRule, Limits
from rlbf_jax.directives.controls import Controls
from rlbf_jax.models import transformer
from rlbf_jax.models.config import LoraConfig, ModelConfig
from rlbf_jax.parallel.mesh import batch_sharding, shardings
from rlbf_jax.runs import start
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.sampling.scoring import Traces
from rlbf_jax.tokenizers.own import controls_behind
from rlbf_jax.training.supervised import Rows

_NOWHERE = Path("/nonexistent")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The base model with its vocabulary, and where control ids stand: what a run has once its
    tokenizer is there."""

    model: ModelConfig
    controls: Controls

    def rule(self, kind: str) -> EditRule:
        return self.controls.rule(kind)

    def tuned(self, lora: LoraConfig, rule: EditRule) -> ModelConfig:
        """The model of stages after `base`, as `Run.tuned` gives it."""
        if not lora.rank:
            return self.model
        rows = LoraConfig(lora.rank, lora.alpha, lora.targets, rule.first_id, rule.num_controls)
        return dataclasses.replace(self.model, lora=rows)


def vocabulary(e: Experiment) -> Vocabulary:
    """Of an experiment whose tokenizer is not made yet.

    A checkpoint (`start_from`) need not be there: then `model` says its shape, and its control ids
    are taken to find room among its rows, as those of Gemma 2 and Llama 3 do.
    """
    data, base = e.data, e.base
    there = base.start_from and (Path(base.start_from) / "config.json").is_file()
    model = start.model_of(base if there else dataclasses.replace(base, start_from=""), _NOWHERE)
    model = dataclasses.replace(model, lora=LoraConfig())
    categories = tuple(CATEGORIES if data.path else FORMS)
    if not base.start_from:
        controls = controls_behind(data.vocab_size, categories, data.x_max, e.rules)
        return Vocabulary(dataclasses.replace(model, vocab_size=controls.end_id), controls)
    # Ids of the rules alone, to count them.
    size, count = model.vocab_size, Controls(0, categories, data.x_max, e.rules).end_id
    controls = Controls(size - count, categories, data.x_max, e.rules, vocab_size=size)
    return Vocabulary(model, controls)


# Places -------------------------------------------------------------------------------------------


def by_name(tree: Any, mesh: Mesh) -> Any:
    """Shapes of parameters or of a train state, where its rules put them."""
    return _at(tree, shardings(tree, mesh))


def by_rows(tree: Any, mesh: Mesh) -> Any:
    """Shapes of arrays with rows in front, divided by rows."""
    place = batch_sharding(mesh)
    return _at(tree, jax.tree.map(lambda _: place, tree))


def at_places(tree: Any, places: Any) -> Any:
    """Shapes of what a compiled program gives, where it leaves them (`output_shardings`)."""
    return _at(tree, places)


def at_shapes(tree: Any) -> Any:
    """Shapes alone, of what a lowered program gives (`out_info`)."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _at(tree: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
    )


def bytes_of(tree: Any) -> int:
    """Bytes of placed shapes on one device, without padding."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        dims = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(dims) * leaf.dtype.itemsize
    return total


# Arrays -------------------------------------------------------------------------------------------


def parameters(model: ModelConfig) -> dict:
    """Of a decoder, adapters included."""
    return jax.eval_shape(functools.partial(transformer.init, model), jax.random.key(0))


def packed_rows(rows: int, length: int) -> Rows:
    """[B, T] each."""
    ids, flags = _array(jnp.int32, rows, length), _array(jnp.bool, rows, length)
    return Rows(ids, ids, flags, flags)


def traces(rows: int, length: int, rule: EditRule) -> Traces:
    """B rows of T ids, prompts included."""
    count, real = _array(jnp.int32, rows), _array(jnp.float32, rows)
    bias = _array(jnp.float32, rows, len(rule.names()))
    ids = _array(jnp.int32, rows, length)
    return Traces(ids, count, count, count, limits(rows), real, bias)


def limits(rows: int) -> Limits:
    """Of B rows."""
    number = _array(jnp.int32, rows)
    return Limits(number, number, number, number, _array(jnp.bool, rows))


def columns(rows: int, length: int) -> Any:
    """[B, T] float32."""
    return _array(jnp.float32, rows, length)


def counts(rows: int, dtype: Any = jnp.int32) -> Any:
    """[B]."""
    return _array(dtype, rows)


def _array(dtype: Any, *dims: int) -> Any:
    return jax.ShapeDtypeStruct(dims, dtype)
