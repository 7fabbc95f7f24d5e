"""What training holds before its first update: parameters, two moments and a reference,
begun or gone on with."""

import jax
import jax.numpy as jnp
import optax
import pytest

from rlbf_jax.objectives.masked import Term
from rlbf_jax.parallel.memory import Memory, device_memory
from rlbf_jax.parallel.mesh import make_mesh
from rlbf_jax.training.checkpoint import Checkpoints
from rlbf_jax.training.forecast import forecast
from rlbf_jax.training.learner import Learner, Objective
from rlbf_jax.training.loop import Loop
from rlbf_jax.training.online import Collected, train_online

SIZE = 1 << 18
OBJECTIVE = Objective(
    lambda params, batch: {"loss": Term(jnp.sum(params["w"] * batch[0, 0]), jnp.float32(1))},
    lambda batch: {"loss": jnp.float32(1)},
    {"loss": 1.0},
)


def live() -> int:
    """Bytes of all arrays; some share a buffer."""
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays()}.values())


@pytest.fixture
def held(monkeypatch):
    """[(where, live bytes in copies of the parameters)] of a training."""
    seen, before = [], live()

    def note(where):
        seen.append((where, (live() - before) / (4 * SIZE)))

    restore, begun = Checkpoints.restore, Learner.begun

    def restored(self, *args):
        found = restore(self, *args)
        note("restored")
        return found

    def made(self, copied=False):
        found = begun(self, copied)
        note("begun")
        return found

    monkeypatch.setattr(Checkpoints, "restore", restored)
    monkeypatch.setattr(Learner, "begun", made)
    return seen, note


def trained(folder, note, steps, early=False):
    mesh = make_mesh(devices=jax.devices()[:1])
    reference = {"w": jnp.ones(SIZE)}

    def collect(params, memory, step):
        note("collecting")
        assert float(reference["w"][0]) == 1.0
        return Collected([jnp.ones((1, 1))], {})

    learner = Learner(OBJECTIVE, optax.adam(1e-3), reference, mesh)
    if early:
        _ = learner.state
    train_online(learner, collect, Loop(folder, "toy", steps, 1, mesh))


def test_training_begins_and_goes_on_with_what_a_step_needs(tmp_path, held):
    """Parameters, two moments and the reference: four copies, within a tenth."""
    seen, note = held
    trained(tmp_path, note, 2)
    assert [where for where, _ in seen] == ["begun", "collecting", "collecting"]
    trained(tmp_path, note, 3)
    assert [where for where, _ in seen[3:]] == ["restored", "collecting"]
    assert [copies for _, copies in seen] == pytest.approx([4] * len(seen), abs=0.1)


def test_a_state_that_is_made_in_vain_is_seen(tmp_path, held):
    seen, note = held
    trained(tmp_path, note, 1)
    trained(tmp_path, note, 2, early=True)
    assert dict(seen[2:])["restored"] > 5.9


# Forecasts ----------------------------------------------------------------------------------------


def learner():
    mesh = make_mesh(devices=jax.devices()[:1])
    return Learner(OBJECTIVE, optax.adam(1e-3), {"w": jnp.ones(SIZE)}, mesh)


def test_a_forecast_is_the_compilers_plan_and_costs_no_second_compilation(caplog):
    made, batch = learner(), jnp.ones((1, 1))
    _ = made.state
    with jax.log_compiles(), caplog.at_level("WARNING"):
        memory = made.memory(batch)
        made.update(batch)
    compiled = [r for r in caplog.messages if r.startswith("Compiling jit(update)")]
    assert len(compiled) == 1
    # Parameters and two moments, which the new ones take the place of.
    assert memory.arguments == pytest.approx(3 * 4 * SIZE, rel=0.001)
    assert memory.reused == pytest.approx(memory.arguments, rel=0.001)
    assert memory.total >= memory.arguments


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        (None, "takes 700 MB of a device (200 MB for state and batch, 500 MB to work in)"),
        (9 * 10**8, "to work in), which has 900 MB"),
        (6 * 10**8, "and it has 600 MB: it may well end here; what helps: --model.remat block"),
    ],
)
def test_a_forecast_says_what_there_is_and_what_helps(limit, told):
    memory = Memory(2 * 10**8, 5 * 10**8, 10**8, 10**8, 0)
    assert told in forecast(memory, limit)


def test_every_training_tells_once(tmp_path, held, capsys):
    trained(tmp_path, held[1], 3)
    said = [line for line in capsys.readouterr().err.splitlines() if "an update takes" in line]
    assert len(said) == 1 and said[0].startswith("toy: an update takes 4 MB of a device")


def test_a_machine_says_what_it_has(monkeypatch):
    """The least of what the machine and its container say, shared by its devices."""
    whole = device_memory()
    assert whole and whole > 10**8
    monkeypatch.setattr("rlbf_jax.parallel.memory._read", lambda path: 10**6)
    assert device_memory() == 10**6 // jax.local_device_count()


def test_half_precision_is_refused():
    mesh = make_mesh(devices=jax.devices()[:1])
    half = {"w": jnp.ones(4, jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"\['w'\] is bfloat16, in which small updates are lost"):
        Learner(OBJECTIVE, optax.adam(1e-3), half, mesh)
