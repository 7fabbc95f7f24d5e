"""A published `config.json` <-> `ModelConfig`.

Both writings of a configuration are read: that of transformers 4 (`rope_theta`, `rope_scaling`,
`sliding_window_pattern`) and that of transformers 5 (`rope_parameters`, `layer_types`). The first
is written, plus `layer_types`, since both versions read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlbf_jax.errors import UserError
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.config_values import (
    MOST,
    MOST_OF,
    count,
    entries,
    flag,
    names,
    positive,
    positive_or_none,
    unsupported,
)
from rlbf_jax.models.families import FAMILIES, ROPE, FamilySpec, same_model

SLIDING, FULL = "sliding_attention", "full_attention"
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu_exact", "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
}  # fmt: skip
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu_pytorch_tanh", "gelu_exact": "gelu"}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The model that a `config.json` describes, in float32.

    Raises UserError, naming the field, for an architecture or a value
    that this decoder cannot compute exactly.
    """
    name, spec = _family_of(hf)
    for field, allowed in {**spec.fixed, "quantization_config": (None,)}.items():
        if hf.get(field, allowed[0]) not in allowed:
            raise unsupported(field, hf[field], f"{allowed[0]!r}")
    seen = {**spec.defaults, **hf}
    fields: dict[str, Any] = {
        ours: _dimension(seen, theirs, ours) for theirs, ours in spec.fields.items()
    }
    # Structure that is always so; what config.json can say follows and wins.
    fields = {**spec.structure, **fields}
    heads = fields["num_heads"]
    fields["num_kv_heads"] = count(seen, "num_key_value_heads", heads) if name != "gpt2" else heads
    fields["head_dim"] = (
        count(seen, "head_dim", fields["width"] // heads)
        if name != "gpt2"
        else fields["width"] // heads
    )
    fields["tied_embeddings"] = flag(seen, "tie_word_embeddings")
    fields["activation"] = _activation(seen, spec.activation_field)
    if name == "gpt2":
        fields["mlp_width"] = count(seen, "n_inner", 4 * fields["width"])
    else:
        fields |= _rope(name, seen) | _biases(name, seen) | _gemma(name, seen)
        fields["windows"] = shortest_pattern(_windows(name, seen, fields["num_layers"]))
    try:
        return ModelConfig(family=name, **fields)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise UserError(f"config.json: {error}") from error


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model, without token ids: `config_from_hf` of it gives `config` again.

    Raises UserError, naming the field, where the family's architecture cannot
    say what `config` says.
    """
    spec = FAMILIES.get(config.family)
    if spec is None:
        raise UserError(
            f"model.family: {config.family!r} has no Hugging Face architecture; expected one of "
            f"{', '.join(FAMILIES)}"
        )
    hf: dict[str, Any] = {"architectures": [spec.architecture], "model_type": spec.model_type}
    hf |= {
        theirs: getattr(config, ours)
        for theirs, ours in spec.fields.items()
        if getattr(config, ours) is not None
    }
    hf |= {"tie_word_embeddings": config.tied_embeddings, "torch_dtype": config.param_dtype}
    if config.activation not in _ACTIVATION_NAMES:
        raise UserError(
            f"model.activation: {config.activation!r} is unknown to {spec.architecture}"
        )
    hf[spec.activation_field] = _ACTIVATION_NAMES[config.activation]
    if config.family == "gpt2":
        hf["n_inner"] = config.mlp_width
        hf["activation_function"] = hf["activation_function"].replace(
            "gelu_pytorch_tanh", "gelu_new"
        )
    else:
        hf |= {"num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim}
        hf |= _rope_to_hf(config) | _windows_to_hf(config)
        if "attention_bias" in spec.defaults:
            hf["attention_bias"] = config.out_bias
        if "mlp_bias" in spec.defaults:
            hf["mlp_bias"] = config.mlp_bias
    if config.family in ("gemma2", "gemma3"):
        scalar = (
            config.head_dim
            if config.query_pre_attn_scalar is None
            else config.query_pre_attn_scalar
        )
        hf |= {"query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
               "attn_logit_softcapping": config.attention_softcap,
               "final_logit_softcapping": config.final_softcap}  # fmt: skip
    _check_same(config, config_from_hf(hf), spec.architecture)
    return hf


def shortest_pattern(windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The shortest beginning of `windows` that, repeated and cut, gives all of them."""
    for size in range(1, len(windows) + 1):
        if all(window == windows[i % size] for i, window in enumerate(windows)):
            return windows[:size]
    return windows


# Reading ------------------------------------------------------------------------------------------


def _family_of(hf: Mapping[str, Any]) -> tuple[str, FamilySpec]:
    named = names(hf, "architectures")
    for name, spec in FAMILIES.items():
        if spec.architecture in named or (not named and hf.get("model_type") == spec.model_type):
            return name, spec
    known = ", ".join(spec.architecture for spec in FAMILIES.values())
    told = named or hf.get("model_type")
    raise UserError(
        f"config.json: architectures is {told!r}, expected one of {known}; other models are not "
        "supported"
    )


def _dimension(hf: Mapping[str, Any], field: str, ours: str) -> float | None:
    if ours == "norm_eps":
        return positive(hf, field)
    if field == "max_position_embeddings" and hf.get(field) is None:
        return None
    return count(hf, field, most=MOST_OF.get(ours, MOST))


def _activation(hf: Mapping[str, Any], field: str) -> str:
    value = hf[field]
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise unsupported(field, value, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _biases(name: str, hf: Mapping[str, Any]) -> dict[str, bool]:
    if name == "qwen2":
        return {"qkv_bias": True}
    biased = flag(hf, "attention_bias")
    return {"qkv_bias": biased, "out_bias": biased, "mlp_bias": flag(hf, "mlp_bias")}


def _gemma(name: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    if name not in ("gemma2", "gemma3"):
        return {}
    return {
        "query_pre_attn_scalar": float(positive(hf, "query_pre_attn_scalar")),
        "attention_softcap": positive_or_none(hf, "attn_logit_softcapping"),
        "final_softcap": positive_or_none(hf, "final_logit_softcapping"),
    }


def _windows(name: str, hf: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """The window of every layer."""
    window = None
    if name != "llama" and (name not in ("qwen2", "qwen3") or flag(hf, "use_sliding_window")):
        window = None if hf.get("sliding_window") is None else count(hf, "sliding_window")
    if name == "mistral" or window is None:
        kinds = [FULL if window is None else SLIDING] * layers
    elif name in ("qwen2", "qwen3"):
        first = count(hf, "max_window_layers", least=0)
        kinds = [SLIDING if i >= first else FULL for i in range(layers)]
    else:
        every = 2 if name == "gemma2" else count(hf, "_sliding_window_pattern", 6)
        every = count(hf, "sliding_window_pattern", every) if name == "gemma3" else every
        kinds = [FULL if (i + 1) % every == 0 else SLIDING for i in range(layers)]
    if hf.get("layer_types") is not None and name not in ("mistral", "llama"):
        kinds = hf["layer_types"]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise UserError(
            f"config.json: layer_types has not one entry for each of the {layers} layers"
        )
    for kind in kinds:
        if kind not in (SLIDING, FULL) or (kind == SLIDING and window is None):
            raise unsupported("layer_types", kind, f"{FULL}, or {SLIDING} with sliding_window")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _rope(name: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    default = 1_000_000.0 if name == "gemma3" else 10_000.0
    theta = float(positive(hf, "rope_theta", default))
    new, old = entries(hf, "rope_parameters"), entries(hf, "rope_scaling")
    local: Mapping[str, Any] = {}
    if name == "gemma3":
        local, new = (
            entries(new, SLIDING, "rope_parameters."),
            entries(new, FULL, "rope_parameters."),
        )
        if local.get("rope_type", "default") != "default":
            raise unsupported(
                f"rope_parameters.{SLIDING}.rope_type", local["rope_type"], "'default'"
            )
    scaling = {**new, **old}
    fields = {"rope_theta": float(positive(scaling, "rope_theta", theta))} | _scaling(scaling)
    if name == "gemma3":
        published = float(positive(hf, "rope_local_base_freq", 10_000.0))
        fields["rope_local_theta"] = float(positive(local, "rope_theta", published))
    factor = scaling.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    if factor not in (None, 1.0):
        raise unsupported("partial_rotary_factor", factor, "1.0")
    return fields


def _scaling(scaling: Mapping[str, Any]) -> dict[str, Any]:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return {}
    if kind not in ("linear", "llama3"):
        raise unsupported("rope_type", kind, "'default', 'linear' or 'llama3'")
    fields = {"rope_scaling": kind, "rope_factor": float(positive(scaling, "factor"))}
    if kind == "llama3":
        fields |= {
            "rope_low_freq_factor": float(positive(scaling, "low_freq_factor")),
            "rope_high_freq_factor": float(positive(scaling, "high_freq_factor")),
            "rope_original_length": count(scaling, "original_max_position_embeddings"),
        }
    return fields


# Writing ------------------------------------------------------------------------------------------


def _rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if config.rope_scaling != "none":
        scaling = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if scaling is not None and config.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_length,
        }
    hf = {"rope_theta": config.rope_theta, "rope_scaling": scaling}
    if config.family == "gemma3":
        hf["rope_local_base_freq"] = config.rope_local_theta or config.rope_theta
    return hf


def _windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    if config.family == "llama":
        return {}
    windows = config.window_of_layer
    sizes = {window for window in windows if window is not None}
    hf: dict[str, Any] = {"sliding_window": next(iter(sizes), None)}
    if config.family == "mistral":
        return hf
    if config.family in ("qwen2", "qwen3"):
        hf["use_sliding_window"] = bool(sizes)
        if sizes:
            hf["max_window_layers"] = next(
                i for i, window in enumerate(windows) if window is not None
            )
    if config.family == "gemma3" and len(config.windows) > 1:
        hf["sliding_window_pattern"] = len(config.windows)
    return hf | {"layer_types": [FULL if window is None else SLIDING for window in windows]}


def _check_same(config: ModelConfig, read: ModelConfig, architecture: str) -> None:
    differing = same_model(config, read)
    if differing:
        # Of rotary fields the one that differs as it is written may be another than the one
        # that differs as it is read.
        name = next(n for n in (*differing, *ROPE) if getattr(config, n) != getattr(read, n))
        raise UserError(
            f"model.{name}: {architecture} cannot say {getattr(config, name)!r} (a reader would "
            "take "
            f"{getattr(read, name)!r}); choose another family, or leave the field as the family "
            "has it"
        )
