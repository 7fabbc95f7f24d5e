"""Where the seconds of a training go."""

import json

import jax
import jax.numpy as jnp
import pytest

from rlbf_jax.training import clock
from rlbf_jax.training.clock import Clock, Minutes
from tests.training.test_online import run


@pytest.fixture
def time(monkeypatch):
    """Moves the clock on: `time(seconds)`."""
    now = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def on(seconds):
        now[0] += seconds

    return on


def test_parts_add_up_and_are_taken_once(time):
    spent = Clock()
    for seconds in (1.5, 2.0):
        with spent.part("update"):
            time(seconds)
        time(10)
    with pytest.raises(KeyError), spent.part("data"):
        time(0.25)
        raise KeyError
    spent.add({"sampling": 4.0, "update": 0.5})
    assert spent.taken() == {"update": 4.0, "data": 0.25, "sampling": 4.0}
    assert spent.taken() == {}


def test_compiling_is_counted_by_whoever_asks():
    asked, other = Clock(compiling=True), Clock()
    jax.jit(lambda x: x * 3 + 1.25)(jnp.arange(5.0)).block_until_ready()
    assert asked.taken()["compiling"] > 0 and other.taken() == {}
    assert "compiling" not in asked.taken()


def test_a_line_a_minute(time):
    minutes = Minutes("sft", 100)
    lines = []
    for done in range(1, 11):
        time(15)
        lines.append(minutes.line(done, 15, {"update": 9.0, "data": 3.0}))
    told = "sft: step 4 of 100, 15.00 s each (update 60%, data 20%), about 24 min left"
    assert [bool(line) for line in lines] == [False] * 3 + [True] + [False] * 3 + [
        True,
        False,
        False,
    ]
    assert lines[3] == told
    assert lines[7] == told.replace("step 4", "step 8").replace("24", "23")


def test_rows_of_a_training_say_where_it_went(tmp_path):
    run(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert all(row["update"] > 0 and row["update"] <= row["seconds"] for row in rows)
    # A checkpoint after every second step stands in the row of the next.
    assert ["checkpoint" in row for row in rows] == [i in (2, 4, 6) for i in range(len(rows))]
    assert "compiling" in rows[0] and len(rows) == 7
