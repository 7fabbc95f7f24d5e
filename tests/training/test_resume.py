"""A run killed with SIGKILL in the middle of a stage, and started again, is the undisturbed run to
the byte.

Runs are children: a SIGKILL leaves no process to assert in.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from rlbf_jax.runs.load import open_run

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
EXPERIMENT = str(pathlib.Path(__file__).with_name("tiny_experiment.py"))
DEADLINE = 400
"""Seconds that a child may take on a crowded machine."""
STAGES = ("base", "sft", "rlbf")
TIMES = ("timing.jsonl", "starts.jsonl")
"""Journals of the clock."""


@contextlib.contextmanager
def run(workdir):
    """A child that runs the experiment in `workdir`; it is gone afterwards, whatever happens."""
    command = [
        sys.executable,
        "-c",
        "from rlbf_jax.cli.main import main; main()",
        "run",
        EXPERIMENT,
        "--workdir",
        workdir,
    ]
    with open(log_of(workdir), "ab") as log:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def log_of(workdir):
    return workdir.with_suffix(".log")


def finish(workdir):
    with run(workdir) as child:
        assert child.wait(DEADLINE) == 0, log_of(workdir).read_text()[-3000:]
    return workdir


def kill_in(workdir, stage, rows):
    """Starts the run and kills it as soon as `metrics.jsonl` of the stage has `rows` rows."""
    metrics, end = workdir / "stages" / stage / "metrics.jsonl", time.monotonic() + DEADLINE
    with run(workdir) as child:
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < rows:
            assert child.poll() is None, (
                f"ended before row {rows} of {stage}\n{log_of(workdir).read_text()[-3000:]}"
            )
            assert time.monotonic() < end, (
                f"no row {rows} of {stage}\n{log_of(workdir).read_text()[-3000:]}"
            )
            time.sleep(0.002)
        os.killpg(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert not (workdir / "done" / stage).exists(), "killed too late to prove anything"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("resume") / "undisturbed")


# Checkpoints are written every 2 steps: rows 1 die before any, row 3 with a row that must be taken
# back.
@pytest.mark.parametrize("rows", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_in_sft_and_again_in_rlbf_ends_as_the_undisturbed_one(
    undisturbed, tmp_path, rows
):
    killed = tmp_path / "killed"
    kill_in(killed, "sft", rows)
    kill_in(killed, "rlbf", rows)
    finish(killed)

    names = [
        p.relative_to(undisturbed) for p in undisturbed.rglob("*.jsonl") if p.name not in TIMES
    ]
    assert {str(n) for n in names} >= {f"stages/{s}/metrics.jsonl" for s in STAGES} | {
        "stages/rlbf/rollouts.jsonl"
    }
    for name in [*names, pathlib.Path("results.json"), pathlib.Path("data/report.json")]:
        assert (killed / name).read_bytes() == (undisturbed / name).read_bytes(), name
    for stage in STAGES:
        pair = [open_run(folder).policy(stage).params for folder in (killed, undisturbed)]
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), *pair
        )


def test_a_finished_run_is_not_run_again(undisturbed):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.glob("stages/*/metrics.jsonl")}
    finish(undisturbed)
    assert {p: p.stat().st_mtime_ns for p in before} == before
