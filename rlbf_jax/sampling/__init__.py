"""Requests in, generations out; `score` reads the log-probabilities of what was sampled.

    from rlbf_jax.sampling import Policy, Request, Sampler, SamplerConfig, Single, score

Names are imported when they are first used, so that the room's name costs no jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlbf_jax.sampling.policy import Policy
    from rlbf_jax.sampling.program import Contrast, LinearMix, Program, Single, TwoPrompts
    from rlbf_jax.sampling.request import Generation, Knobs, Request
    from rlbf_jax.sampling.sampler import Sampler, SamplerConfig
    from rlbf_jax.sampling.scoring import Scores, Traces, pack_traces, score

_PLACES = {
    "policy": ("Policy",),
    "program": ("Contrast", "LinearMix", "Program", "Single", "TwoPrompts"),
    "request": ("Generation", "Knobs", "Request"),
    "sampler": ("Sampler", "SamplerConfig"),
    "scoring": ("Scores", "Traces", "pack_traces", "score"),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "Contrast",
    "Generation",
    "Knobs",
    "LinearMix",
    "Policy",
    "Program",
    "Request",
    "Sampler",
    "SamplerConfig",
    "Scores",
    "Single",
    "Traces",
    "TwoPrompts",
    "pack_traces",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
