"""Taking over finished stages: what must be alike, what may differ, and what is copied."""

import json

import pytest

from experiments.smoke import get_config
from rlbf_jax.directives import Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.runs.adopt import adopt
from rlbf_jax.runs.execute import recipe
from rlbf_jax.runs.files import read_json, write_json
from rlbf_jax.runs.manifest import open_workdir

CONFIG = get_config()
DATA = "bsafe_plus_data"


def finished_run(folder, *stages, config=CONFIG):
    """A folder as a run leaves it, without the training."""
    open_workdir(config, recipe(config), folder)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(b"pieces")
    (folder / "data").mkdir()
    counts = {}
    for stage in stages:
        dataset = stage.removesuffix("_data")
        if dataset != stage:
            (folder / "data" / dataset).mkdir()
            (folder / "data" / dataset / "records").write_text(dataset)
            counts[dataset] = {"rows": 3, "sha256": f"hash of {dataset}"}
        else:
            (folder / "stages" / stage / "model").mkdir(parents=True)
            (folder / "stages" / stage / "model" / "weights").write_text(stage)
            (folder / "stages" / stage / "metrics.jsonl").write_text("{}\n")
    write_json(folder / "data" / "report.json", counts)
    noted = {name: made["sha256"] for name, made in counts.items()}
    path = folder / "manifest.json"
    write_json(path, read_json(path) | {"data": {"tokenizer": "digest", "file": "abc", **noted}})
    for stage in ("tokenizer", *stages):
        write_json(folder / "done" / stage, {"seconds": 9.0})
    return folder


def with_bsafe(**fields):
    return CONFIG.changed({f"bsafe_plus.{name}": value for name, value in fields.items()})


def with_reinforcement(**fields):
    return CONFIG.changed({f"reinforcement.{name}": value for name, value in fields.items()})


GEOMETRY = CONFIG.changed({"evaluation.middle.long_words": 9})


def test_stages_are_copied_marked_and_named(tmp_path):
    source = finished_run(tmp_path / "main", "pretraining_data", DATA, "base", "sft")
    config, target = CONFIG.replace(rollout_budget=2), tmp_path / "other"
    adopt(source, config, target, (DATA, "sft"))
    assert (target / "stages" / "sft" / "model" / "weights").read_text() == "sft"
    assert (target / "stages" / "sft" / "metrics.jsonl").exists()
    assert (target / "tokenizer" / "tokenizer.model").read_bytes() == b"pieces"
    assert (target / "data" / "bsafe_plus" / "records").read_text() == "bsafe_plus"
    assert set(read_json(target / "data" / "report.json")) == {"bsafe_plus"}
    assert not (target / "stages" / "base").exists()
    assert not (target / "data" / "pretraining").exists()
    assert {p.name for p in (target / "done").iterdir()} == {"tokenizer", DATA, "sft"}
    manifest = json.loads((target / "manifest.json").read_text())
    assert set(manifest["adopted"]) == {"tokenizer", DATA, "sft"}
    assert manifest["adopted"]["sft"]["run"] == "main"
    assert manifest["data"] == {
        "tokenizer": "digest",
        "file": "abc",
        "bsafe_plus": "hash of bsafe_plus",
    }
    # Its seconds are not counted twice.
    assert json.loads((target / "done" / "sft").read_text()) == {"adopted": "main"}
    assert manifest["config"]["rollout_budget"] == 2
    assert not list(target.rglob("*.tmp"))


def test_a_broken_copy_is_repeated_and_a_finished_one_left_alone(tmp_path):
    source, target = finished_run(tmp_path / "main", DATA, "sft"), tmp_path / "other"
    adopt(source, CONFIG, target, ("sft",))
    weights = target / "stages" / "sft" / "model" / "weights"
    weights.write_text("mine")
    adopt(source, CONFIG, target, ("sft",))
    assert weights.read_text() == "mine"
    (target / "done" / "sft").unlink()  # a kill before the stage was marked
    adopt(source, CONFIG, target, ("sft",))
    assert weights.read_text() == "sft"


@pytest.mark.parametrize(
    ("stage", "config", "names"),
    [
        ("base", CONFIG.replace(seed=1), "seed"),
        ("base", CONFIG.changed({"model.width": 64}), "model.width"),
        ("base", CONFIG.changed({"pretraining.steps": 9}), "pretraining.steps"),
        ("base", CONFIG.changed({"data.vocab_size": 901}), "data.vocab_size"),
        (DATA, with_bsafe(late_share=0.5), "bsafe_plus.late_share"),
        (DATA, CONFIG.replace(sft_examples=9), "sft_examples"),
        ("sft", with_bsafe(late_share=0.5), "bsafe_plus.late_share"),
        ("sft", CONFIG.changed({"sft.steps": 9, "rollout_budget": 2}), "sft.steps"),
        ("sft", CONFIG.replace(semantics=Semantics.KEEP), "semantics"),
        ("sft", CONFIG.changed({"model.lora.rank": 4}), "model.lora.rank"),
        ("sft_control", with_reinforcement(steps=4), "reinforcement.steps"),
        ("rlbf", CONFIG.replace(rollout_budget=2), "rollout_budget"),
        ("rlbf", with_reinforcement(temperature=0.5), "reinforcement.temperature"),
        # Rollouts have the evaluation's geometry.
        ("rlbf", GEOMETRY, "evaluation.middle.long_words"),
    ],
)
def test_what_a_stage_depends_on_must_be_alike(tmp_path, stage, config, names):
    source = finished_run(tmp_path / "main", stage)
    with pytest.raises(UserError, match=f"stage {stage} .* other settings \\({names}\\)"):
        adopt(source, config, tmp_path / "other", (stage,))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        ("base", with_bsafe(late_share=0.5)),
        ("base", CONFIG.replace(semantics=Semantics.KEEP)),
        ("base", CONFIG.changed({"model.lora.rank": 4})),
        ("sft", with_reinforcement(steps=4)),
        ("sft_control", with_reinforcement(temperature=0.5)),
        ("rlbf", CONFIG.changed({"evaluation.n": 5})),
        ("rlbf", CONFIG.changed({"critic_endpoint.retries": 7})),
        ("base", GEOMETRY),
        ("sft", GEOMETRY),
    ],
)
def test_what_it_does_not_depend_on_may_differ(tmp_path, stage, config):
    adopt(finished_run(tmp_path / "main", stage), config, tmp_path / "other", (stage,))
    assert (tmp_path / "other" / "done" / stage).exists()


TAKEN = [s.name for s in recipe(CONFIG) if s.prepares or s.evaluated]


@pytest.mark.parametrize("stage", [name for name in TAKEN if name != "tokenizer"])
def test_a_run_of_another_seed_shares_nothing(tmp_path, stage):
    source = finished_run(tmp_path / "main", stage)
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        adopt(source, CONFIG.replace(seed=1), tmp_path / "other", (stage,))


def test_several_settings_that_differ_are_named_by_their_flags(tmp_path):
    source = finished_run(tmp_path / "main", "sft")
    config = CONFIG.changed({"sft.steps": 9, "model.width": 64, "max_prompt": 30})
    with pytest.raises(UserError, match=r"other settings \(model.width, sft.steps\)"):
        adopt(source, config, tmp_path / "other", ("sft",))


def test_refusals(tmp_path):
    source = finished_run(tmp_path / "main", "sft")
    with pytest.raises(UserError, match="stage base is not finished there"):
        adopt(source, CONFIG, tmp_path / "other", ("base",))
    with pytest.raises(UserError, match="stage 'evaluate_sft' cannot be taken over"):
        adopt(source, CONFIG, tmp_path / "other", ("evaluate_sft",))
    with pytest.raises(UserError, match="stage 'sfft' cannot be taken over; expected .*, sft, "):
        adopt(source, CONFIG, tmp_path / "other", ("sfft",))
    with pytest.raises(UserError, match="no run here"):
        adopt(tmp_path / "nothing", CONFIG, tmp_path / "other", ("sft",))
    target = finished_run(tmp_path / "other")
    (target / "tokenizer" / "tokenizer.model").write_bytes(b"other pieces")
    with pytest.raises(UserError, match="different tokenizers"):
        adopt(source, CONFIG, target, ("sft",))
