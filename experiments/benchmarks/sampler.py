"""Our sampler against a plain JAX loop, `transformers` and tunix with the same weights, against
itself without what it has beyond them, and continuous against static batches.

Command: python experiments/benchmarks/sampler.py PART [--repeats 5] [--model small large]
  [--batch 1 8 32] [--prompt 32] [--semantics keep rewind]

Parts:
  peers       128 new ids a row, all alike. RLBF_JAX_PEERS=PYTHON adds `transformers`, and
              RLBF_JAX_TUNIX=PYTHON adds tunix, each in a process of its own.
  directives  what directives cost: a rule without any, directives that are legal and do not fire,
              and directives on 5 and 20 % of rows, under both semantics; REWIND against what users
              of other engines would do (stop at the directive, ask again with the ids that stay).
  lengths     rows of unlike lengths: continuous batches against static ones of the same sampler.
  roofline    bytes of weights and cache that an id reads, over the measured bandwidth of a copy.

Calls of ours and of a peer alternate; a line is the median of the ratios with their range. Greedy
answers are compared first. `transformers` and tunix keep their defaults, threads apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from common import seconds
from plain_loop import plain_sample, plain_weights
from sampler_setting import GREEDY, NEW, PLAIN, SHAPES, Model, NoRule, compared

from rlbf_jax.directives import Semantics
from rlbf_jax.models.weights.write import write_checkpoint
from rlbf_jax.sampling import loop
from rlbf_jax.sampling.request import Generation, Request

PEER = pathlib.Path(__file__).with_name("sampler_peer.py")


# Peers ------------------------------------------------------------------------------------------


class Child:
    """A peer in a process of its own."""

    def __init__(self, name: str, python: str, folder: str):
        command = [python, str(PEER), name, folder, str(os.cpu_count())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        json.loads(self.process.stdout.readline())

    def __call__(self, prompts: list[list[int]], greedy: bool = False) -> dict:
        asked = {"prompts": prompts, "new": NEW, "greedy": greedy}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def children(model: Model, folder: str) -> dict[str, Child]:
    """The peers that the environment names, with this model's weights."""
    known = {"transformers": "RLBF_JAX_PEERS", "tunix": "RLBF_JAX_TUNIX"}
    asked = {name: os.environ[key] for name, key in known.items() if os.environ.get(key)}
    if asked:
        write_checkpoint(pathlib.Path(folder), model.config, model.params)
    return {name: Child(name, python, folder) for name, python in asked.items()}


def agreement(ours: list[Generation], theirs, first_control: int) -> float:
    """Share of equal ids among the first eight of greedy answers, up to a control id of a peer that
    knows of none: once one id is another, the rest differs."""
    equal = [
        bool(a == b)
        for g, ids in zip(ours, theirs, strict=True)
        for a, b in itertools.takewhile(
            lambda pair: pair[1] < first_control, zip(g.trace[:8], ids[:8], strict=True)
        )
    ]
    return float(np.mean(equal))


def peers(args: argparse.Namespace, model: Model) -> Iterator[dict]:
    weights, first = plain_weights(model.params, model.config), model.rule.first_id
    with tempfile.TemporaryDirectory() as folder:
        others = children(model, f"{folder}/model")
        for batch in args.batch:
            prompts = model.prompts(batch)
            array = np.asarray(prompts, np.int32)

            def plain(greedy: bool, array=array):
                key = jax.random.key(1)
                return plain_sample(model.config, weights, array, key, NEW, greedy)

            ran: dict[str, Callable[[], float]] = {
                "plain loop": lambda: seconds(lambda: plain(False))
            }
            for name, child in others.items():
                ran[name] = lambda child=child, prompts=prompts: child(prompts)["seconds"]
            for semantics in map(Semantics, args.semantics):
                sample = model.sampler(batch, semantics)
                greedy = sample(model.requests(batch, GREEDY))
                equal = {"plain loop": agreement(greedy, np.asarray(plain(True)), first)}
                equal |= {
                    n: agreement(greedy, c(prompts, True)["ids"], first) for n, c in others.items()
                }
                requests = model.requests(batch, PLAIN)
                name = f"{model.name} batch {batch} prompt {model.prompt} {semantics.value}"
                for row in compared(name, lambda s=sample, r=requests: s(r), ran, args.repeats):
                    yield row | {
                        "agree": equal[row["peer_name"]],
                        "tokens_a_second": round(batch * NEW / row["ours"]),
                        "peer_tokens_a_second": round(batch * NEW / row["peer"]),
                    }
        for child in others.values():
            child.process.kill()


# Directives -------------------------------------------------------------------------------------


def directives(args: argparse.Namespace, model: Model) -> Iterator[dict]:
    for batch in args.batch:
        for semantics in map(Semantics, args.semantics):
            sample = model.sampler(batch, semantics)
            bare = model.sampler(batch, semantics, NoRule(model.config.vocab_size))
            plain = model.requests(batch, PLAIN)
            quiet = model.requests(
                batch,
                dataclasses.replace(PLAIN, forbid_from=2**30, control_bias={"categories": -1e9}),
            )
            name = f"{model.name} batch {batch} {semantics.value}"

            def cost(what: str, requests, against: str, other, name=name, sample=sample):
                yield from compared(
                    f"{name}: {what}",
                    lambda: sample(requests),
                    {against: lambda: seconds(other)},
                    args.repeats,
                )

            yield from cost(
                "legal, none fires", quiet, "no rule", lambda bare=bare, plain=plain: bare(plain)
            )
            for share in (0.05, 0.2):
                count = round(share * batch)
                if not count:
                    continue
                # One in the middle of an answer, which takes X ids back.
                fires = dataclasses.replace(
                    PLAIN, forbid_from=0, forbid_to=NEW // 2, budget=1,
                    control_bias={"categories": 1e9, "[BACKTRACK_BY_16]": 1e9},
                )  # fmt: skip
                some = model.requests(batch, [fires] * count + [PLAIN] * (batch - count))
                fired = sum(len(g.edits) for g in sample(some))
                assert fired == count, f"{fired} directives fired, not {count}"
                yield from cost(
                    f"fires on {count} rows",
                    some,
                    "none fires",
                    lambda sample=sample, quiet=quiet: sample(quiet),
                )
                if semantics is Semantics.REWIND:
                    yield from cost(
                        f"fires on {count} rows", some, "stop and ask again",
                        lambda some=some, bare=sample: stop_and_ask_again(model, bare, some),
                    )  # fmt: skip


def stop_and_ask_again(model: Model, sample, requests: list[Request]) -> None:
    """What an engine without directives has to do: every directive ends an answer, and what stays
    is sent in again as a prompt."""
    ends = tuple(range(model.rule.first_retraction, model.rule.end_id))
    waiting = [
        dataclasses.replace(r, knobs=dataclasses.replace(r.knobs, stop_ids=ends)) for r in requests
    ]
    while waiting:
        again = []
        for g in sample(waiting):
            left = g.request.knobs.max_tokens - len(g.trace)
            if g.finished and left:
                knobs = dataclasses.replace(PLAIN, max_tokens=left)
                again.append(Request("", (), knobs, None, (*g.prompt_ids.tolist(), *g.visible)))
        waiting = again


# Lengths ----------------------------------------------------------------------------------------


def lengths(args: argparse.Namespace, model: Model) -> Iterator[dict]:
    """Geometric: nobody knows a length beforehand, an id ends an answer with probability 1 / 60.
    Log-normal (median 45, sigma 0.8): the lengths are `max_tokens`."""
    rng = np.random.default_rng(1)
    count, cap = args.requests, 512
    ordinary = np.arange(2, model.config.vocab_size - 42)
    stops = tuple(rng.permutation(ordinary)[: model.config.vocab_size // 60].tolist())
    drawn = np.clip(np.exp(rng.normal(np.log(45), 0.8, count)), 1, cap).astype(int)
    kinds = {
        "geometric": [dataclasses.replace(PLAIN, max_tokens=cap, stop_ids=stops)] * count,
        "log-normal": [dataclasses.replace(PLAIN, max_tokens=int(n)) for n in drawn],
    }
    for batch in args.batch:
        sample = model.sampler(batch, room=cap)
        for kind, knobs in kinds.items():
            requests = [
                dataclasses.replace(r, id=i) for i, r in enumerate(model.requests(count, knobs))
            ]

            def static(requests=requests, sample=sample, batch=batch):
                return [sample(requests[i : i + batch]) for i in range(0, count, batch)]

            share, found = busy(batch, lambda s=sample, r=requests: s(r))
            still, _ = busy(batch, static)
            ids = [len(g.trace) for g in found]
            before = loop.compilations()
            (row,) = compared(
                f"{model.name} batch {batch}: {count} requests of {kind} lengths "
                f"(mean {np.mean(ids):.0f}, most {max(ids)})",
                lambda s=sample, r=requests: s(r),
                {"static batches": lambda static=static: seconds(static)},
                args.repeats,
            )
            yield row | {
                "rows_busy": round(share, 3),
                "rows_busy_static": round(still, 3),
                "compilations": loop.compilations() - before,
                "tokens_a_second": round(sum(ids) / row["ours"]),
            }


def busy(batch: int, run: Callable[[], list]) -> tuple[float, list]:
    """Share of rows that drew an id, over all turns, and what was sampled."""
    go_on, told = loop.go_on, []

    def counted(params, asked, state, *args, **static):
        emitted = np.asarray(state.edit.emitted)
        after = go_on(params, asked, state, *args, **static)
        drawn = np.asarray(after.edit.emitted) - emitted
        told.append((drawn.max(), drawn.sum()))
        return after

    loop.go_on = counted
    try:
        found = run()
    finally:
        loop.go_on = go_on
    turns, drawn = np.sum(told, axis=0)
    return float(drawn / (turns * batch)), found


# Roofline ---------------------------------------------------------------------------------------


def roofline(args: argparse.Namespace, model: Model) -> Iterator[dict]:
    """At batch 1 an id costs at least one reading of all weights but the embedding's rows."""
    source, square = np.ones(1 << 27, np.float32), jnp.ones((2048, 2048))
    product = jax.jit(lambda x: x @ x)
    target = np.empty_like(source)
    weights = (
        sum(x.nbytes for x in jax.tree.leaves(model.params)) - model.params["embedding"].nbytes
    )
    for batch in args.batch:
        c = model.config
        cache = 2 * c.num_layers * c.num_kv_heads * c.head_dim * 4 * (model.prompt + NEW)
        flops = 2 * weights / 4 * batch
        sample, requests = model.sampler(batch), model.requests(batch, PLAIN)
        sample(requests)
        times = []
        for _ in range(args.repeats):
            began = time.perf_counter()
            np.copyto(target, source)
            copied = 2 * source.nbytes / (time.perf_counter() - began)
            rate = 2 * 2048**3 / min(seconds(lambda: product(square)) for _ in range(3))
            times.append((seconds(lambda s=sample, r=requests: s(r)) / NEW, copied, rate))
        ours, copied, rate = np.median(times, axis=0)
        # A copy reads and writes; an id only reads.
        memory, matrix = (weights + batch * cache) / copied, flops / rate
        yield {
            "name": f"{model.name} batch {batch}: roofline",
            "ours": ours,
            "peer": max(memory, matrix),
            "peer_name": "memory bound" if memory > matrix else "matrix bound",
            "ratio": max(memory, matrix) / ours,
            "gigabytes_a_second": round(copied / 1e9, 1),
            "gigaflops_a_second": round(rate / 1e9, 1),
        }


PARTS = {"peers": peers, "directives": directives, "lengths": lengths, "roofline": roofline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", nargs="+", type=int, default=[32])
    parser.add_argument("--requests", type=int, default=256, help="of part lengths")
    parser.add_argument("--semantics", nargs="+", default=["keep", "rewind"])
    args = parser.parse_args()
    for name in args.model:
        for prompt in args.prompt:
            for row in PARTS[args.part](args, Model(name, prompt)):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
