"""An experiment: settings by their flags, what a manifest holds of them, and names that collide."""

import dataclasses
from typing import Annotated, ClassVar

import pytest

from experiments.quickstart import get_config as quickstart
from experiments.smoke import get_config as smoke
from rlbf_jax.critics.language.http_critic import HttpCriticConfig
from rlbf_jax.directives import Semantics
from rlbf_jax.methods import METHODS
from rlbf_jax.methods.rlbf import RlbfConfig
from rlbf_jax.plain import FLAT, differences, field_names, plain
from rlbf_jax.runs.experiment import (
    BaseConfig,
    Beside,
    Experiment,
    MethodConfig,
    setting,
)
from rlbf_jax.runs.manifest import experiment_from

CONFIG = smoke()


def changes(one, other):
    return [(name, new) for name, _, new in differences(one.stored(), other.stored())]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 3),
        ("baselines", False),
        ("start_from", "folder"),
        ("critic_model", "folder"),
        ("sampling_batch", 5),
    ],
)
def test_a_setting_is_replaced_by_its_flag_wherever_it_is(name, value):
    """In the experiment, the method, the base, and a flat part of the method."""
    assert changes(CONFIG, CONFIG.replace(**{name: value})) == [(name, value)]
    assert setting(CONFIG.replace(**{name: value}), name) == value


def test_several_are_replaced_at_once_and_the_first_is_left_as_it_was():
    before = CONFIG.stored()
    other = CONFIG.replace(
        seed=1, baselines=False, rollout_budget=1, semantics=Semantics.KEEP, start_from="x"
    )
    assert {name for name, _ in changes(CONFIG, other)} == {
        *("seed", "baselines", "rollout_budget", "semantics", "start_from")
    }
    assert CONFIG.stored() == before and other.base.model == CONFIG.base.model


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 3),
        ("reinforcement.policy.algorithm", "grpo"),
        ("model.width", 64),
        ("pretraining.optimizer.learning_rate", 0.5),
        ("critic_noise.accuracy", 0.9),
        ("evaluation.knobs.max_tokens", 99),
    ],
)
def test_a_setting_is_changed_by_its_dotted_flag(name, value):
    other = CONFIG.changed({name: value})
    assert changes(CONFIG, other) == [(name, value)] and setting(other, name) == value


def test_names_that_are_no_setting_are_refused():
    for change in (
        lambda: CONFIG.replace(sfft=1),
        lambda: CONFIG.replace(seed=1, sfft=1),
        lambda: CONFIG.changed({"sft.stepps": 1}),
        lambda: CONFIG.changed({"sfft.steps": 1}),
        lambda: CONFIG.changed({"seed.steps": 1}),
        lambda: setting(CONFIG, "sft.stepps"),
    ):
        with pytest.raises(TypeError, match="no such setting"):
            change()


def test_what_is_changed_is_checked():
    with pytest.raises(ValueError, match="steps is -1"):
        CONFIG.changed({"sft.steps": -1})
    with pytest.raises(ValueError, match="seed is -1"):
        CONFIG.replace(seed=-1)


# Stored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("e", [smoke(), quickstart(), Experiment(RlbfConfig(), data=CONFIG.data)])
def test_what_is_stored_comes_back(e):
    stored = e.stored()
    assert stored["method"] == e.method.name and stored["rule"] == e.rule
    again = experiment_from(stored, type(e.method))
    assert again == e and again.stored() == stored


def test_settings_stand_side_by_side():
    """As flags do: neither `method`, `base` nor `critic` is a prefix."""
    stored = CONFIG.stored()
    assert stored["sft"] == plain(CONFIG.method.sft)
    assert stored["model"]["width"] == 32 and stored["critic_noise"]["accuracy"] == 1.0
    assert "base" not in stored and stored["method"] == "rlbf" and stored["critic"] == ""


def test_a_setting_that_is_missing_has_its_default():
    stored = CONFIG.stored()
    del stored["max_prompt"], stored["rollout_budget"]
    again = experiment_from(stored, RlbfConfig)
    assert again.max_prompt == Experiment(RlbfConfig()).max_prompt
    assert again.method.rollout_budget == RlbfConfig().rollout_budget


# Methods ----------------------------------------------------------------------------------------


def collisions(method: type) -> set[str]:
    """First names that the flags of a method, the base and the experiment do not have to
    themselves, and those that a manifest has for something else."""
    own = [name for name in field_names(Experiment) if name.split(".")[0] != "method"]
    firsts = [{name.split(".")[0] for name in names} for names in (own, field_names(method))]
    # The experiment's include the base's; a class that has one twice shows it by its count.
    shared = firsts[0] & firsts[1]
    flat = [field.name for kind in (Experiment, BaseConfig) for field in dataclasses.fields(kind)]
    twice = {name for name in flat if flat.count(name) > 1}
    return shared | twice | (firsts[1] & {"method", "rule", "workdir", "base", "name", "paper"})


@pytest.mark.parametrize("name", METHODS)
def test_no_setting_of_a_method_has_the_name_of_another(name):
    assert collisions(METHODS[name]) == set()


@dataclasses.dataclass(frozen=True)
class Part:
    judge_model: str = ""


@dataclasses.dataclass(frozen=True)
class Colliding(MethodConfig):
    """One name of the experiment's own, one of the base, one in a flat part, one of a manifest."""

    name: ClassVar[str] = "colliding"
    max_prompt: int = 1
    model: int = 1
    rule: str = ""
    part: Annotated[Part, Beside] = dataclasses.field(default=Part(), metadata=FLAT)


def test_names_that_collide_are_seen():
    assert collisions(Colliding) == {"max_prompt", "model", "rule", "judge_model"}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_listed_by_its_name_and_says_what_it_is(name):
    method = METHODS[name]
    assert method.name == name and "arXiv" in method.paper
    assert method.rule in ("backtrack", "reset", "replace")
    e = Experiment(method())
    assert e.rule == method.rule and experiment_from(e.stored(), method) == e


def test_the_judge_must_be_another_than_the_critic_of_training():
    endpoint = HttpCriticConfig(base_url="http://127.0.0.1:9/v1", model="m")
    with pytest.raises(ValueError, match="must be another than the critic of training"):
        CONFIG.replace(critic_endpoint=endpoint).replace(judge_endpoint=endpoint)
    other = dataclasses.replace(endpoint, format="harmbench")
    CONFIG.replace(critic_endpoint=endpoint, judge_endpoint=other)
    with pytest.raises(ValueError, match="judge_endpoint.base_url and judge_model are set"):
        CONFIG.replace(judge_endpoint=endpoint, judge_model="folder")
