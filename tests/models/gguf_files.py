"""Published checkpoints written as GGUF files: the conversion of llama.cpp, in a few lines."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import gguf
import numpy as np
from sentencepiece import sentencepiece_model_pb2

from rlbf_jax.models.weights.read import find_tensors

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {
    "llama": {"post_attention_layernorm": "ffn_norm"},
    "gemma": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def converted(folder: pathlib.Path) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """(architecture, its fields, tensors under their names in GGUF files, float32)."""
    hf = json.loads((folder / "config.json").read_text())
    name = ARCHITECTURES[hf["architectures"][0]]
    fields = {
        "block_count": hf["num_hidden_layers"],
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "feed_forward_length": hf["intermediate_size"],
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.key_length": hf["head_dim"],
        "attention.layer_norm_rms_epsilon": float(hf["rms_norm_eps"]),
        "rope.freq_base": float(hf["rope_theta"]),
    }
    if name.startswith("gemma"):
        fields["attention.sliding_window"] = hf["sliding_window"]
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if hf.get(field):
            fields[field] = float(hf[field])
    tensors = {}
    for theirs, stored in find_tensors(folder).items():
        values = stored.read().astype(np.float32)
        if theirs.endswith(("q_proj.weight", "k_proj.weight")) and name == "llama":
            query = theirs.endswith("q_proj.weight")
            heads = hf["num_attention_heads" if query else "num_key_value_heads"]
            halves = values.reshape(heads, 2, -1, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if name.startswith("gemma") and theirs.endswith("norm.weight"):
            values = values + np.float32(1)
        tensors[gguf_name(theirs, name)] = values
    return name, fields, tensors


def gguf_name(theirs: str, architecture: str) -> str:
    if theirs in TOP:
        return TOP[theirs]
    _, _, layer, rest = theirs.split(".", 3)
    part, end = rest.rsplit(".", 1)
    family = "gemma" if architecture.startswith("gemma") else "llama"
    return f"blk.{layer}.{(PARTS | NORMS[family])[part]}.{end}"


def write(
    path: pathlib.Path,
    architecture: str,
    fields: dict[str, Any],
    tensors: dict[str, Any],
    tokenizer: dict[str, Any] | None = None,
) -> pathlib.Path:
    """Writes the file. `tensors`: arrays, or (bytes of quantized rows, their type)."""
    writer = gguf.GGUFWriter(path, architecture)
    named = {f"{architecture}.{name}": value for name, value in fields.items()}
    for name, value in (named | (tokenizer or {})).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
               str: writer.add_string, list: writer.add_array}  # fmt: skip
        add[type(value)](name, value)
    for name, value in tensors.items():
        values, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def of_byte_level(folder: pathlib.Path, pre: str, **more: Any) -> dict[str, Any]:
    """Fields of the tokenizer in a folder with a byte-level tokenizer.json."""
    document = json.loads((folder / "tokenizer.json").read_text())
    pieces = {i: (piece, 1) for piece, i in document["model"]["vocab"].items()}
    for token in document["added_tokens"]:
        pieces[token["id"]] = (token["content"], 3 if token["special"] else 4)
    merges = document["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [pieces[i][0] for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [pieces[i][1] for i in range(len(pieces))],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        **_roles(folder, {piece: i for i, (piece, _) in pieces.items()}),
        **more,
    }


def of_sentencepiece(folder: pathlib.Path, **more: Any) -> dict[str, Any]:
    """Fields of the tokenizer in a folder with a tokenizer.model."""
    document = sentencepiece_model_pb2.ModelProto()
    document.ParseFromString((folder / "tokenizer.model").read_bytes())
    pieces = {piece.piece: i for i, piece in enumerate(document.pieces)}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in document.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in document.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in document.pieces],
        "tokenizer.ggml.add_space_prefix": document.normalizer_spec.add_dummy_prefix,
        **_roles(folder, pieces),
        **more,
    }


def _roles(folder: pathlib.Path, ids: dict[str, int]) -> dict[str, int]:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
    texts = {ours: config.get(theirs) for theirs, ours in names.items()}
    texts = {k: v["content"] if isinstance(v, dict) else v for k, v in texts.items()}
    return {f"tokenizer.ggml.{k}_token_id": ids[text] for k, text in texts.items() if text in ids}
