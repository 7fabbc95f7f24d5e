"""`train_online` on a toy that draws its own batches: what a checkpoint remembers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.training.checkpoint import Checkpoints
from rlbf_jax.training.journal import read_journal
from rlbf_jax.training.learner import Learner
from rlbf_jax.training.loop import Loop
from rlbf_jax.training.online import Collected, Remembered, train_online
from rlbf_jax.training.optimizer import make_optimizer
from tests.training.test_learner import CONFIG, OBJECTIVE, Numbered, batch_of, mesh, params

STEPS, ROOM = 7, 4
EMPTY = {"x": jnp.zeros((ROOM, 4)), "filled": jnp.int32(0)}


def learner():
    return Learner(OBJECTIVE, make_optimizer(CONFIG, 2 * STEPS), params(), mesh())


class Struck(RuntimeError):
    """Stands for a kill."""


class Collect:
    """Draws x around the slope and keeps it in a ring; updates on the newest and the oldest."""

    def __init__(self, source=None, stop=None):
        self.source, self.stop, self.seen = source, stop, []

    def __call__(self, params, memory, step):
        if step == self.stop:
            raise Struck
        self.seen.append((step, float(params["slope"]), jax.tree.map(np.asarray, memory)))
        rng = np.random.default_rng([3, step])
        x = jnp.asarray(float(params["slope"]) + rng.normal(size=4), jnp.float32)
        batches = [(x, -x, jnp.ones(4, bool))]
        if memory:
            ring = jnp.concatenate([memory["x"][1:], x[None]])
            memory = {"x": ring, "filled": jnp.minimum(memory["filled"] + 1, ROOM)}
            oldest = memory["x"][ROOM - int(memory["filled"])]
            batches.append((oldest, oldest, jnp.ones(4, bool)))
        if self.source:
            batches.append(self.source.next_batch())
        rows = [{"step": step, "mean": float(x.mean())}]
        return Collected(iter(batches), {"drawn": float(x.mean())}, {"drawn": rows}, memory)


def run(folder, memory=(), stop=None, with_source=True, steps=STEPS):
    """(parameters, collect) of a training in a folder."""
    source = Numbered() if with_source else None
    collect = Collect(source, stop)
    remembered = Remembered(("drawn",), {"guide": source} if source else {}, memory)
    loop = Loop(folder, "toy", steps, 2, mesh())
    return train_online(learner(), collect, loop, remembered), collect


def same_runs(one, other):
    for name in ("metrics.jsonl", "drawn.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("memory", [EMPTY, ()], ids=["memory", "no memory"])
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_struck_and_run_again_it_is_the_undisturbed_training_to_the_bit(tmp_path, memory, stop):
    whole, undisturbed = run(tmp_path / "whole", memory)
    with pytest.raises(Struck):
        run(tmp_path / "struck", memory, stop)
    again, resumed = run(tmp_path / "struck", memory)
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    same_runs(tmp_path / "whole", tmp_path / "struck")
    # It went on from its last checkpoint, with what it remembered there.
    first = stop - stop % 2
    assert [step for step, _, _ in resumed.seen] == list(range(first, STEPS))
    for mine, wanted in zip(resumed.seen, undisturbed.seen[first:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, mine, wanted)


@pytest.mark.parametrize("memory", [EMPTY, ()], ids=["forgotten", "never handed in"])
def test_a_memory_of_another_structure_is_refused(tmp_path, memory):
    def collect(params, memory, step):
        return Collected((), {}, memory=() if memory else EMPTY)

    loop = Loop(tmp_path, "toy", STEPS, 2, mesh())
    with pytest.raises(ValueError, match=r"hand that one in as Remembered\(memory="):
        train_online(learner(), collect, loop, Remembered(memory=memory))


def test_memory_is_what_the_step_before_left(tmp_path):
    _, collect = run(tmp_path, EMPTY)
    filled = [int(memory["filled"]) for _, _, memory in collect.seen]
    assert filled == [0, 1, 2, 3, 4, 4, 4]
    rows = read_journal(tmp_path / "drawn.jsonl")
    newest = [float(memory["x"][-1].mean()) for _, _, memory in collect.seen[1:]]
    np.testing.assert_allclose(newest, [row["mean"] for row in rows[:-1]], rtol=1e-6)


def checkpoint_of(folder):
    """(names of the arrays in the last checkpoint, journals whose offsets it has)."""
    checkpoints = Checkpoints(folder / "checkpoints")
    meta, place = checkpoints.meta(), checkpoints.folder / str(checkpoints.latest)
    checkpoints.close()
    tree = json.loads((place / "state" / "_METADATA").read_text())["tree_metadata"]
    return set(tree), set(meta["offsets"])


def test_without_memory_a_checkpoint_is_the_learners_state(tmp_path):
    """Its layout is that of supervised training, so old checkpoints are read."""
    run(tmp_path / "plain")
    names, journals = checkpoint_of(tmp_path / "plain")
    plain = Loop(tmp_path / "plain", "toy", STEPS, 2, mesh())
    step, state, extra = plain.start(learner().state)
    assert step == STEPS and int(state.step) == 2 * STEPS and extra == {"guide": STEPS}
    assert journals == {"metrics", "timing", "drawn"}
    run(tmp_path / "memory", EMPTY)
    more, _ = checkpoint_of(tmp_path / "memory")
    assert len(more) == len(names) + len(EMPTY)
    assert not any("filled" in name for name in names) and any("filled" in n for n in more)


def test_every_batch_is_an_update_and_losses_are_their_means(tmp_path):
    by_hand, collect = learner(), Collect(Numbered())
    got, _ = run(tmp_path)
    for step, row in enumerate(read_journal(tmp_path / "metrics.jsonl")):
        collected = collect(by_hand.params, (), step)
        losses = [float(by_hand.update(b).terms["error"].mean) for b in collected.batches]
        assert row["error"] == pytest.approx(np.mean(losses), rel=1e-6)
        assert row["drawn"] == collected.metrics["drawn"]
    jax.tree.map(np.testing.assert_array_equal, got, by_hand.trained)


def test_a_step_without_a_batch_changes_nothing_and_is_written_down(tmp_path):
    def collect(params, memory, step):
        return Collected((), {"drawn": float(step)})

    loop = Loop(tmp_path, "toy", 3, 2, mesh())
    got = train_online(learner(), collect, loop)
    jax.tree.map(np.testing.assert_array_equal, got, params())
    rows = read_journal(tmp_path / "metrics.jsonl")
    assert [row["drawn"] for row in rows] == [0.0, 1.0, 2.0]


def test_the_first_parameters_stay_whole_as_a_reference(tmp_path):
    """Updates reuse buffers, and what training starts from may be what a KL is measured to."""
    reference = params()

    def collect(now, memory, step):
        assert {k: float(v) for k, v in reference.items()} == {"slope": 2.0, "log_z": -1.0}
        return Collected([batch_of(step)], {"moved": float(now["slope"] - reference["slope"])})

    made = Learner(OBJECTIVE, make_optimizer(CONFIG, 3), reference, mesh())
    train_online(made, collect, Loop(tmp_path, "toy", 3, 2, mesh()))
    rows = read_journal(tmp_path / "metrics.jsonl")
    assert rows[0]["moved"] == 0.0 and rows[-1]["moved"] != 0.0
