"""What inspect_ai finds by entry point: the name `rlbf`, and where its provider is.
Nothing heavy is imported yet."""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="rlbf")
def rlbf() -> type[ModelAPI]:
    from rlbf_jax.harness.inspect_provider import RlbfAPI

    return RlbfAPI
