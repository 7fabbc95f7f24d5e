"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685): W + alpha / rank * A B,
W frozen, A and B trained.

The adapters of a layer stand beside its projections (`qkv_lora_a`, `qkv_lora_b`, ...),
in float32 whatever the model's dtype. Rows of the embedding that training must reach
(control ids) get an additive row each (`embedding_rows`). Everything starts as no change at all:
B and the rows are zero.

    trained, frozen = split(params)     what an update changes and a checkpoint keeps; the rest
    join(trained, frozen)               what the model reads
    merge(config, params)               the plain model, for export and evaluation
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import Array

from rlbf_jax.models.config import LoraConfig, ModelConfig
from rlbf_jax.parallel import tables

ROWS = {"embedding_rows": "embedding", "unembedding_rows": "unembedding"}
"""Trained rows -> their table."""
A, B = "_lora_a", "_lora_b"


def shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Parameter name -> (axes that A contracts, axes that B makes)
    of every targeted projection of a layer."""
    c = config
    heads, mlp = (c.num_kv_heads, c.groups + 2, c.head_dim), (c.mlp_width,)
    every = {
        "qkv": ("qkv", ((c.width,), heads)),
        "out": ("out", ((c.num_heads, c.head_dim), (c.width,))),
        "up": ("gate_up", ((c.width,), (2, *mlp))) if c.gated_mlp else ("up", ((c.width,), mlp)),
        "down": ("down", (mlp, (c.width,))),
    }
    return dict(every[target] for target in c.lora.targets)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this (last) name belongs to the adapters."""
    return name.endswith((A, B)) or name in ROWS


def split(params: Mapping[str, Any]) -> tuple[dict, dict]:
    """(trained, frozen) parts of a decoder's parameters; without adapters everything is trained."""
    flat = traverse_util.flatten_dict(params)
    trained = {path: leaf for path, leaf in flat.items() if is_adapter(path[-1])}
    if not trained:
        return dict(params), {}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def join(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict:
    """The inverse of `split`."""
    both = dict(frozen)
    for name, value in trained.items():
        both[name] = join(value, both[name]) if isinstance(both.get(name), Mapping) else value
    return both


def look_up(config: ModelConfig, table: Array, rows: Array | None, tokens: Array) -> Array:
    """[..., D] in the model's dtype: rows of an embedding table, with what training adds to them.

    Args:
      table: [V, D].
      rows: [R, D] `embedding_rows`; None: nothing is added.
      tokens: [...] int32.
    """
    found = tables.look_up(table, tokens, jnp.dtype(config.dtype))
    if rows is None:
        return found
    # Ids without such a row take zeros.
    first, count = config.lora.first_row, config.lora.rows
    place = jnp.where(tokens < first, count, tokens - first)
    more = jnp.take(rows, place, axis=0, mode="fill", fill_value=0)
    return found + more.astype(found.dtype)


def merge(config: ModelConfig, params: Mapping[str, Any]) -> tuple[ModelConfig, dict]:
    """The plain model that computes the same: products are added to their projections in float32,
    then rounded to the projection's dtype."""
    trained, frozen = split(params)
    if not frozen:
        return config, trained
    flat = traverse_util.flatten_dict(frozen)
    adapters = traverse_util.flatten_dict(trained)
    for path, leaf in adapters.items():
        *above, name = path
        if name.endswith(A):
            target = (*above, name.removesuffix(A))
            flat[target] = _merged(
                flat[target], leaf, adapters[*above, name.removesuffix(A) + B], config.lora
            )
        elif name in ROWS:
            target = (*above, ROWS[name])
            rows = slice(config.lora.first_row, config.lora.first_row + config.lora.rows)
            table = flat[target]
            flat[target] = table.at[rows].set(
                (table[rows].astype(jnp.float32) + leaf).astype(table.dtype)
            )
    return dataclasses.replace(config, lora=LoraConfig()), traverse_util.unflatten_dict(flat)


def _merged(weight: Array, a: Array, b: Array, config: LoraConfig) -> Array:
    """W + scale * A B; scanned layers have an axis of layers in front of all three."""
    scanned = weight.ndim < (a.ndim - 1) + (b.ndim - 1)
    lead = weight.shape[:1] if scanned else ()
    product = jnp.matmul(
        a.reshape(*lead, -1, config.rank),
        b.reshape(*lead, config.rank, -1),
        precision=jax.lax.Precision.HIGHEST,
    )
    return (weight.astype(jnp.float32) + config.scale * product.reshape(weight.shape)).astype(
        weight.dtype
    )
