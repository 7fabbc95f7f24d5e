"""One of several processes, run by `test_hosts.py`: joins the others, and does what it is told."""

from __future__ import annotations

import dataclasses
import pathlib
import time

import tyro

from rlbf_jax.cli.main import exit_code
from rlbf_jax.errors import UserError
from rlbf_jax.parallel import hosts


@dataclasses.dataclass(frozen=True)
class Args:
    do: str
    here: tyro.conf.OmitArgPrefixes[hosts.Hosts] = hosts.Hosts()
    seed: int = 0
    workdir: pathlib.Path = pathlib.Path("runs")
    url: str = ""


def exchange(args: Args) -> None:
    me = hosts.process()
    for _ in range(3):
        assert hosts.gather({"from": me}) == [{"from": 0}, {"from": 1}]
        assert hosts.from_first(lambda: [me, "first"]) == [0, "first"]
        assert hosts.all_of([me, -(1 << 40)]).tolist() == [[0, -(1 << 40)], [1, -(1 << 40)]]
    done: list[int] = []
    hosts.first_alone(lambda: done.append(me))
    assert done == ([0] if me == 0 else [])
    hosts.same_everywhere("a number", 3, "mend it")
    arrays()
    print("all exchanged", flush=True)


def arrays() -> None:
    import jax
    import numpy as np

    from rlbf_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh, replicated
    from rlbf_jax.parallel.placing import Assembled, fetched, placed, rows_here

    mesh = make_mesh(MeshConfig(fsdp=2))
    tree = {"rows": np.arange(12.0).reshape(4, 3), "key": jax.random.key(7), "few": np.int32(5)}
    rows, copies = batch_sharding(mesh), replicated(mesh)
    there = placed(tree, {"rows": rows, "key": copies, "few": copies})
    assert not there["rows"].is_fully_addressable
    assert placed(there["rows"], rows) is there["rows"] or (
        placed(there["rows"], rows).sharding == rows
    )
    # Each process reads its own rows of a batch; on this mesh they are not neighbors alone.
    batch = np.arange(24).reshape(8, 3)
    for sharding in (rows, batch_sharding(make_mesh(MeshConfig(data=1, tensor=4)))):
        here = rows_here(8, sharding)
        assert len(here) == (4 if sharding is rows else 8)
        made = Assembled(iter([{"x": batch[here]}]), 8, sharding)
        assert (fetched(next(made)["x"]) == batch).all()
    key = jax.random.key_data(there.pop("key"))
    found = fetched({**there, "key": key, "own": np.ones(2)})
    np.testing.assert_array_equal(found["rows"], tree["rows"])
    np.testing.assert_array_equal(found["key"], jax.random.key_data(jax.random.key(7)))
    assert found["few"] == 5 and found["own"].tolist() == [1, 1]


def wait(args: Args) -> None:
    """In a collective, over and over, until this process or another is struck."""
    print("in a loop", flush=True)
    while True:
        hosts.all_of([1])
        time.sleep(0.05)


def wait_for_first(args: Args) -> None:
    """Process 0 is busy with its own, and the other waits for it."""
    print("in a loop", flush=True)
    hosts.first_alone(lambda: time.sleep(600))


def fail(args: Args) -> None:
    if hosts.process() == 1:
        raise UserError("cannot read a file")
    wait(args)


def fail_all(args: Args) -> None:
    raise UserError("nobody can read a file")


def crash(args: Args) -> None:
    if hosts.process() == 1:
        raise ZeroDivisionError("a mistake of ours")
    wait(args)


def agree(args: Args) -> None:
    from rlbf_jax.runs.processes import agree as check
    from tests.training.tiny_experiment import get_config

    check(get_config().replace(seed=args.seed), args.workdir)


def share(args: Args) -> None:
    from rlbf_jax.runs import processes

    processes.SHARED_S = 0.5
    processes.check_shared(args.workdir)


def judge(args: Args) -> None:
    from rlbf_jax.critics.base import Exchange
    from rlbf_jax.critics.language.http_critic import HttpCritic, HttpCriticConfig

    config = HttpCriticConfig(base_url=args.url, model="m", format="harmbench", retries=0)
    critic = HttpCritic(config, ("x",), args.workdir / "answers.jsonl")
    texts = ["one", "two", "fails", "one"]
    verdicts = critic.judge([Exchange("p", text) for text in texts])
    print([[v.judged, bool(v.spans), v.reason] for v in verdicts], flush=True)


def main() -> int:
    args = tyro.cli(Args)

    def command() -> None:
        hosts.connect(args.here)
        globals()[args.do](args)

    return exit_code(command, "go on with: the same")


if __name__ == "__main__":
    raise SystemExit(main())
