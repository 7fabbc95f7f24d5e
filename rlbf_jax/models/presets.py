"""Published sizes. Numbers are those of the `config.json` published on the Hugging Face hub
under the name above it."""

from __future__ import annotations

import dataclasses

from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.families import styled

_LLAMA3 = styled(
    ModelConfig(
        family="llama", vocab_size=128_256, max_positions=131_072,
        rope_scaling="llama3", rope_factor=32.0, rope_original_length=8192, tied_embeddings=True,
    )
)  # fmt: skip
_GEMMA2 = styled(
    ModelConfig(
        family="gemma2",
        vocab_size=256_000,
        head_dim=256,
        max_positions=8192,
        query_pre_attn_scalar=256.0,
    )
)

PRESETS: dict[str, ModelConfig] = {
    # google/gemma-2-2b
    "gemma2_2b": dataclasses.replace(
        _GEMMA2, num_layers=26, width=2304, num_heads=8, num_kv_heads=4, mlp_width=9216
    ),
    # google/gemma-2-9b
    "gemma2_9b": dataclasses.replace(
        _GEMMA2, num_layers=42, width=3584, num_heads=16, num_kv_heads=8, mlp_width=14_336
    ),
    # google/gemma-3-1b-pt
    "gemma3_1b": styled(
        ModelConfig(
            family="gemma3", vocab_size=262_144, num_layers=26, width=1152, num_heads=4,
            num_kv_heads=1, head_dim=256, mlp_width=6912, max_positions=32_768,
            query_pre_attn_scalar=256.0,
        )
    ),
    # meta-llama/Llama-3.2-1B
    "llama32_1b": dataclasses.replace(
        _LLAMA3, num_layers=16, width=2048, num_heads=32, num_kv_heads=8, head_dim=64,
        mlp_width=8192,
    ),
    # meta-llama/Llama-3.2-3B
    "llama32_3b": dataclasses.replace(
        _LLAMA3, num_layers=28, width=3072, num_heads=24, num_kv_heads=8, head_dim=128,
        mlp_width=8192,
    ),
    # meta-llama/Llama-3.1-8B
    "llama31_8b": dataclasses.replace(
        _LLAMA3, num_layers=32, width=4096, num_heads=32, num_kv_heads=8, head_dim=128,
        mlp_width=14_336, rope_factor=8.0, tied_embeddings=False,
    ),
    # Qwen/Qwen2.5-0.5B
    "qwen25_05b": styled(
        ModelConfig(
            family="qwen2", vocab_size=151_936, num_layers=24, width=896, num_heads=14,
            num_kv_heads=2, head_dim=64, mlp_width=4864, max_positions=32_768,
        )
    ),
    # Qwen/Qwen3-0.6B
    "qwen3_06b": styled(
        ModelConfig(
            family="qwen3", vocab_size=151_936, num_layers=28, width=1024, num_heads=16,
            num_kv_heads=8, head_dim=128, mlp_width=3072, max_positions=40_960,
        )
    ),
}  # fmt: skip
"""Name -> model, in float32 and unrolled; replace `dtype`, `param_dtype`,
`scan_layers` and `remat` as you need."""
