"""Steps of GCG against nanoGCG 0.3.0 (CPU, float32, 12 layers x 768, vocabulary 32,000),
search widths 64 and 512.

Command: RLBF_JAX_NANOGCG=PYTHON python experiments/benchmarks/gcg_step.py --json

PYTHON is an interpreter with torch, transformers <= 4.47.1 and nanogcg 0.3.0. Prompt: 32 ids before
the suffix, 20 in it, 4 after, a target of 16. Each side takes the fastest of several batch sizes,
tried first; then they alternate. The peer measures itself in a process of its own, from its first
gradient on; both use as many threads. Neither filters candidates by text.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
from common import report, seconds

from rlbf_jax.attacks.search import gcg_search, gcg_step
from rlbf_jax.attacks.search.gcg_search import Search
from rlbf_jax.models import transformer
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.families import styled

BEFORE, SUFFIX, AFTER, TARGET, TOPK = 32, 20, 4, 16, 256


def model_of(layers: int, width: int, vocab: int) -> ModelConfig:
    heads = width // 64
    return styled(
        ModelConfig(
            family="llama", vocab_size=vocab, num_layers=layers, width=width, num_heads=heads,
            num_kv_heads=heads, head_dim=64, mlp_width=width * 8 // 3, max_positions=2048,
            tied_embeddings=False,
        )
    )  # fmt: skip


class Peer:
    """nanoGCG in a process of its own."""

    def __init__(self, python: str, model: ModelConfig, threads: int):
        config = dict(
            vocab_size=model.vocab_size, hidden_size=model.width, intermediate_size=model.mlp_width,
            num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads, max_position_embeddings=2048,
        )  # fmt: skip
        case = dict(
            vocab=model.vocab_size, forbidden=model.vocab_size - 1, prefix=[5] * BEFORE,
            after=[7] * AFTER, target=list(range(10, 10 + TARGET)), init=[55] * SUFFIX, topk=TOPK,
        )  # fmt: skip
        shape = json.dumps({"config": config, "case": case, "threads": threads})
        script = str(pathlib.Path(__file__).with_name("gcg_peer.py"))
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.child = subprocess.Popen(
            [python, script, shape], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=env,
        )  # fmt: skip

    def step(self, width: int, batch: int) -> float:
        """Seconds of one step."""
        assert self.child.stdin is not None and self.child.stdout is not None
        self.child.stdin.write(json.dumps({"width": width, "batch": batch, "steps": 1}) + "\n")
        self.child.stdin.flush()
        answer = self.child.stdout.readline()
        if not answer:
            raise SystemExit("the peer ended; run gcg_peer.py by hand to see why")
        return json.loads(answer)["seconds"]


class Ours:
    """Our step of one shape, compiled."""

    def __init__(self, model: ModelConfig, params: dict, width: int, chunk: int):
        after = [7] * AFTER
        tail = [*after, *range(10, 10 + TARGET)]
        behavior = gcg_step.stack([gcg_step.one_behavior([5] * BEFORE, tail, (AFTER, len(tail)))])
        objective = gcg_step.Objective(first=AFTER)
        self.search = Search(model, objective, steps=10_000, width=width, topk=TOPK, chunk=chunk)
        self.params, self.behavior, self.allowed = (
            params,
            behavior,
            jnp.ones(model.vocab_size, bool),
        )
        keys = jax.random.split(jax.random.key(0), 1)
        suffixes = jnp.full((1, 1, SUFFIX), 55, jnp.int32)
        self.prefixes, self.states = gcg_search.begin_all(
            self.search, None, params, behavior, keys, suffixes
        )
        jax.block_until_ready(self.run())  # or the first step to be timed would wait for it

    def run(self):
        until = int(self.states.step[0]) + 1
        self.states = gcg_search.advance_all(
            self.search,
            None,
            self.params,
            self.allowed,
            until,
            self.behavior,
            self.prefixes,
            self.states,
        )
        return self.states

    def step(self) -> float:
        return seconds(self.run)


def rows(args: argparse.Namespace):
    python = os.environ.get("RLBF_JAX_NANOGCG")
    if not python:
        raise SystemExit(
            "RLBF_JAX_NANOGCG is not set: point it at a Python with torch and nanogcg 0.3.0"
        )
    model = model_of(args.layers, args.width, args.vocab)
    params = transformer.init(model, jax.random.key(0))
    peer = Peer(python, model, args.threads)
    for width in args.search_widths:
        sizes = [b for b in args.batches if b <= width] or [width]
        peer.step(sizes[0], sizes[0])
        peer_batch = min(sizes, key=lambda b: peer.step(width, b))
        compiled = {b: Ours(model, params, width, b) for b in sizes}
        own_batch = min(sizes, key=lambda b: compiled[b].step())
        ours = compiled[own_batch]
        times = np.asarray(
            [(ours.step(), peer.step(width, peer_batch)) for _ in range(args.repeats)]
        )
        ratio = times[:, 1] / times[:, 0]
        yield {
            "name": f"GCG step, search width {width}",
            "ours": float(np.median(times[:, 0])),
            "peer": float(np.median(times[:, 1])),
            "peer_name": "nanogcg",
            "ratio": float(np.median(ratio)),
            "ratio_low": float(np.quantile(ratio, 0.25)),
            "steps_per_second": float(1 / np.median(times[:, 0])),
            "batch": own_batch,
            "peer_batch": peer_batch,
            "threads": args.threads,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--search_widths", type=int, nargs="+", default=[64, 512])
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[16, 32, 64, 128], help="batch sizes to try"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    report(rows(args), args.json)


if __name__ == "__main__":
    main()
