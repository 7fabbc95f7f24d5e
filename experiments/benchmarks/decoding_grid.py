"""The 49 settings of the decoding attack on 100 prompts: our sampler, in one program,
against `transformers`.

Command: RLBF_JAX_PEERS=PYTHON_WITH_TORCH_AND_TRANSFORMERS python
  experiments/benchmarks/decoding_grid.py --json

Both sample a random Llama-type model (4 x 256, vocabulary 8,192 by default) in float32; the two
take turns, seven settings at a time, each at the faster of its batch sizes (found on the first
settings). `transformers` takes one setting a call, because its knobs are arguments of `generate`;
our rows have knobs of their own, so a prompt is read once for the seven settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np

from rlbf_jax.attacks.decoding import DecodingGrid
from rlbf_jax.directives import BacktrackRule
from rlbf_jax.models import transformer
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.families import styled
from rlbf_jax.sampling import loop
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig

BLOCK = 7
"""Settings between two turns, and rows that share a prompt."""
PEER = pathlib.Path(__file__).with_name("decoding_grid_peer.py")


@dataclasses.dataclass(frozen=True)
class Ids:
    """A tokenizer whose texts are prompt numbers."""

    prompts: tuple[tuple[int, ...], ...]
    rule: BacktrackRule
    vocab_size: int
    eos_ids: tuple[int, ...] = (0,)

    def encode_prompt(self, text: str) -> list[int]:
        return list(self.prompts[int(text)])

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


def ours(args: argparse.Namespace, prompts, batch: int):
    """A function that samples all prompts under some settings."""
    model = ModelConfig(
        family="llama", vocab_size=args.vocabulary, num_layers=args.layers, width=args.width,
        num_heads=args.width // 64, num_kv_heads=args.width // 64, head_dim=64,
        mlp_width=args.width * 8 // 3,
    )  # fmt: skip
    model = styled(model)
    params = jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(0))
    rule = BacktrackRule(args.vocabulary - 42, ("a", "b"), x_max=40)
    tokenizer = Ids(tuple(map(tuple, prompts)), rule, args.vocabulary)
    shapes = SamplerConfig(
        batch_size=batch,
        min_context=args.prompt_tokens,
        min_room=args.tokens,
    )
    sampler = Sampler(model, tokenizer, shapes, rule=rule)  # type: ignore[arg-type]

    def run(settings: list[Knobs]) -> float:
        requests = [Request(str(p), knobs=knobs) for p in range(len(prompts)) for knobs in settings]
        began = time.perf_counter()
        generations = sampler(params, requests, 0)
        assert all(len(g.trace) == args.tokens for g in generations)
        return time.perf_counter() - began

    return run


def peer(args: argparse.Namespace, prompts):
    """A function that has the other process sample all prompts under some settings."""
    python = os.environ.get("RLBF_JAX_PEERS")
    if not python:
        sys.exit("error: set RLBF_JAX_PEERS to a Python that has torch and transformers")
    shape = {
        "threads": os.cpu_count(),
        "tokens": args.tokens,
        "prompts": np.asarray(prompts).tolist(),
        "config": {
            "vocab_size": args.vocabulary, "hidden_size": args.width,
            "num_hidden_layers": args.layers, "num_attention_heads": args.width // 64,
            "num_key_value_heads": args.width // 64, "head_dim": 64,
            "intermediate_size": args.width * 8 // 3, "tie_word_embeddings": True,
        },
    }  # fmt: skip
    child = subprocess.Popen(
        [python, str(PEER), json.dumps(shape)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(settings: list[Knobs], batch: int) -> float:
        asked = [
            {"temperature": k.temperature, "top_k": k.top_k, "top_p": k.top_p} for k in settings
        ]
        child.stdin.write(json.dumps({"settings": asked, "batch": batch}) + "\n")
        child.stdin.flush()
        return json.loads(child.stdout.readline())["seconds"]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="new ids an answer")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    args = parser.parse_args()
    prompts = (
        np.random.default_rng(0)
        .integers(1, args.vocabulary - 50, (args.prompts, args.prompt_tokens))
        .tolist()
    )
    settings = DecodingGrid.paper().settings(Knobs(max_tokens=args.tokens, stop_ids=(), budget=2))
    they = peer(args, prompts)
    theirs = min((25, 50, 100), key=lambda b: (they(settings[:1], b), they(settings[:1], b))[1])
    samplers = {rows * BLOCK: ours(args, prompts, rows * BLOCK) for rows in (4, 7, 14)}
    mine = min(
        samplers, key=lambda b: (samplers[b](settings[:BLOCK]), samplers[b](settings[:BLOCK]))[1]
    )
    run, before = samplers[mine], loop.go_on._cache_size()
    chunks = [settings[start : start + BLOCK] for start in range(0, len(settings), BLOCK)]
    times = np.asarray([(run(chunk), they(chunk, theirs)) for chunk in chunks])
    ratios = times[:, 1] / times[:, 0]
    draws = np.random.default_rng(0).integers(0, len(chunks), (2000, len(chunks)))
    totals = times[draws].sum(1)
    row = {
        "name": f"decoding grid: {len(settings)} settings x {args.prompts} prompts x "
        f"{args.tokens} ids, {args.layers} x {args.width}, vocabulary {args.vocabulary}",
        "ours": float(times[:, 0].sum()),
        "peer": float(times[:, 1].sum()),
        "peer_name": "transformers",
        "ratio": float(times[:, 1].sum() / times[:, 0].sum()),
        "ratio_low": float(np.quantile(totals[:, 1] / totals[:, 0], 0.025)),
        "ratios": [round(float(r), 2) for r in ratios],
        "batch": mine,
        "peer_batch": theirs,
        "compilations": 1 + loop.go_on._cache_size() - before,
    }
    print(
        json.dumps(row)
        if args.json
        else "\n".join(f"{name:14} {value}" for name, value in row.items())
    )


if __name__ == "__main__":
    main()
