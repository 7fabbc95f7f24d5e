"""Tensors of a GGUF file under their published names, as the published checkpoint holds them.

llama.cpp changes two things when it converts: it interleaves the rows of query and key projections
of Llama models (rotary pairs side by side), and stores Gemma's norms as 1 + scale. Both are undone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rlbf_jax.errors import UserError
from rlbf_jax.gguf_file import GgufFile, GgufTensor
from rlbf_jax.models.weights.tensors import StoredTensor

_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_SHARED = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA = _SHARED | {"ffn_norm": "post_attention_layernorm"}
_GEMMA = _SHARED | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONSTANTS = ("rope_freqs.weight",)
"""Read by `config_of_gguf`."""
Change = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class DequantizedTensor(StoredTensor):
    """A tensor that is float32 once it is read."""

    tensor: GgufTensor | None = None
    change: Change | None = None
    """What undoes the conversion; None: nothing."""

    def read(self) -> np.ndarray:
        assert self.tensor is not None
        values = self.tensor.read()
        return values if self.change is None else self.change(values)

    def read_into(self, target: np.ndarray) -> None:
        np.copyto(target.reshape(self.shape), self.read())

    def equals(self, other: StoredTensor) -> bool:
        """Whether both hold the same numbers."""
        return self.shape == other.shape and np.array_equal(self.read(), other.read())


def tensors_of_gguf(file: GgufFile) -> dict[str, StoredTensor]:
    """Every tensor but constants, by its published name. Raises UserError for an unknown one."""
    found: dict[str, StoredTensor] = {}
    for tensor in file.tensors.values():
        if tensor.name not in _CONSTANTS:
            name = _published(tensor.name, file)
            found[name] = _dequantized(name, tensor, _change(tensor.name, file), file.path)
    return found


def _dequantized(name: str, tensor: GgufTensor, change: Change | None, path: Path) -> StoredTensor:
    size = 4 * int(np.prod(tensor.shape, dtype=np.int64))
    return DequantizedTensor(path, name, "F32", tensor.shape, 0, size, tensor, change)


def _published(name: str, file: GgufFile) -> str:
    if name in _TOP:
        return _TOP[name]
    names = _GEMMA if file.architecture.startswith("gemma") else _LLAMA
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in names:
        raise UserError(f"{file.path}: tensor {name} is unknown to a {file.architecture} model")
    return f"model.layers.{match[1]}.{names[match[2]]}.{match[3]}"


def _change(name: str, file: GgufFile) -> Change | None:
    if file.architecture.startswith("gemma") and name.endswith("norm.weight"):
        return lambda values: values - np.float32(1)
    match = _LAYER.fullmatch(name)
    if file.architecture != "llama" or match is None or match[2] not in ("attn_q", "attn_k"):
        return None
    heads = file.count("attention.head_count")
    if match[2] == "attn_k":
        heads = file.count("attention.head_count_kv", heads)
    return lambda values: _halves(values, heads)


def _halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head with the first of all rotary pairs before the second ones."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
