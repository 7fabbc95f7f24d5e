"""Adapters: what they compute, what is trained, and that merging them changes nothing."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from rlbf_jax.directives import Semantics
from rlbf_jax.models import lora, transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.config import LoraConfig, ModelConfig
from rlbf_jax.models.families import styled
from rlbf_jax.models.layers import dense
from rlbf_jax.parallel.mesh import make_mesh
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig
from rlbf_jax.sampling.scoring import pack_traces, score
from rlbf_jax.training.state import init_state, make_update
from rlbf_jax.training.supervised import Rows, supervised_nll, total_weight
from tests.fakes import LetterTokenizer

TOKENIZER = LetterTokenizer()
RULE = TOKENIZER.controls.rule()
ADAPTED = LoraConfig(rank=3, alpha=5.0, first_row=RULE.first_id, rows=RULE.num_controls)
SHAPE = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, num_layers=3, width=24, num_heads=4, num_kv_heads=2,
    head_dim=6, mlp_width=20, max_positions=96, lora=ADAPTED,
)  # fmt: skip
CASES = {
    "tied": SHAPE,
    "untied": dataclasses.replace(SHAPE, tied_embeddings=False),
    "scanned": dataclasses.replace(SHAPE, num_layers=5, scan_layers=True, windows=(4, None)),
    "one target": dataclasses.replace(SHAPE, lora=dataclasses.replace(ADAPTED, targets=("down",))),
    "gemma2": styled(dataclasses.replace(SHAPE, family="gemma2")),
    "gpt2": styled(dataclasses.replace(SHAPE, family="gpt2", num_kv_heads=4)),
    "qwen3": styled(dataclasses.replace(SHAPE, family="qwen3")),
}
FORWARD = jax.jit(transformer.forward, static_argnums=0)
UNEMBED = jax.jit(transformer.unembed, static_argnums=0)


@functools.cache
def adapted(name: str) -> dict:
    """Parameters whose adapters are far from zero."""
    config = CASES[name]
    params = jax.jit(functools.partial(transformer.init, config))(jax.random.key(0))
    flat = traverse_util.flatten_dict(params)
    for number, path in enumerate(sorted(flat)):
        if lora.is_adapter(path[-1]):
            flat[path] = 0.3 * jax.random.normal(jax.random.key(number), flat[path].shape)
    return traverse_util.unflatten_dict(flat)


def logits(config: ModelConfig, params: dict) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 12)).astype(np.int32)
    visibility = Visibility(jnp.arange(12, dtype=jnp.int32)[None].repeat(2, 0))
    with jax.default_matmul_precision("highest"):
        hidden, _ = FORWARD(config, params, tokens, visibility)
        return np.asarray(UNEMBED(config, params, hidden))


@pytest.mark.parametrize("name", CASES)
def test_merged_parameters_give_the_logits_of_the_adapters(name):
    config, params = CASES[name], adapted(name)
    plain, merged = lora.merge(config, params)
    assert plain.lora.rank == 0
    got, expected = logits(plain, merged), logits(config, params)
    assert np.abs(got - expected).max() < 1e-4
    # They do change the model.
    _, frozen = lora.split(params)
    assert np.abs(logits(plain, frozen) - expected).max() > 0.1


def test_merged_parameters_have_the_names_of_a_plain_model():
    for name, config in CASES.items():
        plain, merged = lora.merge(config, adapted(name))
        shapes = jax.eval_shape(functools.partial(transformer.init, plain), jax.random.key(0))
        assert jax.tree.map(np.shape, merged) == jax.tree.map(np.shape, shapes), name


def test_fresh_adapters_change_nothing():
    config = CASES["untied"]
    fresh = transformer.init_adapters(config, jax.random.key(3))
    _, frozen = lora.split(adapted("untied"))
    plain = dataclasses.replace(config, lora=LoraConfig())
    assert np.array_equal(logits(config, lora.join(fresh, frozen)), logits(plain, frozen))
    flat = traverse_util.flatten_dict(fresh)
    assert all(lora.is_adapter(path[-1]) for path in flat)
    for path, leaf in flat.items():
        assert leaf.dtype == jnp.float32
        assert bool(np.any(np.asarray(leaf))) == path[-1].endswith("_lora_a"), path
    with pytest.raises(ValueError, match="rank is 0"):
        transformer.init_adapters(plain, jax.random.key(0))


def test_a_projection_is_w_plus_scaled_ab():
    rng = np.random.default_rng(1)
    x, w, a, b = (
        rng.normal(size=s).astype(np.float32) for s in ((2, 3, 8), (8, 5), (8, 2), (2, 5))
    )
    config = LoraConfig(rank=2, alpha=3.0)
    merged = np.asarray(lora._merged(jnp.asarray(w), jnp.asarray(a), jnp.asarray(b), config))
    np.testing.assert_allclose(merged, w + 1.5 * (a.astype(np.float64) @ b), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(dense(jnp.asarray(x), merged)), x @ (w + 1.5 * a @ b), rtol=1e-5, atol=1e-5
    )


def test_merging_keeps_the_dtype_and_rounds_once():
    config = dataclasses.replace(SHAPE, param_dtype="bfloat16", dtype="bfloat16")
    params = jax.jit(functools.partial(transformer.init, config))(jax.random.key(0))
    layer = params["blocks_0"]["layers_0"]
    layer["down_lora_b"] = jnp.full_like(layer["down_lora_b"], 0.25)
    _, merged = lora.merge(config, params)
    got = merged["blocks_0"]["layers_0"]["down"]
    wide = layer["down"].astype(jnp.float32) + 5 / 3 * layer["down_lora_a"] @ layer["down_lora_b"]
    assert got.dtype == jnp.bfloat16
    # A product that lies between two values of bfloat16 may round either way.
    assert np.mean(np.asarray(got) == np.asarray(wide.astype(jnp.bfloat16))) > 0.99


@pytest.mark.parametrize("name", ["tied", "scanned", "gpt2"])
def test_split_and_join_are_inverse(name):
    params = adapted(name)
    trained, frozen = lora.split(params)
    again = lora.join(trained, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True))
    whole, nothing = lora.split(frozen)
    assert nothing == {} and jax.tree.structure(whole) == jax.tree.structure(frozen)
    assert (
        lora.merge(dataclasses.replace(CASES[name], lora=LoraConfig()), frozen)[1].keys()
        == frozen.keys()
    )


def test_an_update_reaches_adapters_and_control_rows_alone():
    config = CASES["untied"]
    trained, frozen = lora.split(adapted("untied"))
    before = jax.tree.map(np.asarray, frozen)
    rng = np.random.default_rng(2)
    tokens = jnp.asarray(rng.integers(5, RULE.end_id, (4, 16)), jnp.int32)
    ones = jnp.ones((4, 16), bool)
    rows = Rows(tokens, jnp.ones((4, 16), jnp.int32), ones, ones)

    def terms(params, rows):
        return {"nll": supervised_nll(config, params, RULE, rows, Semantics.REWIND)}

    optimizer = optax.adam(1e-2)
    state = init_state(trained, optimizer)
    size = sum(leaf.size for leaf in jax.tree.leaves(trained))
    # Two moments and a counter, of the adapters alone.
    assert sum(np.size(leaf) for leaf in jax.tree.leaves(state.opt_state)) == 2 * size + 1
    mesh = make_mesh(devices=jax.devices()[:1])
    update = make_update(
        terms,
        lambda rows: {"nll": total_weight(rows, RULE)},
        {"nll": 1.0},
        optimizer,
        mesh,
        state,
        2,
        frozen,
    )
    plain, merged = lora.merge(config, lora.join(trained, frozen))
    expected = supervised_nll(plain, merged, RULE, rows, Semantics.REWIND).mean
    copies = jax.tree.map(np.asarray, trained)
    after, metrics = update(jax.tree.map(jnp.copy, state), rows)
    np.testing.assert_allclose(float(metrics.terms["nll"].mean), float(expected), rtol=1e-5)
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), after.params, copies)
    assert min(jax.tree.leaves(moved)) > 1e-3
    for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    losses = [float(metrics.terms["nll"].mean)]
    for _ in range(5):
        after, metrics = update(after, rows)
        losses.append(float(metrics.terms["nll"].mean))
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("semantics", [Semantics.KEEP, Semantics.REWIND])
def test_the_law_of_the_sampler_holds_with_adapters(semantics):
    config, params = CASES["untied"], adapted("untied")
    knobs = Knobs(max_tokens=24, budget=4, control_bias={"categories": 2.0})
    requests = [Request("abc d", (6, 7) if i % 2 else (), knobs) for i in range(8)]
    with jax.default_matmul_precision("highest"):
        sampler = Sampler(
            config, TOKENIZER, SamplerConfig(semantics, batch_size=8, min_context=16, min_room=24)
        )
        generations = sampler(params, requests, 0)
        traces = pack_traces(generations, RULE, 48)
        read = jax.jit(lambda p, t: score(config, p, RULE, t, semantics).logprobs)(params, traces)
    assert sum(len(g.edits) for g in generations) >= 4
    for row, g in enumerate(generations):
        start = len(g.prompt_ids)
        mine = np.asarray(read)[row, start : start + len(g.trace)]
        np.testing.assert_allclose(mine[g.num_forced :], g.logprobs[g.num_forced :], atol=1e-4)


def test_a_wrong_configuration_says_what_is_expected():
    for fields, message in [
        (dict(rank=-1), "rank is -1"),
        (dict(alpha=0.0), "alpha is 0"),
        (dict(targets=("qkv", "qkv")), "each once"),
        (dict(targets=("q_proj",)), "expected some of qkv, out, up, down"),
    ]:
        with pytest.raises(ValueError, match=message):
            LoraConfig(**fields)
