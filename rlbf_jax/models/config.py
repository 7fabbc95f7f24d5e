"""Everything that model families differ by, as fields of one dataclass;
`families.py` fills them in."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from rlbf_jax.ranges import check_at_least, check_positive

LoraTarget = Literal["qkv", "out", "up", "down"]
"""Projections of a layer: queries, keys and values (which share one A); the attention's output; the
MLP's way in (gate and up share one A) and its way out."""

Family = Literal["toy", "gemma2", "gemma3", "llama", "qwen2", "qwen3", "mistral", "gpt2"]
Remat = Literal["none", "block", "dots"]


class Positions(Protocol):
    """What bounds the width of rows: a `ModelConfig`, or whatever else gives logits."""

    @property
    def learned_positions(self) -> bool: ...

    @property
    def max_positions(self) -> int | None: ...


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al., arXiv 2106.09685):
    W + alpha / rank * A B with W frozen; see `models.lora`."""

    rank: int = 0
    """0: no adapters, every parameter is trained."""
    alpha: float = 16.0
    targets: tuple[LoraTarget, ...] = ("qkv", "out", "up", "down")
    first_row: int = 0
    """The first of the rows of the embedding (and the unembedding) that are trained as well."""
    rows: int = 0
    """How many; recipes set both to the tokenizer's control ids."""

    def __post_init__(self):
        check_at_least(self, 0, "rank", "first_row", "rows")
        check_positive(self, "alpha")
        unknown = set(self.targets) - set(typing.get_args(LoraTarget))
        if unknown or len(set(self.targets)) < len(self.targets):
            known = ", ".join(typing.get_args(LoraTarget))
            raise ValueError(f"targets is {self.targets}, expected some of {known}, each once")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def trains_rows(self) -> bool:
        return self.rank > 0 and self.rows > 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a decoder."""

    family: Family = "toy"
    """How checkpoints of it are named and written;
    `families.styled` fills in the fields that make a family."""
    vocab_size: int = 1024
    """Ids, control ids included. Recipes set it from the tokenizer."""
    num_layers: int = 3
    width: int = 96
    num_heads: int = 3
    num_kv_heads: int = 3
    head_dim: int = 32
    mlp_width: int = 256
    activation: Literal["silu", "gelu", "gelu_exact", "relu2"] = "silu"
    """Of the gate, or of the hidden layer of an MLP without one. `gelu` is the tanh approximation.
    """
    gated_mlp: bool = True
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    """RMSNorm; RMSNorm whose factor is 1 + scale; LayerNorm with a bias."""
    post_norms: bool = False
    """Norms also after attention and MLP, before they are added to the stream."""
    qk_norm: bool = False
    """Norms of queries and keys within each head, before the rotary embedding."""
    qkv_bias: bool = False
    out_bias: bool = False
    """Of the attention's output."""
    mlp_bias: bool = False
    query_pre_attn_scalar: float | None = None
    """Queries are scaled by this ** -0.5; None: `head_dim`."""
    scale_embeddings: bool = True
    """Rows of the embedding are multiplied by sqrt(width)."""
    learned_positions: bool = False
    """A table of `max_positions` rows instead of rotary embeddings."""
    max_positions: int | None = None
    """Longest text the model was made for. A limit with learned positions, a remark otherwise."""
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None
    """Of layers with a window, which then take no scaling; None: as the others."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: float = 1.0
    """Positions (`linear`), or the slow frequencies (`llama3`), are divided by this."""
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    """`llama3`: frequencies that turn fewer than `low` times within this length are slow, more than
    `high` fast."""
    norm_eps: float = 1e-6
    tied_embeddings: bool = True
    windows: tuple[int | None, ...] = (None,)
    """Attention windows of the repeating block of layers; None is global. Layers beyond the last
    whole block take the block's first windows."""
    attention_softcap: float | None = None
    final_softcap: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and the cache. Norms, softmax and logits are float32 always."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = False
    """Scan over the repeating block: compiles in constant time, for deep models.
    Unrolled runs faster when shallow."""
    remat: Remat = "none"
    """What the backward pass computes again instead of keeping it: nothing; all of a repeating
    block of layers but its input (`block`); or the same but for products with weights (`dots`: more
    memory, less to compute)."""
    lora: LoraConfig = LoraConfig()
    """Adapters. In a run, `base` is trained whole,
    and every later stage trains adapters of it alone."""

    def __post_init__(self):
        check_at_least(self, 1, "vocab_size", "num_layers", "width", "mlp_width")
        check_at_least(
            self,
            1,
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
            "rope_original_length",
        )
        check_positive(
            self, "rope_theta", "norm_eps", "attention_softcap", "final_softcap", "rope_local_theta"
        )
        check_positive(
            self,
            "rope_factor",
            "rope_low_freq_factor",
            "rope_high_freq_factor",
            "query_pre_attn_scalar",
        )
        if not self.windows or any(w is not None and w < 1 for w in self.windows):
            raise ValueError(
                f"windows is {self.windows}, expected one entry or more, each 1 or more, or None"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.remat not in typing.get_args(Remat):
            raise ValueError(
                f"remat is {self.remat!r}, expected {', '.join(typing.get_args(Remat))}"
            )
        if self.head_dim % 2 and not self.learned_positions:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")
        if self.learned_positions and self.max_positions is None:
            raise ValueError("max_positions is None, expected the number of learned positions")
        if (
            self.rope_scaling == "llama3"
            and self.rope_low_freq_factor >= self.rope_high_freq_factor
        ):
            raise ValueError(
                f"rope_low_freq_factor {self.rope_low_freq_factor} is not below "
                f"rope_high_freq_factor {self.rope_high_freq_factor}"
            )

    @property
    def groups(self) -> int:
        """Query heads a key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def repeats(self) -> int:
        """Whole repeating blocks."""
        return self.num_layers // len(self.windows)

    @property
    def remainder(self) -> int:
        """Layers after the last whole block."""
        return self.num_layers % len(self.windows)

    @property
    def window_of_layer(self) -> tuple[int | None, ...]:
        return self.windows * self.repeats + self.windows[: self.remainder]


def upgraded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stored model, as this version spells them: `remat` was a bool."""
    remat = fields.get("remat")
    return (
        {**fields, "remat": "block" if remat else "none"}
        if isinstance(remat, bool)
        else dict(fields)
    )
