"""Rollouts of one step earlier (`reinforcement.staleness` 1) against none: steps a second beside a
slow critic, and the reward that training ends with.

Command: python experiments/benchmarks/staleness.py speed --work runs/staleness
         python experiments/benchmarks/staleness.py rewards --work runs/staleness

Parts:
  speed    the quickstart's reinforcement of a model of twice the width, judged by an endpoint in a
           process of its own that sleeps as long as sampling takes, or --slower times as long. One
           update a step and two rows at a time, so that sampling is a third of a step (on a CPU it
           is less, on accelerators more). Trainings alternate; a figure is the median of steps.
  rewards  the quickstart with its own critic, three seeds: mean reward of the last ten steps, and
           the paired difference with Student's interval.
"""

from __future__ import annotations

import dataclasses
import http.server
import json
import math
import multiprocessing
import pathlib
import shutil
import statistics
import sys
import time
from typing import Literal

import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))
from experiments.quickstart import get_config
from rlbf_jax.runs import execute
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.training.journal import read_journal

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Observations -> quantile .975 of Student's t."""


@dataclasses.dataclass(frozen=True)
class Args:
    part: tyro.conf.Positional[Literal["speed", "rewards"]]
    work: pathlib.Path
    """Folder of the runs; what is there is used again."""
    repeats: int = 3
    """Trainings of each kind (speed)."""
    steps: int = 12
    """Steps of a training (speed)."""
    slower: float = 1.0
    """How long the critic takes, in times of sampling (speed)."""
    seeds: int = 3


def prepared(e: Experiment, folder: pathlib.Path) -> pathlib.Path:
    """A run of everything before reinforcement."""
    names = [stage.name for stage in execute.recipe(e)]
    execute.run(e, folder, only=names[: names.index("rlbf")])
    return folder


def reinforced(e: Experiment, before: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The folder of the stage `rlbf`, made from a run of everything before it."""
    if not (folder / "done" / "rlbf").exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        (folder / "manifest.json").unlink()  # the copy is a run of its own
        execute.run(e, folder, only=["rlbf"])
    return folder / "stages" / "rlbf"


# Speed ------------------------------------------------------------------------------------------


class Sleepy(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    delay = 0.0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.delay)
        said = "Yes" if len(body) % 2 else "No"
        message = {"role": "assistant", "content": said}
        choice = {"message": message, "finish_reason": "stop"}
        answer = json.dumps({"choices": [choice], "usage": {"total_tokens": 1}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512


def serve(delay: float, port: multiprocessing.Queue) -> None:
    Sleepy.delay = delay
    server = Server(("127.0.0.1", 0), Sleepy)
    port.put(server.server_address[1])
    server.serve_forever()


def step_seconds(
    e: Experiment, before: pathlib.Path, folder: pathlib.Path, staleness: int, delay: float
) -> tuple[float, dict[str, float]]:
    """(median seconds of a step, of its parts) of a training judged by a sleeping endpoint."""
    context = multiprocessing.get_context("spawn")
    port: multiprocessing.Queue = context.Queue()
    server = context.Process(target=serve, args=(delay, port), daemon=True)
    server.start()
    flags = {
        "reinforcement.staleness": staleness,
        "critic_endpoint.model": "sleepy",
        "critic_endpoint.base_url": f"http://127.0.0.1:{port.get()}/v1",
        "critic_endpoint.format": "harmbench",
        "critic_endpoint.concurrency": 256,
    }
    try:
        shutil.rmtree(folder, ignore_errors=True)
        stage = reinforced(e.changed(flags), before, folder)
    finally:
        server.kill()
    timed = [row for row in read_journal(stage / "timing.jsonl") if not row.get("compiling")][1:]
    parts = {
        part: statistics.median(row.get(part, 0.0) for row in timed)
        for part in ("sampling", "judging", "measuring", "update")
    }
    return statistics.median(row["seconds"] for row in timed), parts


def speed(args: Args) -> None:
    e = get_config().changed(
        {
            "baselines": False,
            "model.width": 192,
            "model.num_heads": 6,
            "model.num_kv_heads": 6,
            "model.mlp_width": 512,
            "pretraining.steps": 30,
            "sft.steps": 20,
            "reinforcement.steps": args.steps,
            "reinforcement.updates_per_step": 1,
            "reinforcement.guidance_batch_size": 2,
            "sampling_batch": 2,
        }
    )
    before = prepared(e, args.work / "before")
    folder = args.work / "speed"
    alone = [step_seconds(e, before, folder, 0, 0.0)[1] for _ in range(2)]
    sampling, asking = (min(parts[name] for parts in alone) for name in ("sampling", "judging"))
    delay = max(0.0, args.slower * sampling - asking)
    print(f"sampling {sampling:.2f} s a step; an answer takes {delay:.2f} s")
    ratios = []
    for _ in range(args.repeats):
        found = {}
        for staleness in (0, 1):
            found[staleness], parts = step_seconds(e, before, folder, staleness, delay)
            shown = ", ".join(f"{part} {spent:.2f}" for part, spent in parts.items())
            print(f"staleness {staleness}: {found[staleness]:.2f} s a step ({shown})", flush=True)
        ratios.append(found[0] / found[1])
    print(
        f"steps a second, staleness 1 / 0: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


# Rewards ----------------------------------------------------------------------------------------


def rewards(args: Args) -> None:
    differences = []
    for seed in range(args.seeds):
        e = get_config().replace(seed=seed, baselines=False)
        before = prepared(e, args.work / f"seed_{seed}")
        last = {}
        for staleness in (0, 1):
            mine = e.changed({"reinforcement.staleness": staleness})
            stage = reinforced(mine, before, args.work / f"seed_{seed}_staleness_{staleness}")
            last[staleness] = statistics.mean(
                row["reward"] for row in read_journal(stage / "metrics.jsonl")[-10:]
            )
        differences.append(last[1] - last[0])
        print(f"seed {seed}: reward {last[0]:.3f}, with staleness 1 {last[1]:.3f}", flush=True)
    mean = statistics.mean(differences)
    if len(differences) in STUDENT:
        half = STUDENT[len(differences)] * statistics.stdev(differences)
        half /= math.sqrt(len(differences))
        print(f"difference {mean:+.3f}, 95 % from {mean - half:+.3f} to {mean + half:+.3f}")


if __name__ == "__main__":
    given = tyro.cli(Args)
    {"speed": speed, "rewards": rewards}[given.part](given)
