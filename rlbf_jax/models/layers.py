"""Norms and the decoder layer: attention and MLP, each after a norm and added to the stream.

Shape letters as in `attention.py`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rlbf_jax.models import kv_cache, lora
from rlbf_jax.models.attention import Visibility, attend, attend_rows, rotate
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.prefixed import attend_prefixed, sees_prefixed
from rlbf_jax.parallel.axes import constrain
from rlbf_jax.parallel.backend import backend

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}

FEW_ROWS, LARGE_TABLE = 64, 1 << 22
"""Up to so many rows, and from so many numbers of a table on: see `times_table`."""
Angles = tuple[Array, Array] | None
"""Cosine and sine of the rotary embedding; None: the model has learned positions."""


def dense(x: Array, weight: Array) -> Array:
    """[B, T, D] @ [D, F] over flattened rows: on CPU XLA computes the weight gradient of a
    three-dimensional product about half as fast (`experiments/benchmarks/training_step.py`)."""
    flat = x.reshape(-1, x.shape[-1]) @ weight.astype(x.dtype)
    return flat.reshape(*x.shape[:-1], weight.shape[-1])


def dense_halves(x: Array, weight: Array) -> tuple[Array, Array]:
    """[B, T, D] through both halves of [D, 2, F] -> two [B, T, F].

    A product of each half reads it as a strided slice, which is copied (2 F D numbers); the halves
    of one product are copied instead (2 F a row). So few rows, as of decoding, take one product,
    and many, as of training, take two.
    """
    flat, weight = x.reshape(-1, x.shape[-1]), weight.astype(x.dtype)
    if flat.shape[0] > weight.shape[0]:
        return dense(x, weight[:, 0]), dense(x, weight[:, 1])
    both = jax.lax.dot_general(flat, weight, (((1,), (0,)), ((), ())))
    both = both.reshape(*x.shape[:-1], *weight.shape[1:])
    return both[..., 0, :], both[..., 1, :]


def times_table(flat: Array, table: Array) -> Array:
    """[R, D] and a table [V, D] -> float32 [R, V].

    XLA on CPU is up to twice as fast with the table on the left where rows are few, as of decoding;
    what it gives has to be turned, which is cheap beside a table larger than a cache.
    """
    few = 1 < flat.shape[0] <= FEW_ROWS and table.size >= LARGE_TABLE
    if few and backend() == "cpu":
        product = jnp.matmul(table, flat.T, preferred_element_type=jnp.float32)
        # Without it XLA takes the turned product for one of the other order.
        return jax.lax.optimization_barrier(product).T
    return jnp.matmul(flat, table.T, preferred_element_type=jnp.float32)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32. With `plus_one` the factor is 1 + scale (Gemma)."""

    eps: float
    param_dtype: str
    plus_one: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), jnp.dtype(self.param_dtype))
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        factor = scale.astype(jnp.float32)
        return (wide * (1 + factor if self.plus_one else factor)).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / deviation * scale + bias, computed in float32."""

    eps: float
    param_dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = jnp.dtype(self.param_dtype)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), dtype)
        wide = x.astype(jnp.float32)
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def make_norm(c: ModelConfig) -> RMSNorm | LayerNorm:
    """The norm of a family."""
    if c.norm == "layer":
        return LayerNorm(c.norm_eps, c.param_dtype)
    return RMSNorm(c.norm_eps, c.param_dtype, plus_one=c.norm == "rms_plus_one")


class Layer(nn.Module):
    """Attention and MLP, each after a norm (and, in some families, before another)
    and added to the stream."""

    config: ModelConfig
    window: int | None

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.param_dtype)
        fan_in = nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2, 3)
        )
        # One matmul for queries, keys and values.
        # The key head is the axis that tensor parallelism splits.
        self.qkv = self.param(
            "qkv", fan_in, (c.width, c.num_kv_heads, c.groups + 2, c.head_dim), dtype
        )
        scaled = nn.initializers.variance_scaling(
            1.0 / (2 * c.num_layers), "fan_in", "normal", in_axis=(0, 1)
        )
        self.out = self.param("out", scaled, (c.num_heads, c.head_dim, c.width), dtype)
        if c.gated_mlp:
            gate = nn.initializers.variance_scaling(
                1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2)
            )
            self.gate_up = self.param("gate_up", gate, (c.width, 2, c.mlp_width), dtype)
        else:
            up = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            self.up = self.param("up", up, (c.width, c.mlp_width), dtype)
        down = nn.initializers.variance_scaling(1.0 / (2 * c.num_layers), "fan_in", "normal")
        self.down = self.param("down", down, (c.mlp_width, c.width), dtype)
        self._setup_biases(dtype)
        self.adapters = {
            name: self._adapter(name, into, out)
            for name, (into, out) in lora.shapes(c).items()
            if c.lora.rank
        }
        self.attention_norm = make_norm(c)
        self.mlp_norm = make_norm(c)
        if c.post_norms:
            self.attention_post_norm = make_norm(c)
            self.mlp_post_norm = make_norm(c)
        if c.qk_norm:
            self.query_norm = make_norm(c)
            self.key_norm = make_norm(c)

    def _setup_biases(self, dtype) -> None:
        c, zeros = self.config, nn.initializers.zeros
        if c.qkv_bias:
            self.qkv_bias = self.param(
                "qkv_bias", zeros, (c.num_kv_heads, c.groups + 2, c.head_dim), dtype
            )
        if c.out_bias:
            self.out_bias = self.param("out_bias", zeros, (c.width,), dtype)
        if c.mlp_bias:
            shape = (2, c.mlp_width) if c.gated_mlp else (c.mlp_width,)
            self.up_bias = self.param(
                "gate_up_bias" if c.gated_mlp else "up_bias", zeros, shape, dtype
            )
            self.down_bias = self.param("down_bias", zeros, (c.width,), dtype)

    def _adapter(
        self, name: str, into: tuple[int, ...], out: tuple[int, ...]
    ) -> tuple[Array, Array]:
        """A and B of a projection. B starts at 0: training starts from the model as it is."""
        spread = nn.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", in_axis=tuple(range(len(into)))
        )
        a = self.param(f"{name}_lora_a", spread, (*into, self.config.lora.rank), jnp.float32)
        return a, self.param(
            f"{name}_lora_b", nn.initializers.zeros, (self.config.lora.rank, *out), jnp.float32
        )

    def _dense(self, name: str, x: Array, weight: Array) -> Array:
        """[B, T, D] -> [B, T, F] through a projection and its adapter, where it has one."""
        y = dense(x, weight)
        if name not in self.adapters:
            return y
        a, b = self.adapters[name]
        return (
            y
            + dense(dense(x, a.reshape(x.shape[-1], -1)), b.reshape(b.shape[0], -1))
            * self.config.lora.scale
        )

    def _project(self, x: Array, angles: Angles) -> tuple[Array, Array, Array]:
        """[B, T, D] -> queries [B, N, T, H], keys and values [B, K, T, H]."""
        c = self.config
        projected = self._dense("qkv", self.attention_norm(x), self.qkv.reshape(c.width, -1))
        if c.qkv_bias:
            projected = projected + self.qkv_bias.reshape(-1).astype(x.dtype)
        projected = projected.reshape(
            *x.shape[:2], c.num_kv_heads, c.groups + 2, c.head_dim
        ).transpose(0, 2, 3, 1, 4)
        query = projected[:, :, : c.groups].reshape(x.shape[0], c.num_heads, x.shape[1], c.head_dim)
        key = projected[:, :, c.groups]
        if c.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        scalar = c.head_dim if c.query_pre_attn_scalar is None else c.query_pre_attn_scalar
        return query * scalar**-0.5, key, projected[:, :, c.groups + 1]

    def _finish(self, x: Array, attended: Array) -> Array:
        c = self.config
        joined = attended.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        change = self._dense("out", joined, self.out.reshape(-1, x.shape[-1]))
        if c.out_bias:
            change = change + self.out_bias.astype(x.dtype)
        x = x + (self.attention_post_norm(change) if c.post_norms else change)
        change = self._mlp(self.mlp_norm(x))
        return x + (self.mlp_post_norm(change) if c.post_norms else change)

    def _mlp(self, normed: Array) -> Array:
        c = self.config
        act = ACTIVATIONS[c.activation]
        if not c.gated_mlp:
            hidden = self._dense("up", normed, self.up)
            return self._down(
                act(hidden + self.up_bias.astype(normed.dtype) if c.mlp_bias else hidden)
            )
        gate, up = dense_halves(normed, self.gate_up)
        if "gate_up" in self.adapters:
            a, b = self.adapters["gate_up"]
            low = dense(normed, a) * c.lora.scale
            more_gate, more_up = dense_halves(low, b)
            gate, up = gate + more_gate, up + more_up
        if c.mlp_bias:
            bias = self.up_bias.astype(normed.dtype)
            gate, up = gate + bias[0], up + bias[1]
        return self._down(act(gate) * up)

    def _down(self, hidden: Array) -> Array:
        change = self._dense("down", hidden, self.down)
        return change + self.down_bias.astype(hidden.dtype) if self.config.mlp_bias else change

    def _angles(self, angles: tuple[Angles, Angles]) -> Angles:
        """Of this layer, out of those of global and of windowed layers."""
        return angles[0] if self.window is None else angles[1]

    def __call__(
        self, x: Array, angles: tuple[Angles, Angles], visibility: Visibility
    ) -> tuple[Array, tuple]:
        query, key, value = self._project(x, self._angles(angles))
        attended = attend_rows(
            query, key, value, visibility, self.window, self.config.attention_softcap
        )
        return constrain(self._finish(x, attended), "rows", None, None), (key, value)

    def step(
        self,
        x,
        angles,
        cache: tuple[Array | kv_cache.Quantized, Array | kv_cache.Quantized],
        positions: Array,
        position: Array,
        one_hot: bool,
    ):
        """One id a row: x [B, 1, D]; `positions` are the slots' stored positions,
        this id's included."""
        # Few rows move more cheaply than weights do: these stay where they are, and rows come to
        # them divided along the width; a cache stays with its rows.
        query, new_key, new_value = (
            constrain(x, "rows", "heads", None, None)
            for x in self._project(x, self._angles(angles))
        )
        slot = position % positions.shape[1]
        cached = (
            kv_cache.write(cache[0], new_key, slot, one_hot),
            kv_cache.write(cache[1], new_value, slot, one_hot),
        )
        key, value = (kv_cache.read(held, new_value.dtype) for held in cached)
        allowed = kv_cache.sees(positions, position, self.window)
        attended = attend(query, key, value, allowed, self.config.attention_softcap)
        return constrain(self._finish(x, attended), "few_rows", None, "embed"), cached

    def extend(
        self,
        x,
        angles,
        position: Array,
        prefix: tuple[Array, Array],
        prefix_position: Array,
        keep: int,
    ):
        """Ids after a shared prefix: x [B, T, D], positions [T].
        Returns the last `keep` columns of the stream."""
        query, key, value = self._project(x, self._angles(angles))
        allowed = sees_prefixed(prefix_position, position, self.window)[-keep:]
        attended = attend_prefixed(
            query[:, :, -keep:], key, value, prefix, allowed, self.config.attention_softcap
        )
        return self._finish(x[:, -keep:], attended), (key, value)
