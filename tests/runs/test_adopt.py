import dataclasses
import json

import pytest

from experiments.smoke import get_config
from rlbf_jax.directives import Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.runs import execute as runner
from rlbf_jax.runs import reuse
from rlbf_jax.runs.experiment import ExperimentConfig

CONFIG = get_config()


def finished_run(folder, *stages, config=CONFIG):
    """A folder as a run leaves it, without the training."""
    runner.open_workdir(config, folder)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(b"pieces")
    (folder / "data").mkdir()
    (folder / "data" / "report.json").write_text("{}")
    for stage in stages:
        if stage != "data":
            (folder / "stages" / stage / "model").mkdir(parents=True)
            (folder / "stages" / stage / "model" / "weights").write_text(stage)
            (folder / "stages" / stage / "metrics.jsonl").write_text("{}\n")
        runner.write_json(folder / "done" / stage, {"seconds": 9.0})
    return folder


def changed(config=CONFIG, **fields):
    return dataclasses.replace(config, **fields)


def with_bsafe(**fields):
    bsafe = dataclasses.replace(CONFIG.data.bsafe_plus, **fields)
    return changed(data=dataclasses.replace(CONFIG.data, bsafe_plus=bsafe))


def with_reinforcement(**fields):
    return changed(reinforcement=dataclasses.replace(CONFIG.reinforcement, **fields))


def test_stages_are_copied_marked_and_named(tmp_path):
    source = finished_run(tmp_path / "main", "data", "base", "sft")
    config, target = changed(rollout_budget=2), tmp_path / "other"
    reuse.adopt(source, config, target, ("data", "sft"))
    assert (target / "stages" / "sft" / "model" / "weights").read_text() == "sft"
    assert (target / "tokenizer" / "tokenizer.model").read_bytes() == b"pieces"
    assert not (target / "stages" / "base").exists()
    manifest = json.loads((target / "manifest.json").read_text())
    assert (
        set(manifest["adopted"]) == {"data", "sft"} and manifest["adopted"]["sft"]["run"] == "main"
    )
    assert json.loads((target / "done" / "sft").read_text()) == {
        "adopted": "main"
    }  # its seconds are not counted twice
    assert manifest["config"]["rollout_budget"] == 2
    assert not list(target.rglob("*.tmp"))


def test_a_broken_copy_is_repeated_and_a_finished_one_left_alone(tmp_path):
    source, target = finished_run(tmp_path / "main", "data", "sft"), tmp_path / "other"
    reuse.adopt(source, CONFIG, target, ("sft",))
    weights = target / "stages" / "sft" / "model" / "weights"
    weights.write_text("mine")
    reuse.adopt(source, CONFIG, target, ("sft",))
    assert weights.read_text() == "mine"
    (target / "done" / "sft").unlink()  # a kill before the stage was marked
    reuse.adopt(source, CONFIG, target, ("sft",))
    assert weights.read_text() == "sft"


@pytest.mark.parametrize(
    ("stage", "config", "names"),
    [
        ("base", changed(seed=1), "seed"),
        ("base", changed(model=dataclasses.replace(CONFIG.model, width=64)), "model.width"),
        ("base", changed(pretraining=dataclasses.replace(CONFIG.pretraining, steps=9)), "pretraining.steps"),
        ("base", changed(data=dataclasses.replace(CONFIG.data, vocab_size=901)), "data.vocab_size"),
        ("data", with_bsafe(late_share=0.5), "data.bsafe_plus.late_share"),
        ("sft", with_bsafe(late_share=0.5), "data.bsafe_plus.late_share"),
        ("sft", changed(semantics=Semantics.KEEP), "semantics"),
        ("sft_control", with_reinforcement(steps=4), "reinforcement.steps"),
        ("rlbf", changed(rollout_budget=2), "rollout_budget"),
        ("rlbf", with_reinforcement(temperature=0.5), "reinforcement.temperature"),
    ],
)  # fmt: skip
def test_what_a_stage_depends_on_must_be_alike(tmp_path, stage, config, names):
    source = finished_run(tmp_path / "main", stage)
    with pytest.raises(UserError, match=f"stage {stage} .* other settings \\({names}\\)"):
        reuse.adopt(source, config, tmp_path / "other", (stage,))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        ("base", with_bsafe(late_share=0.5)),
        ("base", changed(semantics=Semantics.KEEP)),
        ("sft", with_reinforcement(steps=4)),
        ("sft_control", with_reinforcement(temperature=0.5)),
        ("rlbf", changed(evaluation=dataclasses.replace(CONFIG.evaluation, n=5))),
    ],
)
def test_what_it_does_not_depend_on_may_differ(tmp_path, stage, config):
    reuse.adopt(finished_run(tmp_path / "main", stage), config, tmp_path / "other", (stage,))
    assert (tmp_path / "other" / "done" / stage).exists()


def test_every_listed_name_is_in_the_configuration():
    """A field that was renamed must not stay listed as harmless."""
    for stage, names in reuse.UNTOUCHED.items():
        for name in names:
            value = CONFIG
            for part in name.split("."):
                assert hasattr(value, part), f"{stage}: {name} is no field of the configuration"
                value = getattr(value, part)
    assert ExperimentConfig().seed == 0 and "seed" not in set().union(*reuse.UNTOUCHED.values())


def test_refusals(tmp_path):
    source = finished_run(tmp_path / "main", "sft")
    with pytest.raises(UserError, match="stage base is not finished there"):
        reuse.adopt(source, CONFIG, tmp_path / "other", ("base",))
    with pytest.raises(UserError, match="stage 'evaluate_sft' cannot be taken over"):
        reuse.adopt(source, CONFIG, tmp_path / "other", ("evaluate_sft",))
    with pytest.raises(UserError, match="no run here"):
        reuse.adopt(tmp_path / "nothing", CONFIG, tmp_path / "other", ("sft",))
    target = finished_run(tmp_path / "other")
    (target / "tokenizer" / "tokenizer.model").write_bytes(b"other pieces")
    with pytest.raises(UserError, match="different tokenizers"):
        reuse.adopt(source, CONFIG, target, ("sft",))
