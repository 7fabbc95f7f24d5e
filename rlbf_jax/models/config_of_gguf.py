"""What a GGUF file says of its model, as the `config.json` of the same model.

Names of fields: llama.cpp's `gguf-py/gguf/constants.py`. What the file does not say comes from the
family as its authors published it, and `remarks` says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from rlbf_jax.errors import UserError
from rlbf_jax.gguf_file import GgufFile
from rlbf_jax.models.attention import RopeScaling, rotary_frequencies

HfConfig = dict[str, Any]
GEMMA3_PATTERN, GEMMA3_LOCAL_BASE = 6, 10_000.0
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""As every published Llama 3.1 to 3.3 has it; `rope_freqs.weight` is compared with it."""


@dataclasses.dataclass(frozen=True)
class Told:
    """A configuration, and what of it the file does not say."""

    config: HfConfig
    remarks: tuple[str, ...] = ()


def config_of_gguf(file: GgufFile) -> Told:
    """The `config.json` of the model in a file.

    Raises UserError for another architecture than those of `FAMILIES`, a field that is missing, or
    rotary scaling of an unknown kind.
    """
    make = FAMILIES.get(file.architecture)
    if make is None:
        raise UserError(
            f"{file.path}: architecture {file.architecture!r}, expected one of "
            f"{', '.join(FAMILIES)}"
        )
    own, remarks = make(file)
    return Told(_common(file) | own | _token_ids(file), tuple(remarks))


def _common(file: GgufFile) -> HfConfig:
    of = file.of_architecture
    heads, width = file.count("attention.head_count"), file.count("embedding_length")
    return {
        "hidden_size": width,
        "intermediate_size": file.count("feed_forward_length"),
        "num_hidden_layers": file.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.count("attention.head_count_kv", heads),
        "head_dim": int(of("attention.key_length", width // heads)),
        "max_position_embeddings": file.count("context_length"),
        "vocab_size": _tensor_shape(file, "token_embd.weight")[0],
        "rms_norm_eps": _shortest(file.needs_own("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(of("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_rope_scaling(file),
    }


def _rope_scaling(file: GgufFile) -> HfConfig:
    kind = file.of_architecture("rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        return {"rope_scaling": _llama3(file)}
    if kind in ("none", None):
        return {}
    if kind != "linear":
        raise UserError(f"{file.path}: rope.scaling.type is {kind!r}, expected none or linear")
    factor = float(file.needs_own("rope.scaling.factor"))
    return {"rope_scaling": {"rope_type": "linear", "factor": factor}}


def _llama3(file: GgufFile) -> HfConfig:
    """Llama 3's scaling, which is in the file as the factor of each frequency alone.

    Raises UserError where the factors are not those of the published constants."""
    factors = file.tensors["rope_freqs.weight"].read()
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3}
    base = float(file.of_architecture("rope.freq_base", 10_000.0))
    expected = llama3_factors(base, 2 * len(factors), scaling)
    if not np.allclose(factors, expected, rtol=1e-4):
        raise UserError(
            f"{file.path}: rope_freqs.weight is not Llama 3's scaling by {scaling['factor']:g}; "
            "such frequencies are not supported"
        )
    return scaling


def llama3_factors(base: float, head_dim: int, scaling: HfConfig) -> np.ndarray:
    """By what each rotary frequency is divided, [head_dim / 2] float32."""
    band = (scaling["low_freq_factor"], scaling["high_freq_factor"])
    scaled = RopeScaling(scaling["factor"], band, scaling["original_max_position_embeddings"])
    plain = rotary_frequencies(head_dim, base)
    return np.asarray(plain / rotary_frequencies(head_dim, base, scaled))


def _token_ids(file: GgufFile) -> HfConfig:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    return {
        theirs: value
        for ours, theirs in names.items()
        if (value := file.token_id(ours)) is not None
    }


# Families -----------------------------------------------------------------------------------------

Family = tuple[HfConfig, list[str]]


def _llama(file: GgufFile) -> Family:
    own = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": False,
    }
    window = "no sliding window (a Mistral of before 0.2 has one of 4,096, which no file says)"
    return own, [window]


def _qwen(architecture: str, model_type: str) -> Callable[[GgufFile], Family]:
    def make(file: GgufFile) -> Family:
        own = {
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_act": "silu",
            "use_sliding_window": False,
        }
        return own, []

    return make


def _gemma2(file: GgufFile) -> Family:
    own = _gemma(file, "Gemma2ForCausalLM", "gemma2") | {
        "attn_logit_softcapping": float(file.of_architecture("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": float(file.of_architecture("final_logit_softcapping", 30.0)),
    }
    scalar, remark = _query_scalar(file, largest=46)
    return own | scalar, [remark, "every second layer has a sliding window"]


def _gemma3(file: GgufFile) -> Family:
    own = _gemma(file, "Gemma3ForCausalLM", "gemma3_text") | {
        "rope_theta": _shortest(file.of_architecture("rope.freq_base", 1_000_000.0)),
        "rope_local_base_freq": GEMMA3_LOCAL_BASE,
        "sliding_window_pattern": GEMMA3_PATTERN,
    }
    scalar, remark = _query_scalar(file, largest=62)
    pattern = f"every {GEMMA3_PATTERN}th layer sees all"
    return own | scalar, [
        remark,
        f"{pattern}, the others a window with rotary base {GEMMA3_LOCAL_BASE:,.0f}",
    ]


def _gemma(file: GgufFile, architecture: str, model_type: str) -> HfConfig:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": int(file.needs_own("attention.sliding_window")),
    }


def _query_scalar(file: GgufFile, largest: int) -> tuple[HfConfig, str]:
    """Queries are divided by the root of the head size; in the largest model of a generation, which
    has so many layers, of width / heads."""
    heads, width = file.count("attention.head_count"), file.count("embedding_length")
    own = int(file.of_architecture("attention.key_length", width // heads))
    scalar = width // heads if file.count("block_count") == largest else own
    return {"query_pre_attn_scalar": scalar}, f"query_pre_attn_scalar {scalar}"


FAMILIES: dict[str, Callable[[GgufFile], Family]] = {
    "llama": _llama,
    "qwen2": _qwen("Qwen2ForCausalLM", "qwen2"),
    "qwen3": _qwen("Qwen3ForCausalLM", "qwen3"),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}
"""By the architecture's name in files; Mistral's and SmolLM's say llama."""


# Values -------------------------------------------------------------------------------------------


def _tensor_shape(file: GgufFile, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise UserError(f"{file.path}: tensor {name} is missing; copy the file again")
    return file.tensors[name].shape


def _shortest(value: float) -> float:
    """A float32 of the file as the shortest decimal that gives it: 1e-05, not 9.99999974738e-06."""
    return float(str(np.float32(value)))
