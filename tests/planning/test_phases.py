"""What is planned is what runs: a small run's calls against what the planner lowers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest

from rlbf_jax.errors import UserError
from rlbf_jax.methods.reset import ResetConfig
from rlbf_jax.models.config import LoraConfig
from rlbf_jax.models.presets import PRESETS
from rlbf_jax.parallel.axes import AXES
from rlbf_jax.parallel.mesh import MeshConfig, make_mesh
from rlbf_jax.planning import phases as planning
from rlbf_jax.planning import shapes
from rlbf_jax.runs.execute import run
from rlbf_jax.sampling import loop
from rlbf_jax.training import policy as training_policy
from rlbf_jax.training import state as training_state
from tests.small_run import get_config


def _shapes(args: tuple) -> Any:
    def shown(x: Any) -> str:
        x = jax.typeof(x) if not hasattr(x, "shape") else x
        return f"{x.dtype}{list(x.shape)}"

    # Kinds of containers count for nothing: a checkpoint gives lists for tuples.
    return [
        (jax.tree_util.keystr(path), shown(leaf))
        for path, leaf in jax.tree_util.tree_flatten_with_path(args)[0]
    ]


class Heard:
    """A jitted function that writes down what it is called, or lowered, with."""

    def __init__(self, name: str, function: Any, heard: list):
        self.name, self.function, self.heard = name, function, heard

    def _hear(self, args: tuple, options: dict) -> None:
        static = {
            k: v for k, v in options.items() if k in ("capacity", "rewound", "one_hot", "rule")
        }
        self.heard.append((self.name, static, _shapes(args)))

    def __call__(self, *args, **options):
        self._hear(args, options)
        return self.function(*args, **options)

    def lower(self, *args, **options):
        self._hear(args, options)
        return self.function.lower(*args, **options)

    def __getattr__(self, name: str):
        return getattr(self.function, name)


@pytest.fixture
def heard(monkeypatch) -> list:
    """Calls and lowerings of every program of training and sampling."""
    found: list = []
    jit_update, gradient = training_state.jit_update, training_policy.PolicyGradient

    def updating(*args, **options):
        return Heard("update", jit_update(*args, **options), found)

    for module in (training_state, planning):
        monkeypatch.setattr(module, "jit_update", updating)
    for name, method in (("measure", "measuring"), ("compare", "comparing")):
        make = getattr(gradient, method)
        wrapped = lambda *a, make=make, name=name: Heard(name, make(*a), found)  # noqa: E731
        monkeypatch.setattr(gradient, method, wrapped)
    for name in ("begin", "go_on"):
        monkeypatch.setattr(loop, name, Heard(name, getattr(loop, name), found))
    return found


def _distinct(found: list) -> list:
    """Contexts are read in as few columns as they need; the widest that there may be are planned.
    So how wide they are does not count."""
    kept: list = []
    for name, static, args in found:
        entry = name, static, [shape for shape in args if shape[0] != "[1].context"]
        if entry not in kept:
            kept.append(entry)
    return kept


def _differences(name: str, ran: tuple, alike: list) -> str:
    """What of a call nothing that was lowered agrees with."""
    lines = [f"{name}: {ran[0]}"]
    for static, args in alike:
        lines += [f"lowered: {static}", *sorted(map(str, set(args) ^ set(ran[1])))]
    return "\n".join(lines)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_planned_programs_are_those_that_run(rank, heard, tmp_path):
    e = get_config()
    lora = LoraConfig(rank=rank)
    e = e.replace(model=dataclasses.replace(e.base.model, lora=lora, scan_layers=True))
    names = [stage.name for stage in e.method.stages(e)]
    run(e, tmp_path / "run", only=names)
    ran = _distinct(heard)
    heard.clear()
    made = planning.phases(e, make_mesh(devices=jax.devices()[:1]))
    for phase in made:
        phase.lower()
    planned = _distinct(heard)
    assert {name for name, _, _ in ran} == {"update", "measure", "compare", "begin", "go_on"}
    for name, static, args in ran:
        alike = [(s, a) for n, s, a in planned if n == name]
        assert (static, args) in alike, _differences(name, (static, args), alike)
    assert len(planned) == len(ran)


def test_stages_of_one_program_share_an_entry():
    e = get_config().replace(baselines=True, refusal_sft=get_config().method.sft)
    made = planning.phases(e, make_mesh(devices=jax.devices()[:1]))
    # Pretraining has the same rows as SFT here, but for the rule's reading of them nothing differs.
    updates = [phase.stages for phase in made if phase.name == "update"]
    assert ("base", "refusal_sft", "sft", "sft_control") in updates and len(updates) == 2
    assert [p.name for p in made if p.stages == ("rlbf",)] == [
        "prefill", "decode", "measure", "compare", "update",
    ]  # fmt: skip


def test_a_supervised_method_is_planned():
    e = dataclasses.replace(get_config(), method=ResetConfig())
    made = planning.phases(e, make_mesh(devices=jax.devices()[:1]))
    assert [phase.title for phase in made] == ["base update", "reset_sft update"]
    assert planning.unplanned(e) == []


def test_a_checkpoint_need_not_be_there():
    """Its shape is the experiment's; its control ids find room among its rows."""
    model = PRESETS["gemma2_2b"]
    e = get_config().replace(model=model, start_from="checkpoints/nowhere")
    found = shapes.vocabulary(e)
    assert found.model.vocab_size == model.vocab_size == found.controls.end_id
    titles = [p.title for p in planning.phases(e, make_mesh(devices=jax.devices()[:1]))]
    assert "base update" not in titles and "sft update" in titles


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    mesh = jax.sharding.AbstractMesh((1, 3, 1, 1), AXES)
    with pytest.raises(UserError, match="sft.batch_size: .* choose a multiple of 3|pretraining"):
        planning.phases(get_config(), mesh)


def test_what_is_kept_beside():
    """Everything that reinforcement keeps from step to step is an argument or stands beside."""
    e = get_config()
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    by_name = {p.name: p for p in planning.phases(e, mesh) if p.stages == ("rlbf",)}
    found = shapes.vocabulary(e)
    decoder = shapes.bytes_of(shapes.by_name(shapes.parameters(found.model), mesh))
    # update: parameters and two moments are arguments, the reference is not.
    assert by_name["update"].beside == decoder
    # measure: the moments of decoder and value head, and the reference.
    assert 3 * decoder < by_name["measure"].beside < 3.2 * decoder
    # unrolled as they are, parameters are the sampler's arguments themselves.
    assert by_name["decode"].beside == by_name["measure"].beside
