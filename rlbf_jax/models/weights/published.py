"""The toy family as a published architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from rlbf_jax.models.config import ModelConfig


def published_form(config: ModelConfig, params: Mapping[str, Any]) -> tuple[ModelConfig, dict]:
    """The same function with a name that other programs know:
    a `toy` model is a Llama with two tables.

    The toy decoder multiplies rows of its one table by sqrt(width), which Llama does not: so the
    multiplied table becomes the embedding, and the table as it is the unembedding. Logits are equal
    bit by bit where parameters and activations have one dtype; with float32 parameters and bfloat16
    activations rows are rounded once instead of twice. Other families are returned as they are. A
    toy model that was given what Llama has not (windows, soft caps, ...) is refused when its
    config.json is written.
    """
    if config.family != "toy":
        return config, dict(params)
    made = dict(params)
    if config.tied_embeddings and config.scale_embeddings:
        made["unembedding"] = params["embedding"]
    if config.scale_embeddings:
        table = params["embedding"]
        made["embedding"] = table * jnp.asarray(config.width**0.5, table.dtype)
    tied = config.tied_embeddings and not config.scale_embeddings
    return dataclasses.replace(
        config, family="llama", scale_embeddings=False, tied_embeddings=tied
    ), made
