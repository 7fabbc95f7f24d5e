"""Which share of a training's time made steps that count."""

import json
import time

import jax
import jax.numpy as jnp
import pytest

from rlbf_jax.parallel.mesh import make_mesh
from rlbf_jax.training.goodput import BUCKETS, PRODUCTIVE, buckets
from rlbf_jax.training.journal import read_journal
from rlbf_jax.training.loop import Loop

SLEEP = 0.05


def run(folder, fails_at=None):
    loop = Loop(folder, "toy", 6, 2, make_mesh(devices=jax.devices()[:1]))
    first, state, _ = loop.start({"w": jnp.zeros(3)})

    def step(state, number):
        if number == fails_at:
            raise RuntimeError("the machine went away")
        with loop.clock.part("update"):
            time.sleep(SLEEP)
        with loop.clock.part("data"):
            time.sleep(SLEEP / 2)
        return state, {"loss": 0.0}

    return loop.run(state, first, step)


def test_seconds_of_all_buckets_are_those_since_the_first_start(tmp_path):
    began = time.time()
    run(tmp_path)
    told = json.loads((tmp_path / "goodput.json").read_text())
    assert told["seconds"].keys() == BUCKETS.keys() and told["starts"] == 1
    total = sum(told["seconds"].values())
    assert 6 * 1.5 * SLEEP <= total <= time.time() - began + 0.1
    assert told["goodput"] == pytest.approx(told["seconds"][PRODUCTIVE] / total, abs=0.01)
    assert told["seconds"][PRODUCTIVE] >= 5 * SLEEP
    assert told["seconds"]["data_loading_sync"] >= 6 * SLEEP / 2 - 0.02
    for bucket in ("wasted_progress_from_disruption", "infrastructure_recovery_time"):
        assert told["seconds"][bucket] == 0


def test_what_a_disruption_cost_is_seen_once(tmp_path):
    with pytest.raises(RuntimeError, match="went away"):
        run(tmp_path, fails_at=3)  # a checkpoint after two steps, and one step that none knows
    (row,) = [row for row in read_journal(tmp_path / "timing.jsonl") if row["step"] == 2]
    with open(tmp_path / "timing.jsonl", "a") as file:
        file.write('{"step": 3, "sec')  # as a kill leaves it
    with open(tmp_path / "starts.jsonl", "a") as file:
        file.write('{"at": 12')
    time.sleep(0.3)
    run(tmp_path)
    told = json.loads((tmp_path / "goodput.json").read_text())
    assert told["starts"] == 2
    assert told["seconds"]["wasted_progress_from_disruption"] == pytest.approx(
        row["seconds"], abs=0.01
    )
    assert 0.3 <= told["seconds"]["infrastructure_recovery_time"] < 5
    assert told["seconds"]["unproductive_checkpoint_restore_time"] > 0
    assert len(read_journal(tmp_path / "timing.jsonl")) == 6
    before = (tmp_path / "goodput.json").read_bytes()
    run(tmp_path)  # no step is left: nothing is added
    assert (tmp_path / "goodput.json").read_bytes() == before


def test_without_a_start_there_is_nothing(tmp_path):
    assert buckets(tmp_path, time.time()) == dict.fromkeys(BUCKETS, 0.0)
