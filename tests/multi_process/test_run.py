"""Whole runs of two processes: the same as those of one, whatever happens to them."""

from __future__ import annotations

import collections
import hashlib
import json
import pathlib
import random
import shutil
import signal
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import pytest

from rlbf_jax.training.journal import read_journal
from rlbf_jax.training.model_folder import load_model
from tests.multi_process.groups import Group, started

pytestmark = pytest.mark.slow

FLAGS = {
    "pretraining.batch_size": 8,
    "sft.batch_size": 8,
    "refusal_sft.batch_size": 8,
    "reinforcement.guidance_batch_size": 8,
    "reinforcement.prompts_per_step": 4,
    "reinforcement.group_size": 4,
}
"""What eight devices divide."""
STAGES = ("base", "refusal_sft", "sft", "sft_control", "rlbf")
PATIENCE = 5.0
MOMENTS = 20


def running(folder: pathlib.Path, count: int, flags: Mapping[str, object] = FLAGS):
    argv = ["-m", "rlbf_jax.cli.main", "run", "experiments/smoke.py", "--workdir", str(folder)]
    argv += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return started(folder.with_name(f"{folder.name}_logs"), argv, count, 8 // count, (), PATIENCE)


def run(folder: pathlib.Path, count: int, flags: Mapping[str, object] = FLAGS) -> pathlib.Path:
    with running(folder, count, flags) as group:
        for ended in group.ended(400):
            assert ended.code == 0, ended.log[-3000:]
    return folder


@pytest.fixture(scope="module")
def of_one(tmp_path_factory) -> pathlib.Path:
    return run(tmp_path_factory.mktemp("one") / "run", 1)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> pathlib.Path:
    return run(tmp_path_factory.mktemp("two") / "run", 2)


def check_same(found: pathlib.Path, wanted: pathlib.Path) -> None:
    """The same rollouts and answers, and parameters up to the order in which devices add up. That
    order also decides a draw that lies between two ids to the last bit, so that not all are."""
    drawn, alike = 0, 0
    for path in ("stages/rlbf/rollouts.jsonl", *(f"evaluation/{stage}.jsonl" for stage in STAGES)):
        pairs = list(zip(read_journal(found / path), read_journal(wanted / path), strict=True))
        assert all(one["prompt"] == other["prompt"] for one, other in pairs)
        drawn += len(pairs)
        alike += sum(one["trace"] == other["trace"] for one, other in pairs)
    print(f"{alike} of {drawn} rollouts and answers alike")
    assert drawn > 300 and alike >= 0.98 * drawn
    for stage in STAGES:
        params = [jax.tree.leaves(load_model(f / "stages" / stage)[1]) for f in (found, wanted)]
        for one, other in zip(*params, strict=True):
            np.testing.assert_allclose(one, other, atol=5e-5, rtol=1e-5)
    assert (found / "report.html").stat().st_size > 10_000


def test_two_processes_make_the_run_of_one(of_one, of_two):
    check_same(of_two, of_one)


def test_asked_to_stop_all_save_within_the_grace_and_one_process_goes_on(of_one, tmp_path):
    folder = tmp_path / "run"
    with running(folder, 2) as group:
        group.wait_for("rlbf: an update takes")
        began = time.monotonic()
        group.strike(1, signal.SIGTERM)  # one host of a pod is told; the other hears of it
        ended = group.ended(60)
        assert time.monotonic() - began < 30
    for one in ended:
        assert one.code == 130
        assert "stage rlbf stopped after step" in one.log.splitlines()[-1]
        assert "its state is saved" in one.log.splitlines()[-1]
    check_same(run(folder, 1), of_one)


# Killed at random moments -----------------------------------------------------------------------

LONG = {**FLAGS, "reinforcement.steps": 14}
History = Sequence[tuple[int, str]]
"""(step, hash of what that step wrote down), in the order in which they were recorded."""


def recorded(folder: pathlib.Path) -> list[tuple[int, str]]:
    """What the journals of reinforcement say now: a whole row of metrics and all rollouts a step.
    A last line that is half written, as a kill leaves it, does not count."""
    stage = folder / "stages" / "rlbf"
    found: dict[int, list[str]] = collections.defaultdict(list)
    for name in ("rollouts.jsonl", "metrics.jsonl"):
        text = (stage / name).read_text() if (stage / name).exists() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                found[json.loads(line)["step"]].append(line)
    # Metrics are written after the rollouts: a step with both is whole.
    whole = {step: lines for step, lines in found.items() if '"reward": ' in lines[-1]}
    whole = {step: lines for step, lines in whole.items() if '"prompt_id"' not in lines[-1]}
    return [(n, hashlib.sha256("".join(whole[n]).encode()).hexdigest()) for n in sorted(whole)]


def contradictions(history: History) -> list[int]:
    """Steps that were recorded with two different hashes."""
    seen: dict[int, set[str]] = collections.defaultdict(set)
    for step, digest in history:
        seen[step].add(digest)
    return sorted(step for step, digests in seen.items() if len(digests) > 1)


def state_of(folder: pathlib.Path) -> str:
    """Hash of the parameters that reinforcement has kept."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(load_model(folder / "stages" / "rlbf")[1]):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def strike_at_random(group: Group, rng: random.Random, victims: Sequence[int]) -> bool:
    """Kills processes after a while; whether the run was still there."""
    group.wait_for("rlbf: an update takes", timeout=240)
    time.sleep(rng.uniform(0.0, 4.0))
    there = all(process.poll() is None for process in group.processes)
    for victim in victims:
        group.strike(victim)
    return there


@pytest.fixture(scope="module")
def before_reinforcement(tmp_path_factory) -> pathlib.Path:
    """A run whose supervised stages are done."""
    folder = tmp_path_factory.mktemp("before") / "run"
    with running(folder, 2, LONG) as group:
        group.wait_for("rlbf: an update takes", timeout=300)
    shutil.rmtree(folder / "stages" / "rlbf")
    return folder


def copy_of(before: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    shutil.copytree(before, folder)
    return folder


def test_killed_at_random_moments_it_is_the_undisturbed_run_to_the_bit(
    before_reinforcement, tmp_path
):
    place = tmp_path / "here"
    place.mkdir()
    # The manifest knows no folder, so a copy is the same run.
    undisturbed = run(copy_of(before_reinforcement, tmp_path / "undisturbed"), 2, LONG)
    folder = copy_of(before_reinforcement, tmp_path / "struck")
    rng = random.Random(0)
    history = recorded(undisturbed)
    assert len(history) == LONG["reinforcement.steps"]
    strikes, longest = 0, 0.0
    while strikes < MOMENTS:
        victims = rng.choice([(0,), (1,), (0, 1)])
        with running(folder, 2, LONG) as group:
            there = strike_at_random(group, rng, victims)
            began = time.monotonic()
            codes = [ended.code for ended in group.ended(60)]
            longest = max(longest, time.monotonic() - began)
        if not there:
            break  # it came to its end before its turn to be struck
        assert all(code != 0 for code in codes)
        strikes += 1
        history += recorded(folder)
        if strikes % 4 == 0 and (folder / "stages" / "rlbf" / "checkpoints").exists():
            shutil.copytree(folder, tmp_path / f"kept_{strikes}")
        if len(recorded(folder)) > LONG["reinforcement.steps"] - 3:
            shutil.rmtree(folder / "stages" / "rlbf")  # begin again: more moments to be struck at
    print(f"{strikes} strikes, the last process ended after at most {longest:.1f} s")
    assert strikes >= MOMENTS
    run(folder, 2, LONG)
    history += recorded(folder)
    assert contradictions(history) == []
    assert state_of(folder) == state_of(undisturbed)
    assert recorded(folder) == recorded(undisturbed)


def strike_after_a_checkpoint(folder: pathlib.Path) -> None:
    """Kills a run once it has a checkpoint of reinforcement."""
    with running(folder, 2, LONG) as group:
        while not list((folder / "stages" / "rlbf" / "checkpoints").glob("*/checksums.json")):
            assert group.processes[0].poll() is None, group.log(0)[-3000:]
            time.sleep(0.05)
        for process in (0, 1):
            group.strike(process)


def test_the_checker_sees_a_run_that_differs(before_reinforcement, tmp_path):
    """Its journals go on from a checkpoint, and its data do not: they begin anew."""
    first = run(copy_of(before_reinforcement, tmp_path / "a"), 2, LONG)
    other = copy_of(before_reinforcement, tmp_path / "b")
    strike_after_a_checkpoint(other)
    data = other / "stages" / "rlbf" / "checkpoints"
    for file in data.glob("*/meta/metadata"):
        meta = json.loads(file.read_text())
        meta["extra"] = {}  # the guidance batches begin anew
        file.write_text(json.dumps(meta))
        file.parent.parent.joinpath("checksums.json").unlink()
    run(other, 2, LONG)
    assert contradictions([*recorded(first), *recorded(first)]) == []
    assert contradictions([*recorded(first), *recorded(other)])
    assert state_of(first) != state_of(other)
