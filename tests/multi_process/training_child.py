"""Run by `test_training.py`, by one process or several: supervised training with checkpoints, then
reinforcement's measurements and a sample. Writes what came out into its folder."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import optax
import tyro

from rlbf_jax.cli.main import exit_code
from rlbf_jax.directives import Semantics
from rlbf_jax.parallel import hosts
from rlbf_jax.parallel.mesh import MeshConfig, make_mesh
from rlbf_jax.parallel.placing import fetched
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig
from rlbf_jax.training.learner import Learner
from rlbf_jax.training.loop import Loop
from rlbf_jax.training.supervised import Rows, supervised_objective, train
from tests.fakes import LetterTokenizer, random_model

TOKENIZER = LetterTokenizer()
RULE = TOKENIZER.controls.rule()


@dataclasses.dataclass(frozen=True)
class Args:
    folder: pathlib.Path
    steps: int
    here: tyro.conf.OmitArgPrefixes[hosts.Hosts] = hosts.Hosts()
    data: int = 1
    """Of the mesh; the rest is fsdp."""
    last_words: str = "out"


class Drawn:
    """Batches of random rows by their number."""

    def __init__(self) -> None:
        self.number = 0

    def next_batch(self) -> Rows:
        rng = np.random.default_rng(self.number)
        self.number += 1
        shape = (8, 16)
        responding = np.broadcast_to(np.arange(16) >= 4, shape)
        tokens = rng.integers(5, RULE.end_id, shape).astype(np.int32)
        return Rows(tokens, np.ones(shape, np.int32), responding, responding)

    def get_state(self) -> int:
        return self.number

    def set_state(self, state: int) -> None:
        self.number = state


def work(args: Args) -> None:
    size = (TOKENIZER.vocab_size // 4 + 1) * 4
    model, initial = random_model(TOKENIZER, num_layers=1, vocab_size=size)
    mesh = make_mesh(MeshConfig(data=args.data, fsdp=-1))
    objective = supervised_objective(model, RULE, Semantics.REWIND)
    learner = Learner(objective, optax.adam(1e-2), initial, mesh, accumulate=2)
    loop = Loop(args.folder, "toy", args.steps, 2, mesh)
    params = train(learner, Drawn(), loop)

    knobs = Knobs(max_tokens=12, budget=2, control_bias={"categories": 2.0})
    requests = [Request(f"tell {'abcdefgh'[i % 5]}", (), knobs, id=i) for i in range(10)]
    shapes = SamplerConfig(Semantics.REWIND, 8, min_context=16, min_room=16)
    sampler = Sampler(model, TOKENIZER, shapes, rule=RULE, mesh=mesh)
    sampled = sampler(params, requests, 5)

    moments = jax.tree.leaves(learner.state.opt_state)
    flat = [np.ravel(x) for x in (*jax.tree.leaves(fetched(params)), *fetched(moments))]
    if hosts.is_first():
        np.savez(args.folder / f"{args.last_words}.npz", *flat)
        said = [[g.trace.tolist(), g.text] for g in sampled]
        (args.folder / f"{args.last_words}.json").write_text(json.dumps(said))
    whole = [x for x in jax.tree.leaves(params) if x.is_fully_addressable]
    print(f"{len(jax.devices())} devices, {len(whole)} arrays here alone", flush=True)


def main() -> int:
    args = tyro.cli(Args)

    def command() -> None:
        hosts.connect(args.here)
        work(args)

    return exit_code(command, "go on with: the same")


if __name__ == "__main__":
    raise SystemExit(main())
