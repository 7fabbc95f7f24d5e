"""A plain JAX loop over the weights of one of our models: what one writes first.

One array a weight, a cache [B, H, S, D] that all rows write at one place, one uniform number a row,
nothing of directives. It is the peer of `sampler.py`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from rlbf_jax.models.attention import rotary, rotate
from rlbf_jax.models.config import ModelConfig


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


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def plain_sample(config: ModelConfig, weights: dict, prompts, key, new: int, greedy: bool):
    """[B, new] ids that follow prompts [B, P]."""
    rows, length = prompts.shape
    scale = config.width**0.5 if config.scale_embeddings else 1.0
    shape = (rows, config.num_heads, length + new, config.head_dim)
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
    _, tokens = jax.lax.scan(turn, first, length + jnp.arange(new, dtype=jnp.int32))
    return tokens.T
