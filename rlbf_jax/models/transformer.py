"""One decoder in Flax Linen: pure `init` / `apply`, the cache an explicit argument.

1. `ModelConfig` (`config.py`): everything a family differs by; `layers.py` reads its fields.
2. `Decoder.__call__`: whole rows -> hidden states, and for prefill every layer's keys and values.
3. `Decoder.step`: one id a row over a `KVCache`.
4. `Decoder.unembed`: hidden states -> logits. Losses call it chunk by chunk.
5. `ValueHead`: hidden states and a few features of the trace -> values. Its parameters are its own,
   so that any checkpoint of the decoder can get one.

Shape letters as in `attention.py`; L layers, R repeats of the repeating block of layers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rlbf_jax.directives import NEVER
from rlbf_jax.models import kv_cache, lora
from rlbf_jax.models.attention import QUERY_BLOCK, RopeScaling, Visibility, rotary
from rlbf_jax.models.config import ModelConfig, Positions
from rlbf_jax.models.kv_cache import KVCache
from rlbf_jax.models.layers import Angles, Layer, make_norm, times_table
from rlbf_jax.models.prefixed import Prefix
from rlbf_jax.parallel.axes import constrain


class Block(nn.Module):
    """The repeating block, or its beginning: one layer a window.
    Carries the stream, returns keys and values."""

    config: ModelConfig
    windows: tuple[int | None, ...]

    def setup(self):
        self.layers = [Layer(self.config, window) for window in self.windows]

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

    def extend(self, x, angles, position, prefixes, prefix_position, keep):
        kept = []
        for number, (layer, prefix) in enumerate(zip(self.layers, prefixes, strict=True), 1):
            columns = keep if number == len(self.layers) else x.shape[1]
            x, pair = layer.extend(x, angles, position, prefix, prefix_position, columns)
            kept.append(pair)
        return x, tuple(kept)


def _remat(config: ModelConfig, prevent_cse: bool = True) -> type[Block]:
    """`Block` under the policy that `config.remat` names.
    A scan keeps apart by itself what is computed twice."""
    if config.remat == "none":
        return Block
    policy = (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
    )
    return nn.remat(Block, prevent_cse=prevent_cse, policy=policy)


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
        if c.lora.trains_rows:
            # What training adds to rows of the tables; where the tables are one, so are these.
            shape = (c.lora.rows, c.width)
            self.embedding_rows = self.param(
                "embedding_rows", nn.initializers.zeros, shape, jnp.float32
            )
            if not c.tied_embeddings:
                self.unembedding_rows = self.param(
                    "unembedding_rows", nn.initializers.zeros, shape, jnp.float32
                )
        if c.learned_positions:
            self.position_embedding = self.param(
                "position_embedding", init, (c.max_positions, c.width), dtype
            )
        block = _remat(c, prevent_cse=not c.scan_layers)
        if c.scan_layers and c.repeats:
            self.stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=c.repeats,
            )(c, c.windows)
        # After a scan only the remainder has a block of its own, under the name it has without one.
        plain = _remat(c)
        for number in self._unrolled:
            setattr(
                self,
                f"blocks_{number}",
                plain(c, c.windows[: c.num_layers - number * len(c.windows)]),
            )
        self.final_norm = make_norm(c)

    @property
    def _unrolled(self) -> range:
        """Numbers of the blocks that are not scanned over."""
        c = self.config
        return range(c.repeats if c.scan_layers else 0, c.repeats + (c.remainder > 0))

    @property
    def _blocks(self) -> list[Block]:
        return [getattr(self, f"blocks_{number}") for number in self._unrolled]

    def __call__(
        self, tokens: Array, visibility: Visibility
    ) -> tuple[Array, tuple[tuple[Array, Array], ...]]:
        """Whole rows at once.

        Args:
          tokens: [B, T] int32.
          visibility: who may attend to whom; its positions feed the position embedding.

        Returns:
          hidden [B, T, D] after the final norm, and (key, value)
          [B, K, T, H] of every layer, in order.

        Raises ValueError for rows longer than the table of learned positions (see `widest_row`).
        """
        c = self.config
        widest = widest_row(c)
        if widest is not None and tokens.shape[1] > widest:
            raise ValueError(
                f"rows of {tokens.shape[1]} ids; this model has {c.max_positions} positions"
            )
        x = constrain(self._embed(tokens, visibility.position), "rows", None, None)
        angles = self._angles(visibility.position)
        kept: tuple = ()
        if c.scan_layers and c.repeats:
            x, stacked = self.stack(x, angles, visibility)
            kept = tuple((k[r], v[r]) for r in range(c.repeats) for k, v in stacked)
        for block in self._blocks:
            x, pairs = block(x, angles, visibility)
            kept += pairs
        return self.final_norm(x), kept

    def step(
        self, token: Array, position: Array, cache: KVCache, one_hot: bool = False
    ) -> tuple[Array, KVCache]:
        """Feeds one id a row. Needs unrolled layers: see `unrolled`.

        Args:
          token, position: [B] int32.
          cache: what earlier ids left; donate it.

        Returns:
          hidden [B, D] and the cache with this id in slot `position % slots` of every layer.
        """
        x = constrain(self._embed(token[:, None], position[:, None]), "few_rows", None, "embed")
        angles = self._angles(position[:, None])
        positions = tuple(
            kv_cache.write_position(held, position, position % held.shape[1])
            for held in cache.position
        )
        pairs: tuple = ()
        for block in self._blocks:
            here = slice(len(pairs), len(pairs) + len(block.windows))
            caches = tuple(zip(cache.key[here], cache.value[here], strict=True))
            x, kept = block.step(
                x, caches, angles, positions[: len(block.windows)], position, one_hot
            )
            pairs += kept
        keys, values = zip(*pairs, strict=True)
        return self.final_norm(x)[:, 0], KVCache(keys, values, positions)

    def extend(
        self, rows: Array, position: Array, prefix: Prefix, keep: int
    ) -> tuple[Array, tuple]:
        """Feeds ids after a shared prefix. Needs unrolled layers: see `unrolled`.

        Args:
          rows: [B, T, D] rows of the embedding table (`lora.look_up`), so that a gradient with
            respect to them is one of the ids.
          position: [T] int32, of every row.
          keep: hidden states are wanted of this many last columns only (static).

        Returns:
          hidden [B, keep, D] after the final norm, and (key, value) [B, K, T, H] of every layer.
        """
        x = self._place(rows.astype(jnp.dtype(self.config.dtype)), position[None])
        angles = self._angles(position[None])
        pairs: tuple = ()
        blocks = self._blocks
        for block in blocks:
            here = slice(len(pairs), len(pairs) + len(block.windows))
            columns = keep if block is blocks[-1] else rows.shape[1]
            x, kept = block.extend(
                x, angles, position, prefix.pairs[here], prefix.position, columns
            )
            pairs += kept
        return self.final_norm(x), pairs

    def unembed(self, hidden: Array) -> Array:
        """[..., D] -> float32 logits [..., V]."""
        c, table = self.config, self.table()
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = times_table(flat, table.astype(hidden.dtype))
        if c.lora.trains_rows:
            rows = self.embedding_rows if c.tied_embeddings else self.unembedding_rows
            more = jnp.matmul(flat, rows.astype(hidden.dtype).T, preferred_element_type=jnp.float32)
            logits = logits.at[:, c.lora.first_row : c.lora.first_row + c.lora.rows].add(more)
        logits = logits.reshape(*hidden.shape[:-1], table.shape[0])
        if c.final_softcap is not None:
            logits = c.final_softcap * jnp.tanh(logits / c.final_softcap)
        return logits

    def table(self) -> Array:
        """[V, D]: the unembedding."""
        return self.embedding if self.config.tied_embeddings else self.unembedding

    def _embed(self, tokens: Array, position: Array) -> Array:
        c = self.config
        more = self.embedding_rows if c.lora.trains_rows else None
        return self._place(lora.look_up(c, self.embedding, more, tokens), position)

    def _place(self, rows: Array, position: Array) -> Array:
        """Rows of the embedding table as the first layer wants them."""
        c = self.config
        if c.scale_embeddings:
            # Rows of a unit-norm table are scaled to unit variance an entry,
            # as a residual stream wants them.
            rows = rows * jnp.asarray(c.width**0.5, rows.dtype)
        if c.learned_positions:
            # Only padding lies beyond the table: texts are checked to be no longer,
            # and padding must stay finite.
            rows = rows + jnp.take(self.position_embedding, position, axis=0, mode="clip").astype(
                rows.dtype
            )
        return rows

    def _angles(self, position: Array) -> tuple[Angles, Angles]:
        """Rotary embeddings of layers without and with a window."""
        c = self.config
        if c.learned_positions:
            return None, None
        angles = rotary(position, c.head_dim, c.rope_theta, rope_scaling(c))
        if c.rope_local_theta is None:
            return angles, angles
        return angles, rotary(position, c.head_dim, c.rope_local_theta)


class ValueHead(nn.Module):
    """hidden [..., D] and features [..., F] of the trace -> values [...] float32.

    Under REWIND the hidden state has forgotten what was retracted, so the features say it
    (directives used, ids left, a pending category).
    """

    hidden: int = 64

    @nn.compact
    def __call__(self, hidden: Array, features: Array) -> Array:
        x = jnp.concatenate([hidden.astype(jnp.float32), features.astype(jnp.float32)], axis=-1)
        x = jax.nn.silu(nn.Dense(self.hidden)(x))
        return nn.Dense(1, kernel_init=nn.initializers.zeros)(x)[..., 0]


def widest_row(c: Positions) -> int | None:
    """Most columns of whole rows, None without a limit: the learned positions, made up to whole
    blocks where rows are attended to block by block. What lies beyond the table can only be
    padding: whoever pads has checked the text."""
    if not c.learned_positions or c.max_positions is None:
        return None
    return (
        c.max_positions
        if c.max_positions <= QUERY_BLOCK
        else -(-c.max_positions // QUERY_BLOCK) * QUERY_BLOCK
    )


def bucketed(needed: int, bucket: int, least: int = 1) -> int:
    """At least `least`, then multiples of `bucket`, so that few programs compile;
    whole blocks above `QUERY_BLOCK`."""
    if needed <= least:
        return least
    if needed <= QUERY_BLOCK:
        return min(-(-needed // bucket) * bucket, QUERY_BLOCK)
    bucket = math.lcm(bucket, QUERY_BLOCK)
    return -(-needed // bucket) * bucket


def padded_width(c: Positions, needed: int, bucket: int, least: int = 1) -> int:
    """Columns for a text of `needed` ids: `bucketed`, but no more than the model can read."""
    widest, width = widest_row(c), bucketed(needed, bucket, least)
    return width if widest is None else max(needed, min(width, widest))


def rope_scaling(c: ModelConfig) -> RopeScaling | None:
    """How the rotary frequencies of global layers are scaled."""
    if c.rope_scaling == "none":
        return None
    if c.rope_scaling == "linear":
        return RopeScaling(c.rope_factor)
    band = (c.rope_low_freq_factor, c.rope_high_freq_factor)
    return RopeScaling(c.rope_factor, band, c.rope_original_length)


def init(config: ModelConfig, key: Array) -> dict:
    """Random parameters of a decoder, a plain dict of arrays."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    visibility = Visibility(jnp.arange(2, dtype=jnp.int32)[None])
    return Decoder(config).init(key, tokens, visibility)["params"]


def init_adapters(config: ModelConfig, key: Array) -> dict:
    """Fresh adapters of `config.lora`, which change nothing yet; no other parameters are made."""
    if not config.lora.rank:
        raise ValueError("lora.rank is 0: there are no adapters to make")
    return jax.jit(lambda key: lora.split(init(config, key))[0])(key)


def forward(config: ModelConfig, params: dict, tokens: Array, visibility: Visibility):
    """`Decoder.__call__` as a function."""
    return Decoder(config).apply({"params": params}, tokens, visibility)


def step(
    config: ModelConfig, params: dict, token: Array, position: Array, cache: KVCache, one_hot: bool
) -> tuple[Array, KVCache]:
    """`Decoder.step` as a function."""
    stepped: Any = Decoder(config).apply(
        {"params": params}, token, position, cache, one_hot, method="step"
    )
    return stepped


def prefix_of(config: ModelConfig, params: dict, tokens: Array, length: Array | int) -> Prefix:
    """Keys and values of a beginning: `tokens` [P] int32, of which the first `length` are real."""
    position = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    _, pairs = forward(config, params, tokens[None], Visibility(position[None]))
    return Prefix(
        tuple((k[0], v[0]) for k, v in pairs), jnp.where(position < length, position, NEVER)
    )


def extend(
    config: ModelConfig, params: dict, rows: Array, position: Array, prefix: Prefix, keep: int
) -> tuple[Array, tuple]:
    """`Decoder.extend` as a function."""
    extended: Any = Decoder(config).apply(
        {"params": params}, rows, position, prefix, keep, method="extend"
    )
    return extended


def unembed(config: ModelConfig, params: dict, hidden: Array) -> Array:
    """`Decoder.unembed` as a function."""
    return jnp.asarray(Decoder(config).apply({"params": params}, hidden, method="unembed"))


def unembedding(config: ModelConfig, params: dict) -> Array:
    """[V, D] table of the logits."""
    return params["embedding" if config.tied_embeddings else "unembedding"]


def unrolled(config: ModelConfig, params: dict) -> tuple[ModelConfig, dict]:
    """The same model with unrolled layers, as the sampler wants it:
    a scanned cache would be copied at every id."""
    if not config.scan_layers:
        return config, params
    rest = {name: value for name, value in params.items() if name != "stack"}
    blocks = {
        f"blocks_{r}": jax.tree.map(lambda leaf, r=r: leaf[r], params["stack"])
        for r in range(config.repeats)
    }
    return dataclasses.replace(config, scan_layers=False), rest | blocks
