"""The families: what makes each one, and when two configurations describe one model.

Adding a family is adding a `FamilySpec`;
if it names its tensors differently, also a table in `weights/mapping.py`.
What a family's `config.json` says is read and written in `published_config.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlbf_jax.models.config import ModelConfig

_LLAMA_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_eps",
}
_GPT2_FIELDS = {
    "vocab_size": "vocab_size",
    "n_embd": "width",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_positions": "max_positions",
    "layer_norm_epsilon": "norm_eps",
}
_GEMMA = dict(activation="gelu", norm="rms_plus_one", post_norms=True)
_PLAIN = dict(scale_embeddings=False)


@dataclasses.dataclass(frozen=True)
class FamilySpec:
    """One family."""

    architecture: str
    """`architectures` of its config.json."""
    model_type: str
    structure: Mapping[str, Any]
    """Fields of `ModelConfig` that make the family."""
    defaults: Mapping[str, Any]
    """Of config.json: values of fields that may be missing there, as transformers fills them in."""
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """Of config.json: fields that change the model and the values that we can compute."""
    fields: Mapping[str, str] = dataclasses.field(default_factory=lambda: _LLAMA_FIELDS)
    """Of config.json: numbers that are fields of `ModelConfig`."""
    activation_field: str = "hidden_act"


_ROTARY = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": None,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_GEMMA_DEFAULTS = _ROTARY | {
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "attention_bias": False, "head_dim": 256,
}  # fmt: skip
_QWEN = _ROTARY | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, FamilySpec] = {
    "gemma2": FamilySpec(
        "Gemma2ForCausalLM",
        "gemma2",
        _GEMMA | dict(windows=(4096, None), attention_softcap=50.0, final_softcap=30.0),
        _GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {"use_bidirectional_attention": (None, False)},
        activation_field="hidden_activation",
    ),
    "gemma3": FamilySpec(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _GEMMA
        | dict(qk_norm=True, windows=(512,) * 5 + (None,), rope_theta=1_000_000.0,
               rope_local_theta=10_000.0),
        _GEMMA_DEFAULTS | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        {"use_bidirectional_attention": (None, False)},
        activation_field="hidden_activation",
    ),
    "llama": FamilySpec(
        "LlamaForCausalLM",
        "llama",
        _PLAIN | dict(norm_eps=1e-5, rope_theta=500_000.0),
        _ROTARY | {"attention_bias": False, "mlp_bias": False},
    ),
    "qwen2": FamilySpec(
        "Qwen2ForCausalLM", "qwen2", _PLAIN | dict(qkv_bias=True, rope_theta=1_000_000.0), _QWEN
    ),
    "qwen3": FamilySpec(
        "Qwen3ForCausalLM",
        "qwen3",
        _PLAIN | dict(qk_norm=True, rope_theta=1_000_000.0),
        _QWEN | {"attention_bias": False, "head_dim": 128},
    ),
    "mistral": FamilySpec(
        "MistralForCausalLM",
        "mistral",
        _PLAIN | dict(norm_eps=1e-5, windows=(4096,), tied_embeddings=False),
        _ROTARY | {"sliding_window": 4096},
    ),
    "gpt2": FamilySpec(
        "GPT2LMHeadModel",
        "gpt2",
        _PLAIN
        | dict(norm="layer", norm_eps=1e-5, gated_mlp=False, activation="gelu", qkv_bias=True,
               out_bias=True, mlp_bias=True, learned_positions=True, max_positions=1024),
        {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_positions": 1024,
         "tie_word_embeddings": True},
        {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
         "add_cross_attention": (False,)},
        fields=_GPT2_FIELDS,
        activation_field="activation_function",
    ),
}  # fmt: skip
ROPE = ("rope_theta", "rope_local_theta", "rope_scaling", "rope_factor", "rope_low_freq_factor",
         "rope_high_freq_factor", "rope_original_length")  # fmt: skip
"""Fields of the rotary embeddings."""
_ROPE_READ = {"none": ROPE[:3], "linear": ROPE[:4], "llama3": ROPE}
"""By the kind of scaling."""
_NUMERICS = ("dtype", "param_dtype", "scan_layers", "remat")
"""Fields that say how a model is computed, not which."""


def styled(config: ModelConfig) -> ModelConfig:
    """`config` with what makes its family, in the fields that are still at their defaults."""
    spec = FAMILIES.get(config.family)
    if spec is None:
        return config
    plain = ModelConfig()
    chosen = {
        name: value
        for name, value in spec.structure.items()
        if getattr(config, name) == getattr(plain, name)
    }
    return dataclasses.replace(config, **chosen)


def same_model(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Names of the fields in which two configurations describe different models."""

    def plain(c: ModelConfig) -> dict[str, Any]:
        values = dataclasses.asdict(c) | {"windows": c.window_of_layer}
        values["query_pre_attn_scalar"] = float(c.query_pre_attn_scalar or c.head_dim)
        values |= _rope_that_counts(c)
        return {name: value for name, value in values.items() if name not in _NUMERICS}

    left, right = plain(a), plain(b)
    return [name for name in left if left[name] != right[name]]


def _rope_that_counts(c: ModelConfig) -> dict[str, Any]:
    """The fields of the rotary embeddings as `Decoder._angles` reads them,
    None where no layer does."""
    nothing: dict[str, Any] = dict.fromkeys(ROPE)
    if c.learned_positions:
        return nothing
    read = nothing | {name: getattr(c, name) for name in _ROPE_READ[c.rope_scaling]}
    windowed = [window is not None for window in c.window_of_layer]
    if all(windowed) and c.rope_local_theta is not None:
        # The one base of the model; what global layers would take is unread.
        return nothing | {"rope_theta": c.rope_local_theta, "rope_scaling": "none"}
    if not any(windowed) or (c.rope_local_theta == c.rope_theta and c.rope_scaling == "none"):
        read["rope_local_theta"] = None
    return read
