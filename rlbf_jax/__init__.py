"""Language models that take back what they should not have said, in JAX.

    import rlbf_jax as rj

    policy = rj.load("runs/quickstart")
    print(policy.sample(["Tell me about gardening."])[0].text)

Names are imported when they are first used, so that `import rlbf_jax` costs neither jax nor numpy.
`docs/api.md` has a short story for each.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlbf_jax.directives import Semantics
    from rlbf_jax.methods import METHODS
    from rlbf_jax.runs.execute import run
    from rlbf_jax.runs.experiment import BaseConfig, DataConfig, Experiment
    from rlbf_jax.runs.load import load, open_run
    from rlbf_jax.sampling.policy import Policy
    from rlbf_jax.sampling.request import Generation, Knobs, Request
    from rlbf_jax.sampling.sampler import Sampler, SamplerConfig
    from rlbf_jax.sampling.scoring import score

__version__ = "0.2.0"

_PLACES = {
    "directives": ("Semantics",),
    "methods": ("METHODS",),
    "runs.execute": ("run",),
    "runs.experiment": ("BaseConfig", "DataConfig", "Experiment"),
    "runs.load": ("load", "open_run"),
    "sampling.policy": ("Policy",),
    "sampling.request": ("Generation", "Knobs", "Request"),
    "sampling.sampler": ("Sampler", "SamplerConfig"),
    "sampling.scoring": ("score",),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "METHODS",
    "BaseConfig",
    "DataConfig",
    "Experiment",
    "Generation",
    "Knobs",
    "Policy",
    "Request",
    "Sampler",
    "SamplerConfig",
    "Semantics",
    "__version__",
    "load",
    "open_run",
    "run",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
