"""One GRPO step, rollouts, rewards and one update, against TRL and tunix with the same weights.

Command: RLBF_JAX_TRL=PYTHON RLBF_JAX_TUNIX=PYTHON python experiments/benchmarks/rl_step.py
  [--model small] [--repeats 5] [--prompts 4] [--group 8] [--prompt 32] [--new 128]

The two name interpreters that have TRL (torch for CPU) and tunix; each runs in a process of its
own (`rl_step_peer.py`), and what is not named is left out. Shapes, float32, threads, rate and
reward (the share of even ids) are the same; all train without a KL term, once on each rollout.
Beyond their libraries' defaults only sizes are set. Steps alternate; the first two, which compile,
are not counted. A line is the median of the ratios, with their range, tokens a second, and where
the seconds of a step go. The peers take the ratio of the first update to be 1; ours is to what the
sampler recorded (`policy.behavior`), or with `--behavior scorer`, our default, to one more pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from sampler_setting import PLAIN, SHAPES, Model

from rlbf_jax.critics.base import Exchange, Verdict
from rlbf_jax.data.schema import Prompt
from rlbf_jax.directives import Semantics
from rlbf_jax.methods.reinforcement import Collector, ReinforcementConfig, policy_optimizer
from rlbf_jax.models.weights.write import write_checkpoint
from rlbf_jax.parallel.mesh import make_mesh
from rlbf_jax.sampling.request import Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig
from rlbf_jax.training.learner import Learner
from rlbf_jax.training.optimizer import OptimizerConfig
from rlbf_jax.training.policy import PolicyConfig, PolicyGradient, init_policy
from rlbf_jax.training.rollouts import Rollout
from rlbf_jax.training.supervised import Rows

PEER = pathlib.Path(__file__).with_name("rl_step_peer.py")
PEERS = {"trl": "RLBF_JAX_TRL", "tunix": "RLBF_JAX_TUNIX"}


class EvenIds:
    """A critic whose verdict takes no time, and depends on the text."""

    name = "even"

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [Verdict(coherent=len(e.text) % 2 == 0, useful=True) for e in exchanges]


class Nothing:
    """A batch of guidance as small as they get, of weight 0."""

    def __init__(self):
        one = np.ones((1, 8), np.int32)
        self.rows = Rows(one, one, one > 0, one > 0)

    def next_batch(self) -> Rows:
        return self.rows

    def get_state(self) -> None:
        return None

    def set_state(self, state: None) -> None:
        pass


def ours(model: Model, args: argparse.Namespace) -> Callable[[], dict]:
    """One step of our reinforcement, as `methods.reinforcement.improve` makes it."""
    rule, mesh = model.rule, make_mesh(devices=jax.devices()[:1])
    policy = PolicyConfig(
        "grpo", normalization="sequence", sft_weight=0.0, max_drawn=args.new, behavior=args.behavior
    )
    config = ReinforcementConfig(
        10_000, args.prompts, args.group, 1, kl_every=10_000, policy=policy,
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="constant"),
    )  # fmt: skip
    knobs = dataclasses.replace(PLAIN, max_tokens=args.new)
    random = np.random.default_rng(0)

    def source(step: int) -> list[Rollout]:
        rows = random.integers(2, 1000, (args.prompts, args.prompt)).tolist()
        return [Rollout(Request("", (), knobs, None, tuple(r)), Prompt(str(r), "")) for r in rows]

    gradient = PolicyGradient(model.config, rule, Semantics.KEEP, policy)
    rows, width = args.prompts * args.group, args.prompt + args.new
    shapes = SamplerConfig(Semantics.KEEP, rows, min_context=args.prompt, min_room=args.new)
    sampler = Sampler(model.config, model.tokenizer, shapes, rule=rule, mesh=mesh)  # type: ignore[arg-type]
    collect = Collector(
        config, gradient, sampler, EvenIds(), source, Nothing(), model.params, width, mesh, 0
    )
    first = init_policy(jax.tree.map(np.asarray, model.params), model.config, jax.random.key(0))
    learner = Learner(gradient.objective, policy_optimizer(config), first, mesh, 1)
    steps = iter(range(1, 10_000))  # step 0 would measure the KL

    def step() -> dict:
        began = time.perf_counter()
        collected = collect(learner.params, (), next(steps))
        updating = time.perf_counter()
        for batch in collected.batches:
            jax.block_until_ready(learner.update(batch))
        json.dumps(collected.rows)
        over = time.perf_counter()
        drawn = [len(row["trace"]) for row in collected.rows["rollouts"]]
        told = {**collected.seconds, "update": over - updating, "seconds": over - began}
        return told | {"rows": len(drawn), "ids": sum(drawn)}

    return step


class Child:
    """A peer in a process of its own, that makes a step when it is asked."""

    def __init__(self, name: str, python: str, folder: str, args: argparse.Namespace):
        sizes = (os.cpu_count(), args.prompts, args.group, args.prompt, args.new)
        self.process = subprocess.Popen(
            [python, str(PEER), name, folder, *map(str, sizes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def __call__(self, word: str = "step") -> dict:
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith("{") and "ready" not in line:  # libraries print, too
                return json.loads(line)
        raise SystemExit("a peer ended; what it said is above")


def main(args: argparse.Namespace) -> None:
    model = Model(args.model, args.prompt)
    with tempfile.TemporaryDirectory() as work:
        folder = f"{work}/model"
        write_checkpoint(pathlib.Path(folder), model.config, model.params)
        runs: dict[str, Callable[[], dict]] = {"ours": ours(model, args)}
        named = {name: os.environ[key] for name, key in PEERS.items() if os.environ.get(key)}
        children = {name: Child(name, python, folder, args) for name, python in named.items()}
        runs |= children
        told: dict[str, list[dict]] = {name: [] for name in runs}
        for repeat in range(args.repeats + 2):
            for name, run in runs.items():
                step = run()
                if repeat > 1:
                    told[name].append(step)
        held = {name: child("memory")["memory"] for name, child in children.items()}
        held["ours"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        for child in children.values():
            child.process.kill()
    for name, steps in told.items():
        speed = np.asarray([step["ids"] / step["seconds"] for step in steps])
        ratios = np.asarray([step["ids"] / step["seconds"] for step in told["ours"]]) / speed
        parts = {k: round(float(np.median([s[k] for s in steps])), 3) for k in steps[0]}
        row = {
            "name": f"{args.model} {args.prompts} x {args.group}, {args.prompt} + {args.new} ids",
            "who": name,
            "tokens_a_second": round(float(np.median(speed))),
            "ours_over_it": [round(float(f(ratios)), 2) for f in (np.median, np.min, np.max)],
            "memory_mb": round(held[name]),
            **parts,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32, help="ids of a prompt")
    parser.add_argument("--new", type=int, default=128, help="ids of an answer")
    parser.add_argument("--behavior", choices=("scorer", "sampler"), default="sampler")
    main(parser.parse_args())
