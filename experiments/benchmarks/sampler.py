"""Our sampler against a plain JAX loop of the same weights, alternated: tokens a second.

Command: python experiments/benchmarks/sampler.py --repeats 5 [--model small|large] [--batch 1 8 32]

The plain loop is what one writes first: one array a weight, a cache [B, H, S, D] that all rows
write at one place, one uniform number a row, nothing of directives. Prompt 32 + 128 new ids,
temperature 1, no end of sequence. Greedy answers of both are compared first.
"""

from __future__ import annotations

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from common import compare

from rlbf_jax.directives import Controls, Semantics
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import rotary, rotate
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig

PROMPT, NEW = 32, 128
SHAPES = {
    "small": dict(
        num_layers=4, width=256, num_heads=4, head_dim=64, mlp_width=704, vocab_size=8192
    ),
    "large": dict(
        num_layers=12, width=768, num_heads=12, head_dim=64, mlp_width=2048, vocab_size=32_000
    ),
}


class Ids:
    """A tokenizer of nothing but ids; the last 42 are control ids."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.controls = Controls(vocab_size - 42, ("a", "b"), 39)
        self.pad_id, self.eos_id, self.eos_ids = 0, 1, (1,)

    def encode_prompt(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids) -> str:
        return ""


def plain_weights(params: dict, config: ModelConfig) -> dict:
    """One array a weight."""
    layers = []
    for number in range(config.num_layers):
        p = params[f"blocks_{number}"]["layers_0"]
        groups = config.num_heads // config.num_kv_heads
        qkv = p["qkv"].reshape(config.width, config.num_kv_heads, groups + 2, config.head_dim)
        layers.append(
            {
                "q": qkv[:, :, :groups].reshape(config.width, -1),
                "k": qkv[:, :, groups].reshape(config.width, -1),
                "v": qkv[:, :, groups + 1].reshape(config.width, -1),
                "o": p["out"].reshape(-1, config.width),
                "gate": jnp.array(p["gate_up"][:, 0]),
                "up": jnp.array(p["gate_up"][:, 1]),
                "down": p["down"],
                "n1": p["attention_norm"]["scale"],
                "n2": p["mlp_norm"]["scale"],
            }
        )
    tables = {k: params[k] for k in ("embedding", "unembedding")}
    return {"layers": layers, "norm": params["final_norm"]["scale"], **tables}


def norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale


def layer(config: ModelConfig, w: dict, x, cache, at):
    """x [B, T, D] at positions at..at+T; cache: keys and values [B, H, S, D]."""
    rows, time = x.shape[:2]

    def heads(y):
        return y.reshape(rows, time, config.num_heads, config.head_dim).transpose(0, 2, 1, 3)

    normed = norm(x, w["n1"], config.norm_eps)
    position = jnp.broadcast_to(at + jnp.arange(time, dtype=jnp.int32), (rows, time))
    angles = rotary(position, config.head_dim, config.rope_theta)
    query, key = (rotate(heads(normed @ w[n]), *angles) for n in ("q", "k"))
    place = (0, 0, at, 0)
    keys = jax.lax.dynamic_update_slice(cache[0], key, place)
    values = jax.lax.dynamic_update_slice(cache[1], heads(normed @ w["v"]), place)
    scores = jnp.einsum("bhtd,bhsd->bhts", query, keys) * config.head_dim**-0.5
    seen = jnp.arange(keys.shape[2])[None, :] <= position[0][:, None]
    shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
    joined = jnp.einsum("bhts,bhsd->bhtd", shares, values).transpose(0, 2, 1, 3)
    x = x + joined.reshape(rows, time, -1) @ w["o"]
    normed = norm(x, w["n2"], config.norm_eps)
    return x + (jax.nn.silu(normed @ w["gate"]) * (normed @ w["up"])) @ w["down"], (keys, values)


@functools.partial(jax.jit, static_argnums=(0, 4))
def plain_sample(config: ModelConfig, weights: dict, prompts, key, greedy: bool):
    """[B, NEW] ids."""
    rows = prompts.shape[0]
    scale = config.width**0.5 if config.scale_embeddings else 1.0
    shape = (rows, config.num_heads, PROMPT + NEW, config.head_dim)
    caches = [(jnp.zeros(shape), jnp.zeros(shape)) for _ in weights["layers"]]

    def run(tokens, caches, at):
        x, made = weights["embedding"][tokens] * scale, []
        for w, cache in zip(weights["layers"], caches, strict=True):
            x, cache = layer(config, w, x, cache, at)
            made.append(cache)
        last = norm(x[:, -1], weights["norm"], config.norm_eps)
        return last @ weights["unembedding"].T, made

    def draw(logits, key):
        if greedy:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        mass = jnp.cumsum(jax.nn.softmax(logits), -1)
        uniform = jax.random.uniform(key, (rows, 1))
        return jnp.sum(mass <= uniform * mass[:, -1:], -1).astype(jnp.int32)

    def turn(state, at):
        logits, caches = state
        token = draw(logits, jax.random.fold_in(key, at))
        logits, caches = run(token[:, None], caches, at)
        return (logits, caches), token

    first = run(prompts, caches, 0)
    _, tokens = jax.lax.scan(turn, first, PROMPT + jnp.arange(NEW, dtype=jnp.int32))
    return tokens.T


def measure(name: str, batch: int, semantics: Semantics, repeats: int) -> dict:
    shape = SHAPES[name]
    config = ModelConfig(**shape, num_kv_heads=shape["num_heads"], tied_embeddings=False)
    tokenizer = Ids(config.vocab_size)
    params = jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(0))
    weights = plain_weights(params, config)
    prompts = np.random.default_rng(0).integers(2, 1000, (batch, PROMPT)).astype(np.int32)
    shapes = SamplerConfig(semantics, batch, min_context=PROMPT, min_room=NEW)
    sampler = Sampler(config, tokenizer, shapes, rule=tokenizer.controls.rule("backtrack"))

    def ours(temperature: float = 1.0):
        knobs = Knobs(max_tokens=NEW, temperature=temperature, stop_ids=()).without_directives()
        requests = [Request("", (), knobs, prompt_ids=tuple(row)) for row in prompts.tolist()]
        return np.stack([g.trace for g in sampler(params, requests, 0)])

    plain = plain_sample(config, weights, prompts, jax.random.key(1), True)
    # Far apart once a near tie falls the other way; the first ids tell whether the two agree.
    agree = float(np.mean(ours(0.0)[:, :8] == np.asarray(plain)[:, :8]))
    row = compare(
        f"{name} batch {batch} {semantics.value}",
        ours,
        lambda: plain_sample(config, weights, prompts, jax.random.key(1), False),
        "plain loop",
        repeats,
    )
    each = batch * NEW
    return row | {
        "agree": agree,
        "tokens_a_second": round(each / row["ours"]),
        "peer_tokens_a_second": round(each / row["peer"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--semantics", nargs="+", default=["keep", "rewind"])
    args = parser.parse_args()
    for name in args.model:
        for batch in args.batch:
            for semantics in map(Semantics, args.semantics):
                print(json.dumps(measure(name, batch, semantics, args.repeats)), flush=True)


if __name__ == "__main__":
    main()
