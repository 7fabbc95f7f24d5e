"""One pre-norm decoder in Flax Linen: pure `init` / `apply`, the cache an explicit argument.

1. `ModelConfig`: everything a family differs by is a field here.
2. `Decoder.__call__`: whole rows -> hidden states (and, for prefill, every layer's keys and values).
3. `Decoder.step`: one id a row over a `KVCache`.
4. `Decoder.unembed`: hidden states -> logits. Losses call it chunk by chunk.
5. `ValueHead`: hidden states and a few features of the trace -> values. Its own parameters, so that any checkpoint of
   the decoder can get one.

Shape letters as in `attention.py`; L layers, R repeats of the repeating block of layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rlbf_jax.models import kv_cache
from rlbf_jax.models.attention import Visibility, attend, attend_rows, rotary, rotate
from rlbf_jax.models.kv_cache import KVCache
from rlbf_jax.ranges import check_at_least, check_positive

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a decoder."""

    vocab_size: int = 1024
    """Ids, control ids included. Recipes set it from the tokenizer."""
    num_layers: int = 3
    width: int = 96
    num_heads: int = 3
    num_kv_heads: int = 3
    head_dim: int = 32
    mlp_width: int = 256
    activation: Literal["silu", "gelu", "relu2"] = "silu"
    """Of the gate."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied_embeddings: bool = True
    windows: tuple[int | None, ...] = (None,)
    """Attention windows of the repeating block of layers; None is global. Its length divides `num_layers`."""
    attention_softcap: float | None = None
    final_softcap: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and the cache. Norms, softmax and logits are float32 always."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = False
    """Scan over the repeating block: compiles in constant time, for deep models. Unrolled runs faster when shallow."""
    remat: bool = False
    """Recompute each block's activations in the backward pass."""

    def __post_init__(self):
        check_at_least(self, 1, "vocab_size", "num_layers", "width", "mlp_width")
        check_at_least(self, 1, "num_heads", "num_kv_heads", "head_dim")
        check_positive(self, "rope_theta", "norm_eps", "attention_softcap", "final_softcap")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.num_layers % len(self.windows):
            raise ValueError(f"num_layers {self.num_layers} is not a multiple of the {len(self.windows)} windows")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")

    @property
    def window_of_layer(self) -> tuple[int | None, ...]:
        return self.windows * (self.num_layers // len(self.windows))


def dense(x: Array, weight: Array) -> Array:
    """[B, T, D] @ [D, F] over flattened rows: on CPU XLA computes the weight gradient of a three-dimensional product
    about half as fast (`experiments/benchmarks/training_step.py`)."""
    flat = x.reshape(-1, x.shape[-1]) @ weight.astype(x.dtype)
    return flat.reshape(*x.shape[:-1], weight.shape[-1])


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32."""

    eps: float
    param_dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.param_dtype))
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale.astype(jnp.float32)).astype(x.dtype)


class Layer(nn.Module):
    """Attention and gated MLP, each after a norm and added to the stream."""

    config: ModelConfig
    window: int | None

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.param_dtype)
        fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2, 3))
        groups = c.num_heads // c.num_kv_heads
        # One matmul for queries, keys and values. The key head is the axis that tensor parallelism splits.
        self.qkv = self.param("qkv", fan_in, (c.width, c.num_kv_heads, groups + 2, c.head_dim), dtype)
        scaled = nn.initializers.variance_scaling(1.0 / (2 * c.num_layers), "fan_in", "normal", in_axis=(0, 1))
        self.out = self.param("out", scaled, (c.num_heads, c.head_dim, c.width), dtype)
        gate = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))
        self.gate_up = self.param("gate_up", gate, (c.width, 2, c.mlp_width), dtype)
        down = nn.initializers.variance_scaling(1.0 / (2 * c.num_layers), "fan_in", "normal")
        self.down = self.param("down", down, (c.mlp_width, c.width), dtype)
        self.attention_norm = RMSNorm(c.norm_eps, c.param_dtype)
        self.mlp_norm = RMSNorm(c.norm_eps, c.param_dtype)

    def _project(self, x: Array, angles: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """[B, T, D] -> queries [B, N, T, H], keys and values [B, K, T, H]."""
        c = self.config
        groups = c.num_heads // c.num_kv_heads
        projected = dense(self.attention_norm(x), self.qkv.reshape(c.width, -1))
        projected = projected.reshape(*x.shape[:2], c.num_kv_heads, groups + 2, c.head_dim).transpose(0, 2, 3, 1, 4)
        query = projected[:, :, :groups].reshape(x.shape[0], c.num_heads, x.shape[1], c.head_dim)
        query = rotate(query, *angles) * c.head_dim**-0.5
        return query, rotate(projected[:, :, groups], *angles), projected[:, :, groups + 1]

    def _finish(self, x: Array, attended: Array) -> Array:
        joined = attended.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        x = x + dense(joined, self.out.reshape(-1, x.shape[-1]))
        normed = self.mlp_norm(x)
        gate = ACTIVATIONS[self.config.activation](dense(normed, self.gate_up[:, 0]))
        return x + dense(gate * dense(normed, self.gate_up[:, 1]), self.down)

    def __call__(self, x: Array, angles: tuple[Array, Array], visibility: Visibility) -> tuple[Array, tuple]:
        query, key, value = self._project(x, angles)
        attended = attend_rows(query, key, value, visibility, self.window, self.config.attention_softcap)
        return self._finish(x, attended), (key, value)

    def step(self, x, angles, cache: tuple[Array, Array], positions: Array, position: Array, one_hot: bool):
        """One id a row: x [B, 1, D]; `positions` are the slots' stored positions, this id's included."""
        query, new_key, new_value = self._project(x, angles)
        slot = position % positions.shape[1]
        key = kv_cache.write(cache[0], new_key, slot, one_hot)
        value = kv_cache.write(cache[1], new_value, slot, one_hot)
        allowed = kv_cache.sees(positions, position, self.window)
        attended = attend(query, key, value, allowed, self.config.attention_softcap)
        return self._finish(x, attended), (key, value)


class Block(nn.Module):
    """The repeating block: one layer a window. Carries the stream, returns every layer's keys and values."""

    config: ModelConfig

    def setup(self):
        self.layers = [Layer(self.config, window) for window in self.config.windows]

    def __call__(self, x, angles, visibility):
        kept = []
        for layer in self.layers:
            x, pair = layer(x, angles, visibility)
            kept.append(pair)
        return x, tuple(kept)

    def step(self, x, caches, angles, positions, position, one_hot):
        kept = []
        for layer, cache, slots in zip(self.layers, caches, positions, strict=True):
            x, pair = layer.step(x, angles, cache, slots, position, one_hot)
            kept.append(pair)
        return x, tuple(kept)


class Decoder(nn.Module):
    """tokens -> hidden states; `unembed` makes logits of them."""

    config: ModelConfig

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.param_dtype)
        init = nn.initializers.normal(c.width**-0.5)
        self.embedding = self.param("embedding", init, (c.vocab_size, c.width), dtype)
        if not c.tied_embeddings:
            self.unembedding = self.param("unembedding", init, (c.vocab_size, c.width), dtype)
        repeats = c.num_layers // len(c.windows)
        block = nn.remat(Block, prevent_cse=not c.scan_layers) if c.remat else Block
        if c.scan_layers:
            self.stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=repeats,
            )(c)
        else:
            self.blocks = [block(c) for _ in range(repeats)]
        self.final_norm = RMSNorm(c.norm_eps, c.param_dtype)

    def __call__(self, tokens: Array, visibility: Visibility) -> tuple[Array, tuple[tuple[Array, Array], ...]]:
        """Whole rows at once.

        Args:
          tokens: [B, T] int32.
          visibility: who may attend to whom; its positions feed the rotary embedding.

        Returns:
          hidden [B, T, D] after the final norm, and (key, value) [B, K, T, H] of every layer, in order.
        """
        c = self.config
        x = self._embed(tokens)
        angles = rotary(visibility.position, c.head_dim, c.rope_theta)
        kept: tuple
        if c.scan_layers:
            x, stacked = self.stack(x, angles, visibility)
            kept = tuple((k[r], v[r]) for r in range(c.num_layers // len(c.windows)) for k, v in stacked)
        else:
            kept = ()
            for block in self.blocks:
                x, pairs = block(x, angles, visibility)
                kept += pairs
        return self.final_norm(x), kept

    def step(self, token: Array, position: Array, cache: KVCache, one_hot: bool = False) -> tuple[Array, KVCache]:
        """Feeds one id a row. Needs unrolled layers: see `unrolled`.

        Args:
          token, position: [B] int32.
          cache: what earlier ids left; donate it.

        Returns:
          hidden [B, D] and the cache with this id in slot `position % slots` of every layer.
        """
        c = self.config
        x = self._embed(token[:, None])
        angles = rotary(position[:, None], c.head_dim, c.rope_theta)
        positions = tuple(kv_cache.write_position(held, position, position % held.shape[1]) for held in cache.position)
        pairs: tuple = ()
        for number, block in enumerate(self.blocks):
            here = slice(number * len(c.windows), (number + 1) * len(c.windows))
            caches = tuple(zip(cache.key[here], cache.value[here], strict=True))
            x, kept = block.step(x, caches, angles, positions, position, one_hot)
            pairs += kept
        keys, values = zip(*pairs, strict=True)
        return self.final_norm(x)[:, 0], KVCache(keys, values, positions)

    def unembed(self, hidden: Array) -> Array:
        """[..., D] -> float32 logits [..., V]."""
        table = self.table()
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = jnp.matmul(flat, table.astype(hidden.dtype).T, preferred_element_type=jnp.float32)
        logits = logits.reshape(*hidden.shape[:-1], table.shape[0])
        if self.config.final_softcap is not None:
            logits = self.config.final_softcap * jnp.tanh(logits / self.config.final_softcap)
        return logits

    def table(self) -> Array:
        """[V, D]: the unembedding."""
        return self.embedding if self.config.tied_embeddings else self.unembedding

    def _embed(self, tokens: Array) -> Array:
        # Rows of a unit-norm table are scaled to unit variance an entry, as a residual stream wants them.
        rows = jnp.take(self.embedding, tokens, axis=0).astype(jnp.dtype(self.config.dtype))
        return rows * jnp.asarray(self.config.width**0.5, rows.dtype)


class ValueHead(nn.Module):
    """hidden [..., D] and features [..., F] of the trace -> values [...] float32.

    Under REWIND the hidden state has forgotten what was retracted, so the features say it (directives used, ids left,
    a pending category).
    """

    hidden: int = 64

    @nn.compact
    def __call__(self, hidden: Array, features: Array) -> Array:
        x = jnp.concatenate([hidden.astype(jnp.float32), features.astype(jnp.float32)], axis=-1)
        x = jax.nn.silu(nn.Dense(self.hidden)(x))
        return nn.Dense(1, kernel_init=nn.initializers.zeros)(x)[..., 0]


def init(config: ModelConfig, key: Array) -> dict:
    """Random parameters of a decoder, a plain dict of arrays."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    visibility = Visibility(jnp.arange(2, dtype=jnp.int32)[None])
    return Decoder(config).init(key, tokens, visibility)["params"]


def forward(config: ModelConfig, params: dict, tokens: Array, visibility: Visibility):
    """`Decoder.__call__` as a function."""
    return Decoder(config).apply({"params": params}, tokens, visibility)


def step(
    config: ModelConfig, params: dict, token: Array, position: Array, cache: KVCache, one_hot: bool
) -> tuple[Array, KVCache]:
    """`Decoder.step` as a function."""
    stepped: Any = Decoder(config).apply({"params": params}, token, position, cache, one_hot, method="step")
    return stepped


def unembed(config: ModelConfig, params: dict, hidden: Array) -> Array:
    """`Decoder.unembed` as a function."""
    return jnp.asarray(Decoder(config).apply({"params": params}, hidden, method="unembed"))


def unembedding(config: ModelConfig, params: dict) -> Array:
    """[V, D] table of the logits."""
    return params["embedding" if config.tied_embeddings else "unembedding"]


def unrolled(config: ModelConfig, params: dict) -> tuple[ModelConfig, dict]:
    """The same model with unrolled layers, as the sampler wants it: a scanned cache would be copied at every id."""
    if not config.scan_layers:
        return config, params
    rest = {name: value for name, value in params.items() if name != "stack"}
    repeats = config.num_layers // len(config.windows)
    blocks = {f"blocks_{r}": jax.tree.map(lambda leaf, r=r: leaf[r], params["stack"]) for r in range(repeats)}
    return dataclasses.replace(config, scan_layers=False), rest | blocks
