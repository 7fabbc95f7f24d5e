"""Checkpoints, and what a stage does between updates."""

import json
import os
import signal
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rlbf_jax.errors import Preempted, UserError
from rlbf_jax.parallel.mesh import make_mesh
from rlbf_jax.training.checkpoint import Checkpoints
from rlbf_jax.training.journal import read_journal
from rlbf_jax.training.loop import Loop


@pytest.fixture
def mesh():
    return make_mesh(devices=jax.devices()[:1])


def state_of(value=1.0):
    return {
        "w": jnp.full((2, 3), value),
        "half": jnp.full(4, value, jnp.bfloat16),
        "step": jnp.int32(value),
    }


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


# Checkpoints ------------------------------------------------------------------------------------


def test_a_checkpoint_gives_back_state_and_meta_and_older_ones_go(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest is None
    checkpoints.save(1, state_of(1.0), {"step": 1, "extra": {"data": [1, "two"]}})
    checkpoints.save(2, state_of(2.0), {"step": 2, "extra": {}})
    checkpoints.close()
    again = Checkpoints(tmp_path / "c")
    assert again.latest == 2
    state, meta = again.restore(jax.eval_shape(state_of), mesh)
    same(state, state_of(2.0))
    assert meta == {"step": 2, "extra": {}}
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == ["2"]


def test_no_checkpoint_is_a_plain_error(tmp_path, mesh):
    with pytest.raises(UserError, match="no checkpoint here; run the stage first"):
        Checkpoints(tmp_path / "c").restore(state_of(), mesh)


@pytest.mark.parametrize("damage", ["truncate", "delete", "other shape"])
def test_a_damaged_checkpoint_is_one_line_that_names_folder_and_cure(tmp_path, mesh, damage):
    folder = tmp_path / "c"
    checkpoints = Checkpoints(folder)
    checkpoints.save(7, state_of(), {"step": 7})
    checkpoints.close()
    wanted = state_of()
    files = [p for p in (folder / "7" / "state").rglob("*") if p.is_file()]
    if damage == "truncate":
        for path in files:
            with open(path, "r+b") as file:
                file.truncate(path.stat().st_size // 2)
    elif damage == "delete":
        for path in files:
            path.unlink()
    else:
        wanted["w"] = jnp.zeros((5, 5))
    with pytest.raises(UserError) as caught:
        Checkpoints(folder).restore(wanted, mesh)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{folder}/7" in message and "delete" in message


# Stages -----------------------------------------------------------------------------------------


def add_one(state, number):
    return jax.tree.map(lambda x: x + 1, state), {"loss": float(number)}


def run_stage(folder, mesh, step=add_one, steps=6, every=2, log=None):
    """One run of a stage from where its folder stands; `log` collects the extras that it is given
    back."""
    run = Loop(folder, "toy", steps, every, mesh)
    first, state, extra = run.start(state_of(0.0), ("notes",))
    if log is not None:
        log.append((first, extra))

    def stepped(state, number):
        state, metrics = step(state, number)
        run.journals["notes"].write({"note": number})
        return state, metrics

    return run.run(state, first, stepped, lambda: {"seen": "so far"})


def test_a_finished_stage_has_its_rows_its_checkpoint_and_is_not_run_again(tmp_path, mesh):
    state = run_stage(tmp_path, mesh)
    same(state, state_of(6.0))
    assert read_journal(tmp_path / "metrics.jsonl") == [
        {"step": i, "loss": float(i)} for i in range(6)
    ]
    assert len(read_journal(tmp_path / "timing.jsonl")) == 6

    def never(state, number):
        raise AssertionError("no step is left")

    same(run_stage(tmp_path, mesh, never), state)


@pytest.mark.parametrize("keep, left", [(1, ["6"]), (2, ["4", "6"]), (9, ["2", "4", "6"])])
def test_so_many_checkpoints_stay(tmp_path, mesh, keep, left):
    loop = Loop(tmp_path, "toy", 6, 2, mesh, keep)
    first, state, _ = loop.start(state_of(0.0))
    loop.run(state, first, add_one)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == left
    for name in left:
        assert (folder / name / "checksums.json").exists()


def test_a_checkpoint_holds_what_was_saved_though_the_buffers_are_used_up(tmp_path, mesh):
    """The next update takes the saved arrays' buffers while they are still being written."""
    update = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
    checkpoints = Checkpoints(tmp_path / "c", keep=9, writes=True)
    state, wanted = jnp.arange(2_000_000, dtype=jnp.float32), {}
    for step in range(1, 5):
        state = update(state)
        wanted[step] = np.array(state)
        checkpoints.save(step, {"w": state}, {"step": step})
        for _ in range(3):
            state = update(state)
    checkpoints.close()
    reader = Checkpoints(tmp_path / "c")
    for step, array in wanted.items():
        found, meta = reader.restore({"w": state}, mesh, step)
        np.testing.assert_array_equal(found["w"], array)
        assert meta == {"step": step}


def test_a_crashed_stage_goes_on_from_its_checkpoint_and_writes_the_same_bytes(tmp_path, mesh):
    def crash(state, number):
        if number == 5:
            raise RuntimeError("the machine went away")
        return add_one(state, number)

    wanted = run_stage(tmp_path / "whole", mesh)
    with pytest.raises(RuntimeError, match="went away"):
        run_stage(tmp_path / "broken", mesh, crash)
    log: list = []
    same(run_stage(tmp_path / "broken", mesh, log=log), wanted)
    assert log == [(4, {"seen": "so far"})]
    for name in ("metrics.jsonl", "notes.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_stops_the_stage_and_keeps_the_last_good_checkpoint(
    tmp_path, mesh, bad
):
    def poison(state, number):
        state, _ = add_one(state, number)
        return state, {"loss": bad if number == 3 else 0.0, "fine": 1.0}

    with pytest.raises(UserError, match="stage toy, step 3: loss is not finite"):
        run_stage(tmp_path, mesh, poison)
    assert Checkpoints(tmp_path / "checkpoints").latest == 2


def test_a_signal_ends_the_stage_at_the_next_step_with_a_checkpoint(tmp_path, mesh):
    def asked_to_stop(state, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return add_one(state, number)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="stopped after step 3 of 6"):
        run_stage(tmp_path, mesh, asked_to_stop, every=100)
    assert signal.getsignal(signal.SIGTERM) is handler
    same(run_stage(tmp_path, mesh), state_of(6.0))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_last_step_is_not_lost(tmp_path, mesh, number):
    def asked_to_stop(state, step):
        if step == 5:
            os.kill(os.getpid(), number)
        return add_one(state, step)

    with pytest.raises(Preempted, match="stopped after step 6 of 6"):
        run_stage(tmp_path, mesh, asked_to_stop)
    same(run_stage(tmp_path, mesh), state_of(6.0))


def points(folder):
    """(step, loss) of TensorBoard's event files, read as TensorBoard does: a restart drops later
    steps seen before."""
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while len(content) >= 12:
            (length,) = struct.unpack_from("<Q", content)
            if len(content) < length + 16:
                break
            event = Event.FromString(content[12 : 12 + length])
            content = content[length + 16 :]
            if event.session_log.status == SessionLog.START:
                found = [point for point in found if point[0] < event.step]
            found += [(event.step, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_shows_every_step_once_after_a_crash(tmp_path, mesh):
    def crash(state, number):
        if number == 5:
            raise RuntimeError("the machine went away")
        return add_one(state, number)

    with pytest.raises(RuntimeError, match="went away"):
        run_stage(tmp_path, mesh, crash)
    assert points(tmp_path / "tensorboard") == [(i, float(i)) for i in range(5)]
    run_stage(tmp_path, mesh)
    assert points(tmp_path / "tensorboard") == [(i, float(i)) for i in range(6)]
    assert [row["step"] for row in read_journal(tmp_path / "timing.jsonl")] == list(range(6))


def test_a_half_written_checkpoint_is_cleared_away_by_the_stage_and_left_alone_by_readers(
    tmp_path, mesh
):
    run_stage(tmp_path, mesh, steps=2)
    half = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    reader = Checkpoints(tmp_path / "checkpoints")
    assert reader.latest == 2
    reader.close()
    assert half.exists()
    same(run_stage(tmp_path, mesh), state_of(6.0))
    assert not half.exists()
