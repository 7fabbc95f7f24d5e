"""Stages: what they come after, their fingerprints, that they are plain functions, and that a run
shows them nothing else."""

import dataclasses
import types

import jax
import pytest

from experiments.smoke import get_config
from rlbf_jax.directives import Semantics
from rlbf_jax.methods import METHODS
from rlbf_jax.models.config import LoraConfig
from rlbf_jax.plain import DECIDES_NOTHING
from rlbf_jax.runs.execute import recipe, view
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.runs.stage import Stage, dependencies, fingerprint, lineage, no_check
from tests.runs.opened import keep, run_of

CONFIG = get_config()


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float = 1.0
    flag: str = dataclasses.field(default="", metadata=DECIDES_NOTHING)


def stage(name, *after, **fields):
    return Stage(name, no_check, Settings(**fields), after)


def stages(**changed):
    """a -> b -> d, a -> c, e alone; settings of a stage by its name."""
    after = {"a": (), "b": ("a",), "c": ("a",), "d": ("b",), "e": ()}
    return [stage(name, *names, **changed.get(name, {})) for name, names in after.items()]


# Lineage and fingerprint ------------------------------------------------------------------------


def test_lineage_is_all_that_a_stage_comes_after_in_the_recipes_order():
    assert lineage(stages(), "d") == ("a", "b", "d")
    assert lineage(stages(), "c") == ("a", "c")
    assert lineage(stages(), "e") == ("e",)
    both = [*stages(), stage("f", "d", "c")]
    assert lineage(both, "f") == ("a", "b", "c", "d", "f")


@pytest.mark.parametrize("after", ["nowhere", "later", "b"])
def test_a_stage_comes_after_earlier_ones_only(after):
    wrong = [stage("a"), stage("b", after), stage("later")]
    with pytest.raises(ValueError, match=f"stage b comes after '{after}', which is no earlier"):
        lineage(wrong, "b")


def prints(shared, **changed):
    return {s.name: fingerprint(stages(**changed), s.name, shared) for s in stages()}


def test_a_fingerprint_is_of_a_stage_and_of_all_that_it_comes_after():
    before = prints({"seed": 0})
    assert len(set(before.values())) == 5

    def differs(**changed):
        after = prints({"seed": 0}, **changed)
        return {name for name in before if before[name] != after[name]}

    assert differs(a={"rate": 2.0}) == {"a", "b", "c", "d"}
    assert differs(b={"rate": 2.0}) == {"b", "d"}
    assert differs(e={"rate": 2.0}) == {"e"}
    assert differs(a={"flag": "other"}) == set()
    other = prints({"seed": 1})
    assert not set(other.values()) & set(before.values())


def test_dependencies_hold_what_decides():
    assert dependencies(stages(), "b", {"seed": 0}) == {
        "seed": 0,
        "stages": {name: {"rate": 1.0, "does": "rlbf_jax.runs.stage.no_check"} for name in "ab"},
    }


# Every method -----------------------------------------------------------------------------------


EVERY = [(name, s) for name, kind in METHODS.items() for s in recipe(Experiment(kind()))]


def plain_function(f):
    """Module-level, without closure, defaults or anything bound: it depends on its arguments."""
    return (
        isinstance(f, types.FunctionType)
        and f.__closure__ is None
        and f.__defaults__ is None
        and f.__kwdefaults__ is None
        and f.__qualname__ == f.__name__
        and f.__name__ != "<lambda>"
    )


@pytest.mark.parametrize(
    ("method", "made"), EVERY, ids=[f"{method}-{s.name}" for method, s in EVERY]
)
def test_stages_are_plain_functions_of_frozen_settings(method, made):
    for f in (made.do, made.check, made.fit):
        assert plain_function(f), f"{method}: {made.name}: {f}"
    assert dataclasses.is_dataclass(made.config)
    assert type(made.config).__dataclass_params__.frozen
    assert not any(callable(getattr(made.config, f.name)) for f in dataclasses.fields(made.config))


def test_what_is_no_plain_function_is_seen():
    seed = 3

    def closed(run, config):
        return seed

    def defaulted(run, config, seed=3):
        return seed

    class Do:
        def __call__(self, run, config):
            return seed

        def bound(self, run, config):
            return seed

    for f in (closed, defaulted, lambda run, config: None, Do(), Do().bound, print):
        assert not plain_function(f)
    assert plain_function(no_check)


@pytest.mark.parametrize("name", METHODS)
def test_recipes_are_in_order_and_their_names_distinct(name):
    made = recipe(Experiment(METHODS[name]()))
    names = [s.name for s in made]
    assert len(set(names)) == len(names)
    for s in made:
        assert lineage(made, s.name)[-1] == s.name
    assert {f"evaluate_{s.name}" for s in made if s.evaluated} <= set(names)
    # Data come first: what does not fit is told once they are there, before any training.
    prepares = [s.prepares for s in made]
    assert prepares == sorted(prepares, reverse=True)


# What a run shows -------------------------------------------------------------------------------


READS = {
    "policy": lambda run: run.policy("base", "backtrack", Semantics.KEEP),
    "trainable": lambda run: run.trainable("base", LoraConfig(), None),
    "trainable with adapters": lambda run: run.trainable("base", LoraConfig(rank=2), None),
    "model": lambda run: run.model_of("base"),
    "notes": lambda run: run.notes("base"),
    "batches": lambda run: run.batches("bsafe_plus", 2),
    "rows": lambda run: run.rows_of("bsafe_plus"),
    "tokenizer": lambda run: run.tokenizer,
    "rule": lambda run: run.rule("backtrack"),
    "model's shape": lambda run: run.model,
}


@pytest.mark.parametrize("name", READS)
def test_a_stage_that_asks_for_what_it_does_not_declare_fails(tmp_path, name):
    seen = run_of(CONFIG, tmp_path).seen_by("greedy", ["refusal_data"])
    with pytest.raises(
        ValueError, match="stage greedy asks for the result of .*name it in `after`"
    ):
        READS[name](seen)


def test_base_must_be_declared_where_adapters_stand_on_it(tmp_path):
    """Also by a stage that goes on from another one's adapters."""
    run = run_of(CONFIG, tmp_path).seen_by("greedy", ["tokenizer", "sft"])
    with pytest.raises(ValueError, match="asks for the result of base"):
        run.trainable("base", LoraConfig(rank=2), None)


def test_what_a_recipe_declares_is_seen_and_a_command_sees_everything(tmp_path):
    made = recipe(CONFIG)
    (rlbf,) = [s for s in made if s.name == "rlbf"]
    whole = run_of(CONFIG, tmp_path)
    seen = view(whole, made, rlbf)
    for name in ("tokenizer", "bsafe_plus_data", "base", "sft"):
        seen._needs(name)
    for name in ("refusal_data", "refusal_sft", "sft_control"):
        with pytest.raises(ValueError, match=f"stage rlbf asks for the result of {name}"):
            seen._needs(name)
        whole._needs(name)
    assert seen.rows_of("bsafe_plus") == 0
    with pytest.raises(ValueError, match="refusal_data"):
        seen.batches("refusal", 2)


def test_what_a_stage_keeps_and_notes_is_there_for_those_after_it(tmp_path):
    from tests.runs.opened import do

    run = do(CONFIG.changed({"data.pretraining_examples": 100}), tmp_path, "tokenizer")
    params = run.initial_params()
    run.seen_by("base", ["tokenizer"]).keep(run.model, params, critic="somebody")
    keep(run, "sft", params)
    later = run.seen_by("later", ["tokenizer", "base"])
    assert later.notes("base") == {"critic": "somebody"}
    jax.tree.map(lambda a, b: (a == b).all() or pytest.fail(), later.model_of("base")[1], params)
    with pytest.raises(ValueError, match="stage later asks for the result of sft"):
        later.notes("sft")
    assert run.notes("sft") == {}
