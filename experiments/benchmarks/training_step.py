"""Three choices of the training step, each against the plain way, at the quickstart's shape
(3 x 96, vocabulary 2,088).

Command: python experiments/benchmarks/training_step.py --json

- dense layers over flattened rows against three-dimensional einsums
  (gated MLP, forward and backward);
- `linear_nll`, which never holds the logits of a batch, against log-softmax of all of them;
- unrolled layers against a scan over layers (whole gradient).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from common import arguments, compare, report

from rlbf_jax.directives import BacktrackRule, Semantics
from rlbf_jax.models import transformer
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.layers import dense
from rlbf_jax.objectives.sft import linear_nll, token_nll
from rlbf_jax.training.supervised import Rows, supervised_nll

B, T, D, F, V = 32, 128, 96, 256, 2088


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) * 0.1


def mlp(repeats: int) -> dict:
    x, back, up, down = normal(0, B, T, D), normal(1, B, T, D), normal(2, D, 2, F), normal(3, F, D)

    def flat(up, down, x):
        return jnp.sum(dense(jax.nn.silu(dense(x, up[:, 0])) * dense(x, up[:, 1]), down) * back)

    def whole(up, down, x):
        both = jnp.einsum("btd,dcf->btcf", x, up)
        return jnp.sum(
            jnp.einsum("btf,fd->btd", jax.nn.silu(both[:, :, 0]) * both[:, :, 1], down) * back
        )

    ours, peer = (jax.jit(jax.grad(f, (0, 1, 2))) for f in (flat, whole))
    return compare(
        "gated MLP, gradient",
        lambda: ours(up, down, x),
        lambda: peer(up, down, x),
        "einsum",
        repeats,
    )


def loss(repeats: int) -> dict:
    hidden, table = normal(0, B, T, D), normal(1, V, D)
    targets = jax.random.randint(jax.random.key(2), (B, T), 0, V)
    counts = jnp.ones((B, T), bool)
    ours = jax.jit(jax.grad(lambda h, e: linear_nll(h, e, targets, counts), (0, 1)))
    peer = jax.jit(jax.grad(lambda h, e: jnp.sum(token_nll(h @ e.T, targets)), (0, 1)))
    return compare(
        "loss, gradient",
        lambda: ours(hidden, table),
        lambda: peer(hidden, table),
        "log_softmax",
        repeats,
    )


def layers(count: int, repeats: int) -> dict:
    config = ModelConfig(
        vocab_size=V,
        num_layers=count,
        width=D,
        num_heads=3,
        num_kv_heads=3,
        head_dim=32,
        mlp_width=F,
    )
    scanned = dataclasses.replace(config, scan_layers=True)
    rule = BacktrackRule(2046, ("a", "b"), x_max=40)
    tokens = jax.random.randint(jax.random.key(3), (B, T), 0, 2000)
    everywhere = jnp.ones((B, T), bool)
    rows = Rows(tokens, jnp.ones((B, T), jnp.int32), everywhere, everywhere)

    def gradient(c: ModelConfig):
        params = transformer.init(c, jax.random.key(0))
        run = jax.jit(jax.grad(lambda p: supervised_nll(c, p, rule, rows, Semantics.REWIND).mean))
        return lambda: run(params)

    return compare(
        f"{count} layers, gradient",
        gradient(config),
        gradient(scanned),
        "scan over layers",
        repeats,
    )


if __name__ == "__main__":
    args = arguments(__doc__)
    report(
        (f(args.repeats) for f in (mlp, loss, lambda r: layers(3, r), lambda r: layers(12, r))),
        args.json,
    )
