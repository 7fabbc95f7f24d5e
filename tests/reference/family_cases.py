"""The tiny models of the family tests: configurations as transformers saves them,
and weights from a tensor's name.

Pure numpy, read by the tests and by `make_families.py`, so that weights need not be stored.
"""

from __future__ import annotations

import zlib

import numpy as np

VOCAB, TIME = 48, 32
FIRST_CONTROL = 44
"""Ids from here on are control ids of the sampler's rule,
which greedy decoding leaves out on both sides."""
PROMPT, DRAWN = 6, 64

_SHAPE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
_LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
_LOCAL, _FULL = "sliding_attention", "full_attention"

# Name -> (configuration class of transformers, its arguments).
# Windows and trained lengths are shorter than the rows.
CASES: dict[str, tuple[str, dict]] = {
    "gemma2": (
        "Gemma2Config",
        _SHAPE | dict(num_hidden_layers=3, head_dim=16, query_pre_attn_scalar=12, sliding_window=7),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        _SHAPE | dict(num_hidden_layers=7, head_dim=16, query_pre_attn_scalar=20, sliding_window=6),
    ),
    "gemma3_scaled": (
        "Gemma3TextConfig",
        _SHAPE
        | dict(
            num_hidden_layers=3, head_dim=8, query_pre_attn_scalar=8, sliding_window=5,
            layer_types=[_LOCAL, _FULL, _LOCAL],
            rope_parameters={
                _LOCAL: {"rope_type": "default", "rope_theta": 100.0},
                _FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
            },
        ),
    ),
    "llama": (
        "LlamaConfig",
        _SHAPE | dict(rms_norm_eps=1e-5, tie_word_embeddings=True, rope_parameters=_LLAMA3),
    ),
    "llama_biased": (
        "LlamaConfig",
        _SHAPE
        | dict(
            num_key_value_heads=4, head_dim=12, attention_bias=True, mlp_bias=True,
            hidden_act="gelu",
        ),
    ),
    "qwen2": ("Qwen2Config", _SHAPE | dict(tie_word_embeddings=True)),
    "qwen2_windowed": (
        "Qwen2Config", _SHAPE | dict(use_sliding_window=True, sliding_window=9, max_window_layers=1)
    ),
    "qwen3": ("Qwen3Config", _SHAPE | dict(head_dim=16)),
    "mistral": ("MistralConfig", _SHAPE | dict(head_dim=8, sliding_window=8)),
    "gpt2": ("GPT2Config", dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
}  # fmt: skip


def weight(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """float32 numbers of one published tensor, all of which matter;
    the same for the same name, shape and seed."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    draws = rng.standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return draws * np.float32(
            0.35 if "wte" in name or "embed" in name or "lm_head" in name else 0.25
        )
    return draws * np.float32(0.2) + np.float32(name.endswith("weight"))


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids [3, TIME] and which of them are real: a whole row,
    one padded on the left, one on the right."""
    rng = np.random.default_rng([seed, 1])
    ids = rng.integers(0, VOCAB, (3, TIME)).astype(np.int64)
    real = np.ones((3, TIME), np.int64)
    real[1, :5] = 0
    real[2, -9:] = 0
    return ids, real


def gradient_tensors(case: str) -> tuple[str, str, str]:
    """The published tensors whose gradients are compared."""
    if case == "gpt2":
        return (
            "transformer.wte.weight",
            "transformer.h.1.attn.c_attn.weight",
            "transformer.h.0.mlp.c_proj.weight",
        )
    return (
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    )
