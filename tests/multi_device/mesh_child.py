"""Run by `test_mesh.py` in a process with 8 virtual devices:
one update on meshes against one device. Prints JSON."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlbf_jax.directives import Semantics
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.config import LoraConfig
from rlbf_jax.parallel.axes import AXES
from rlbf_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh, shardings
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig
from rlbf_jax.sampling.scoring import pack_traces
from rlbf_jax.training.policy import (
    PolicyBatch,
    PolicyConfig,
    init_policy,
    measure,
    policy_denominators,
    policy_terms,
    policy_weights,
)
from rlbf_jax.training.state import init_state, make_update
from rlbf_jax.training.supervised import Rows, supervised_nll, total_weight
from tests.fakes import LetterTokenizer, random_model

RATE, TIME = 0.1, 40
SHARED = (2, 2, 2)
"""The mesh on which rows share contexts too."""
ADAM = optax.adam(1e-3)
SEMANTICS = Semantics.REWIND
TOKENIZER = LetterTokenizer()
RULE = TOKENIZER.controls.rule()
VOCAB = (TOKENIZER.vocab_size // 8 + 1) * 8
"""Ids that eight devices divide."""
MODEL, PARAMS = random_model(
    TOKENIZER, num_layers=1, vocab_size=VOCAB, num_heads=16, num_kv_heads=8
)


def guidance(rows: int = 16, time: int = 24) -> Rows:
    """Rows of random ids, directives included; everything after the prompt is in the loss."""
    rng = np.random.default_rng(0)
    responding = jnp.asarray(np.broadcast_to(np.arange(time) >= 5, (rows, time)))
    tokens = jnp.asarray(rng.integers(5, RULE.end_id, (rows, time)), jnp.int32)
    return Rows(tokens, jnp.ones((rows, time), jnp.int32), responding, responding)


def sample(mesh, rows_a_prompt: int = 1, batch_size: int = 16) -> list:
    knobs = Knobs(max_tokens=20, budget=4, control_bias={"categories": 2.0})
    prompts = [i // rows_a_prompt for i in range(16)]
    requests = [Request("ab cd"[: 1 + i % 5], (5, 6) if i % 3 == 0 else (), knobs) for i in prompts]
    shapes = SamplerConfig(SEMANTICS, batch_size=batch_size, min_context=12, min_room=20)
    params = jax.device_put(PARAMS, shardings(PARAMS, mesh))
    return Sampler(MODEL, TOKENIZER, shapes, mesh=mesh)(params, requests, 3)


def supervised_parts():
    return (
        lambda p, rows: {"nll": supervised_nll(MODEL, p, RULE, rows, SEMANTICS)},
        lambda rows: {"nll": total_weight(rows, RULE)},
        {"nll": 1.0},
        PARAMS,
        guidance(),
    )


def policy_parts(generations):
    config = PolicyConfig(algorithm="ppo")
    policy = init_policy(PARAMS, MODEL, jax.random.key(1))
    traces = pack_traces(generations, RULE, TIME)
    reward = jnp.asarray(np.random.default_rng(1).choice([-1.0, -0.2, 1.0], 16), jnp.float32)
    group = jnp.arange(16, dtype=jnp.int32) // 4
    run = jax.jit(
        lambda p: measure(
            MODEL, RULE, SEMANTICS, config, 4, p, traces, reward, group, jnp.zeros((16, TIME))
        )
    )
    return (
        lambda p, batch: policy_terms(MODEL, RULE, SEMANTICS, config, p, batch),
        lambda batch: policy_denominators(RULE, config, batch),
        policy_weights(config),
        policy,
        PolicyBatch(traces, run(policy)[0], guidance()),
    )


def adapter_parts():
    """As `supervised_parts`, of a model whose adapters alone are trained."""
    adapters = LoraConfig(rank=4, first_row=RULE.first_id, rows=RULE.num_controls)
    model = dataclasses.replace(MODEL, lora=adapters)
    fresh = transformer.init_adapters(model, jax.random.key(2))
    fresh = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), fresh
    )
    return (
        lambda p, rows: {"nll": supervised_nll(model, p, RULE, rows, SEMANTICS)},
        lambda rows: {"nll": total_weight(rows, RULE)},
        {"nll": 1.0},
        fresh,
        guidance(),
    )


def updated(parts, mesh, optimizer, frozen):
    """The state after one update on a mesh, still where the update left it."""
    terms, denominators, weights, params, batch = parts
    state = init_state(params, optimizer)
    update = make_update(terms, denominators, weights, optimizer, mesh, state, frozen=frozen)
    state = jax.device_put(jax.tree.map(jnp.copy, state), shardings(state, mesh))
    after, metrics = update(state, jax.device_put(batch, batch_sharding(mesh)))
    assert bool(metrics.finite)
    return after


def worst(a, b) -> float:
    """Largest difference over the largest value of `b`."""
    pairs = list(
        zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True)
    )
    return max(float(np.max(np.abs(x - y))) for x, y in pairs) / max(
        float(np.max(np.abs(y))) for _, y in pairs
    )


def gradient(after, before):
    """What SGD at a known rate applied."""
    return jax.tree.map(lambda a, b: (np.asarray(b) - np.asarray(a)) / RATE, after, before)


def split_leaves(params) -> list[str]:
    """Names of parameters of which a device holds a part only."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return [str(path[-1].key) for path, x in leaves if x.sharding.shard_shape(x.shape) != x.shape]


def alone_and_parts():
    """Traces of one device (16, and 16 whose contexts are shared by two), what to update on the
    first ones, and one device's results."""
    single = make_mesh(devices=jax.devices()[:1])
    generations = sample(single)
    parts = {
        "supervised": (supervised_parts(), ADAM, {}),
        "policy": (policy_parts(generations), optax.sgd(RATE), {}),
        "adapters": (adapter_parts(), optax.sgd(RATE), PARAMS),
    }
    return (
        [*generations, *sample(single, 2, 8)],
        parts,
        {name: updated(some[0], single, *some[1:]) for name, some in parts.items()},
    )


def compare(sizes: tuple[int, int, int], generations, parts, alone) -> dict:
    """Largest relative differences between a mesh and one device, and what the mesh split."""
    mesh = make_mesh(MeshConfig(*sizes))
    after = {name: updated(some[0], mesh, *some[1:]) for name, some in parts.items()}
    start = parts["policy"][0][3]
    moments, moments_alone = after["supervised"].opt_state[0], alone["supervised"].opt_state[0]
    drawn = [*sample(mesh), *(sample(mesh, 2, 8) if sizes == SHARED else ())]
    generations = generations[: len(drawn)]
    gaps = [
        np.nanmax(np.abs(g.logprobs - h.logprobs)) for g, h in zip(drawn, generations, strict=True)
    ]
    return {
        "policy_gradient": worst(
            gradient(after["policy"].params, start), gradient(alone["policy"].params, start)
        ),
        "policy_params": worst(after["policy"].params, alone["policy"].params),
        # After one step Adam's first moment is a tenth of the gradient.
        "supervised_gradient": worst(moments.mu, moments_alone.mu),
        "squares": worst(moments.nu, moments_alone.nu),
        "adapter_gradient": worst(
            gradient(after["adapters"].params, parts["adapters"][0][3]),
            gradient(alone["adapters"].params, parts["adapters"][0][3]),
        ),
        "split_adapters": split_leaves(after["adapters"].params),
        "split_params": split_leaves(after["supervised"].params),
        "split_moments": split_leaves(moments.mu),
        "same_ids": all(
            np.array_equal(g.trace, h.trace) for g, h in zip(drawn, generations, strict=True)
        ),
        "logprobs": float(max(gaps)),
        "sampled": len(drawn),
    }


def explicit() -> dict:
    """Logits in a program whose mesh has Explicit axes, against one device's."""
    tokens, rows = guidance(16, 8).tokens, PartitionSpec(("data", "fsdp"))

    def logits(params, tokens):
        position = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), tokens.shape)
        hidden, _ = transformer.forward(MODEL, params, tokens, Visibility(position))
        return transformer.unembed(MODEL, params, hidden)

    alone = jax.jit(logits)(PARAMS, tokens)
    devices = np.asarray(jax.devices()).reshape(1, 2, 2, 2)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * 4)
    split = PartitionSpec(("data", "fsdp"), None, "tensor")
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, shardings(PARAMS, mesh))
        found = jax.jit(jax.sharding.auto_axes(logits, out_sharding=split))(
            params, jax.device_put(tokens, NamedSharding(mesh, rows))
        )
    return {"explicit": worst(found, alone), "typed": jax.typeof(found).sharding.spec == split}


def main(meshes: list[tuple[int, int, int]]) -> None:
    generations, parts, alone = alone_and_parts()
    print(json.dumps({"directives": sum(len(g.edits) for g in generations)} | explicit()))
    for sizes in meshes:
        print(json.dumps({"sizes": sizes} | compare(sizes, generations, parts, alone)))


if __name__ == "__main__":
    main([tuple(map(int, text.split(","))) for text in sys.argv[1:]])
