"""One supervised update on meshes of 8 virtual devices, with and without microbatches: seconds,
what a device holds, computes and exchanges.

Command: python experiments/benchmarks/mesh.py
    --meshes 8,1,1 1,8,1   (data, fsdp, tensor); --accumulate 1 4 8; --repeats; --json

Virtual devices share the cores of this machine, so seconds compare total work, not speed; rounds
alternate. Shares are those of the first line. FLOPs count products, each as often as it runs.
"""

from __future__ import annotations

import argparse
import json
import os

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)
# Collectives of virtual devices wait for each other in a thread pool, which must outnumber them.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from common import seconds

from rlbf_jax.directives import BacktrackRule, Semantics
from rlbf_jax.models import transformer
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.parallel.compiled import collectives, dots
from rlbf_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from rlbf_jax.training.learner import Learner
from rlbf_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlbf_jax.training.supervised import Rows, supervised_objective

RULE = BacktrackRule(1000, ("a", "b"), (), 12)
MODEL = ModelConfig(
    vocab_size=1024, num_layers=4, width=256, num_heads=8, num_kv_heads=8, head_dim=32,
    mlp_width=1024, remat="block", scan_layers=True,
)  # fmt: skip


def rows_of(count: int, time: int) -> Rows:
    ids = np.random.default_rng(0).integers(3, 900, (count, time)).astype(np.int32)
    every = np.ones((count, time), bool)
    return Rows(jnp.asarray(ids), jnp.ones((count, time), jnp.int32), every, every)


class Setting:
    """One mesh with so many microbatches."""

    def __init__(self, sizes: tuple[int, ...], accumulate: int, rows: Rows):
        self.name = "data={}, fsdp={}, tensor={}".format(*sizes) + f", accumulate {accumulate}"
        mesh = make_mesh(MeshConfig(*sizes))
        objective = supervised_objective(MODEL, RULE, Semantics.KEEP)
        optimizer = make_optimizer(OptimizerConfig(), 100, warn=False)
        params = transformer.init(MODEL, jax.random.key(0))
        self.learner = Learner(objective, optimizer, params, mesh, accumulate)
        self.batch = jax.device_put(rows, batch_sharding(mesh))
        memory = self.learner.memory(self.batch)
        update = self.learner._update
        text = update.jitted.lower(self.learner.state, {}, self.batch).compile().as_text()
        self.facts = {
            "state_mb": memory.arguments / 1e6,
            "work_mb": memory.temporaries / 1e6,
            "gflop": sum((dot.flops or 0) * (dot.trips or 1) for dot in dots(text)) / 1e9,
            "sent_mb": sum(c.sent_bytes * (c.trips or 1) for c in collectives(text)) / 1e6,
        }
        self.times: list[float] = []

    def round(self) -> None:
        self.times.append(seconds(lambda: self.learner.update(self.batch)))


def measured(settings: list[Setting], repeats: int) -> list[dict]:
    """A row a setting; one round that does not count, then alternating ones."""
    for _ in range(repeats + 1):
        for setting in settings:
            setting.round()
    times = np.asarray([setting.times[1:] for setting in settings])
    share = np.median(times / times[0], axis=1)
    return [
        {"name": s.name, "seconds": float(np.median(t)), "share": float(x), **s.facts}
        for s, t, x in zip(settings, times, share, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--meshes", nargs="+", default=["8,1,1", "1,8,1", "2,2,2", "1,1,8"])
    parser.add_argument("--accumulate", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    rows = rows_of(args.rows, args.length)
    settings = [
        Setting(tuple(map(int, sizes.split(","))), accumulate, rows)
        for sizes in args.meshes
        for accumulate in args.accumulate
        if args.rows % (accumulate * np.prod([int(n) for n in sizes.split(",")[:2]])) == 0
    ]
    found = measured(settings, args.repeats)
    if args.json:
        for row in found:
            print(json.dumps(row))
        return
    print("| mesh | s a step | share | state MB | work MB | Gflop | MB sent |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in found:
        print(
            f"| {row['name']} | {row['seconds']:.2f} | {row['share']:.2f} | {row['state_mb']:.1f} "
            f"| {row['work_mb']:.1f} | {row['gflop']:.2f} | {row['sent_mb']:.1f} |"
        )


if __name__ == "__main__":
    main()
