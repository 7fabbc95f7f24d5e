"""Which tensor of a published checkpoint is which part of which of our parameters:
one table for each way of naming.

A row says `HF name, our parameter, axes`. Axes are letters: `"kgh d -> dkgh"` reads "the published
tensor is [k g h, d], ours is [d, k, g, h]". `o` has size 1: it stands for a place along an axis
that several tensors share, and the fourth entry of a row says which (`query`, `key`, `value`,
`gate` or `up`). Reading and writing use the same rows in opposite directions.

d width, k key heads, g query heads a key head, h head size, n = k g, f MLP width,
v vocabulary, t positions, c = 3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlbf_jax.models.config import ModelConfig

Row = tuple[str, str, str, str] | tuple[str, str, str]

_ATTENTION: tuple[Row, ...] = (
    ("self_attn.q_proj.weight", "qkv", "kgh d -> dkgh", "query"),
    ("self_attn.k_proj.weight", "qkv", "kh d -> dkoh", "key"),
    ("self_attn.v_proj.weight", "qkv", "kh d -> dkoh", "value"),
    ("self_attn.q_proj.bias", "qkv_bias", "kgh -> kgh", "query"),
    ("self_attn.k_proj.bias", "qkv_bias", "kh -> koh", "key"),
    ("self_attn.v_proj.bias", "qkv_bias", "kh -> koh", "value"),
    ("self_attn.o_proj.weight", "out", "d nh -> nhd"),
    ("self_attn.o_proj.bias", "out_bias", "d -> d"),
    ("self_attn.q_norm.weight", "query_norm/scale", "h -> h"),
    ("self_attn.k_norm.weight", "key_norm/scale", "h -> h"),
    ("mlp.gate_proj.weight", "gate_up", "f d -> dof", "gate"),
    ("mlp.up_proj.weight", "gate_up", "f d -> dof", "up"),
    ("mlp.gate_proj.bias", "gate_up_bias", "f -> of", "gate"),
    ("mlp.up_proj.bias", "gate_up_bias", "f -> of", "up"),
    ("mlp.down_proj.weight", "down", "d f -> fd"),
    ("mlp.down_proj.bias", "down_bias", "d -> d"),
    ("input_layernorm.weight", "attention_norm/scale", "d -> d"),
)


@dataclasses.dataclass(frozen=True)
class Names:
    """One way of naming."""

    prefix: str
    """Of all tensors but `head`; checkpoints of the bare decoder leave it out."""
    layer: str
    rows: tuple[Row, ...]
    """Of every layer."""
    top: tuple[Row, ...]
    head: Row = ("lm_head.weight", "unembedding", "v d -> vd")
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Ends of names of tensors that are constants, not parameters."""


_TOP: tuple[Row, ...] = (
    ("embed_tokens.weight", "embedding", "v d -> vd"),
    ("norm.weight", "final_norm/scale", "d -> d"),
)
LLAMA = Names(
    "model.",
    "layers.{}.",
    (*_ATTENTION, ("post_attention_layernorm.weight", "mlp_norm/scale", "d -> d")),
    _TOP,
)
GEMMA = Names(
    "model.",
    "layers.{}.",
    (
        *_ATTENTION,
        ("post_attention_layernorm.weight", "attention_post_norm/scale", "d -> d"),
        ("pre_feedforward_layernorm.weight", "mlp_norm/scale", "d -> d"),
        ("post_feedforward_layernorm.weight", "mlp_post_norm/scale", "d -> d"),
    ),
    _TOP,
)
GPT2 = Names(
    "transformer.",
    "h.{}.",
    (
        ("ln_1.weight", "attention_norm/scale", "d -> d"),
        ("ln_1.bias", "attention_norm/bias", "d -> d"),
        ("attn.c_attn.weight", "qkv", "d ckh -> dkch"),
        ("attn.c_attn.bias", "qkv_bias", "ckh -> kch"),
        ("attn.c_proj.weight", "out", "nh d -> nhd"),
        ("attn.c_proj.bias", "out_bias", "d -> d"),
        ("ln_2.weight", "mlp_norm/scale", "d -> d"),
        ("ln_2.bias", "mlp_norm/bias", "d -> d"),
        ("mlp.c_fc.weight", "up", "d f -> df"),
        ("mlp.c_fc.bias", "up_bias", "f -> f"),
        ("mlp.c_proj.weight", "down", "f d -> fd"),
        ("mlp.c_proj.bias", "down_bias", "d -> d"),
    ),
    (
        ("wte.weight", "embedding", "v d -> vd"),
        ("wpe.weight", "position_embedding", "t d -> td"),
        ("ln_f.weight", "final_norm/scale", "d -> d"),
        ("ln_f.bias", "final_norm/bias", "d -> d"),
    ),
    ignored=(".attn.bias", ".attn.masked_bias"),
)
NAMES = {"gemma2": GEMMA, "gemma3": GEMMA, "gpt2": GPT2} | dict.fromkeys(
    ("llama", "qwen2", "qwen3", "mistral"), LLAMA
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """One published tensor and where its numbers stand in our parameters."""

    name: str
    shape: tuple[int, ...]
    """As published."""
    path: tuple[str, ...]
    """Of our parameter."""
    index: int | None
    """Along the leading axis of a scanned parameter; None: not scanned."""
    split: tuple[int, ...]
    """The published shape with every axis on its own."""
    order: tuple[int, ...]
    """Transposition of `split` to our axes."""
    axis: int | None = None
    """Shared with other tensors, of which this one has `start`..`stop`; None: nothing is shared."""
    start: int = 0
    stop: int = 0

    def part(self, leaf: Any) -> Any:
        """The view of our parameter (an array) that holds this tensor, in our axes."""
        leaf = leaf if self.index is None else leaf[self.index]
        if self.axis is None:
            return leaf
        return leaf[(slice(None),) * self.axis + (slice(self.start, self.stop),)]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """A view of a published tensor in our axes."""
        return tensor.reshape(self.split).transpose(self.order)

    def to_theirs(self, part: np.ndarray) -> np.ndarray:
        """The published tensor of a part in our axes."""
        return part.transpose(np.argsort(self.order)).reshape(self.shape)

    @property
    def is_whole(self) -> bool:
        """The published tensor is, number for number, our parameter."""
        return (
            self.index is None and self.axis is None and self.order == tuple(range(len(self.order)))
        )


def placements(config: ModelConfig, paths: Sequence[tuple[str, ...]]) -> list[Placement]:
    """Every tensor of a published checkpoint of `config`.

    Args:
      config: a model of a family in `NAMES`.
      paths: of all our parameters (which biases and norms there are).
    """
    names, known = NAMES[config.family], set(paths)
    found = [_place(config, row, names.prefix, (), None) for row in names.top]
    found.append(_place(config, names.head, "", (), None))
    for number in range(config.num_layers):
        repeat, place = divmod(number, len(config.windows))
        scanned = config.scan_layers and repeat < config.repeats
        path = ("stack" if scanned else f"blocks_{repeat}", f"layers_{place}")
        prefix = names.prefix + names.layer.format(number)
        found += [
            _place(config, row, prefix, path, repeat if scanned else None) for row in names.rows
        ]
    return [placement for placement in found if placement.path in known]


def _place(
    config: ModelConfig, row: Row, prefix: str, path: tuple[str, ...], index: int | None
) -> Placement:
    name, parameter, axes = row[:3]
    sizes = _sizes(config)
    theirs, ours = axes.split(" -> ")
    shape = tuple(math.prod(sizes[a] for a in group) for group in theirs.split())
    letters = theirs.replace(" ", "")
    # A place along a shared axis is an axis of size 1 of the published tensor.
    letters += "o" if "o" in ours else ""
    order = tuple(letters.index(a) for a in ours)
    split = tuple(sizes[a] for a in letters)
    place = Placement(prefix + name, shape, (*path, *parameter.split("/")), index, split, order)
    if len(row) == 3:
        return place
    group = config.groups
    start, stop = {"query": (0, group), "key": (group, group + 1), "value": (group + 1, group + 2),
                   "gate": (0, 1), "up": (1, 2)}[row[3]]  # fmt: skip
    return dataclasses.replace(
        place, axis=ours.index("g" if row[3] == "query" else "o"), start=start, stop=stop
    )


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "d": config.width, "k": config.num_kv_heads, "g": config.groups, "h": config.head_dim,
        "n": config.num_heads, "f": config.mlp_width, "v": config.vocab_size,
        "t": config.max_positions or 0, "c": 3, "o": 1,
    }  # fmt: skip
