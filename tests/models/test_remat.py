"""What the backward pass recomputes: values and gradients stay, memory falls."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.config import ModelConfig, Remat, upgraded
from rlbf_jax.plain import differences
from rlbf_jax.runs.manifest import read_manifest
from rlbf_jax.training.model_folder import config_of

POLICIES = typing.get_args(Remat)
SHAPE = ModelConfig(
    vocab_size=48, num_layers=2, width=24, num_heads=2, num_kv_heads=1, head_dim=12, mlp_width=40
)
POSITION = jnp.arange(16, dtype=jnp.int32)[None].repeat(2, 0)


def gradient(config: ModelConfig):
    weights = jnp.cos(jnp.arange(config.width))

    def loss(params, tokens):
        return jnp.sum(
            transformer.forward(config, params, tokens, Visibility(POSITION))[0] * weights
        )

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_values_and_gradients_are_the_same(scan_layers):
    plain = dataclasses.replace(SHAPE, scan_layers=scan_layers)
    tokens = jax.random.randint(jax.random.key(1), POSITION.shape, 0, 48)
    params = jax.jit(transformer.init, static_argnums=0)(plain, jax.random.key(0))
    value, slopes = gradient(plain)(params, tokens)
    assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(slopes))
    for policy in POLICIES[1:]:
        config = dataclasses.replace(plain, remat=policy)
        shapes = jax.eval_shape(lambda c=config: transformer.init(c, jax.random.key(0)))
        assert jax.tree.structure(shapes) == jax.tree.structure(params)
        again, other = gradient(config)(params, tokens)
        np.testing.assert_allclose(value, again, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), slopes, other
        )


def test_each_policy_keeps_less():
    """Scanned layers: XLA's CPU backend merges what unrolled layers compute twice."""
    config = dataclasses.replace(SHAPE, num_layers=6, scan_layers=True)
    params = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct(POSITION.shape, jnp.int32)

    def kept(policy):
        compiled = (
            gradient(dataclasses.replace(config, remat=policy)).lower(params, tokens).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, block = (kept(policy) for policy in ("none", "dots", "block"))
    assert block < 0.9 * dots < 0.9 * 0.9 * none


def test_unknown_policies_are_refused():
    for wrong in (True, "full"):
        with pytest.raises(ValueError, match=f"remat is {wrong!r}, expected none, block, dots"):
            ModelConfig(remat=wrong)


def test_models_and_runs_of_earlier_versions_are_read(tmp_path):
    """They hold a bool."""
    for old, new in ((False, "none"), (True, "block"), ("dots", "dots")):
        fields = json.loads(json.dumps(dataclasses.asdict(SHAPE) | {"remat": old}))
        assert config_of(fields, Path("stage")) == dataclasses.replace(SHAPE, remat=new)
        stored = {"format": 2, "config": {"model": fields}, "stages": [], "shared": {}}
        (tmp_path / "manifest.json").write_text(json.dumps(stored))
        there = read_manifest(tmp_path).config["model"]
        now = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(SHAPE, remat=new))))
        assert differences(there, now) == []
    assert upgraded({"width": 3}) == {"width": 3}
