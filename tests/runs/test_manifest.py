"""manifest.json: what it holds, when it may change, and what is said of one that cannot be read."""

import json

import pytest

import rlbf_jax
from experiments.smoke import get_config
from rlbf_jax.errors import UserError
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.plain import plain
from rlbf_jax.runs.execute import recipe
from rlbf_jax.runs.files import read_json, write_json
from rlbf_jax.runs.manifest import (
    FORMAT,
    changed_settings,
    experiment_from,
    make_manifest,
    open_workdir,
    read_manifest,
    shared_by,
)
from rlbf_jax.runs.stage import fingerprint
from rlbf_jax.storage import held

CONFIG = get_config()
STAGES = recipe(CONFIG)


def opened(e, folder):
    open_workdir(e, recipe(e), folder)
    return read_json(folder / "manifest.json")


def test_what_a_manifest_holds(tmp_path):
    stored = opened(CONFIG, tmp_path / "run")
    assert stored["format"] == FORMAT and stored["config"] == json.loads(
        json.dumps(CONFIG.stored())
    )
    assert [entry["name"] for entry in stored["stages"]] == [s.name for s in STAGES]
    for entry, stage in zip(stored["stages"], STAGES, strict=True):
        assert entry["fingerprint"] == fingerprint(STAGES, stage.name, shared_by(CONFIG))
        assert tuple(entry["after"]) == stage.after
        assert entry["evaluated"] == stage.evaluated and entry["method"] == stage.method
        assert entry["label"] == stage.label
    data = json.loads(json.dumps(plain(CONFIG.data)))
    # The tokenizer's stage says what `rules` comes to.
    del data["rules"]
    assert stored["shared"] == {"seed": 0, "data": data}
    assert stored["stages"][0]["config"]["rules"] == ["backtrack", "reset"]
    assert stored["versions"]["rlbf_jax"] == rlbf_jax.__version__
    assert stored["seeds"] == {"training": 0, "evaluation": CONFIG.evaluation.seed}
    assert "jax" in stored["versions"] and stored["devices"]


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    opened(CONFIG, tmp_path)
    manifest = read_manifest(tmp_path)
    assert experiment_from(manifest.config, type(CONFIG.method)) == CONFIG
    assert [entry.name for entry in manifest.stages] == [s.name for s in STAGES]
    rlbf = manifest.stage("rlbf")
    assert rlbf is not None and rlbf.headline and rlbf.method == "rlbf_ppo"
    assert rlbf.after == ("tokenizer", "bsafe_plus_data", "base", "sft")
    assert rlbf.config["reinforcement"]["steps"] == 3 and manifest.stage("sfft") is None
    # No command after a run needs the method's own settings.
    e = manifest.experiment()
    assert (e.method.name, e.rule) == ("rlbf", "backtrack") and e.base == CONFIG.base


def test_manifests_of_version_0_1_are_refused_in_one_line_that_names_it(tmp_path):
    old = {"config": {"seed": 0, "method": "rlbf"}, "versions": {"rlbf_jax": "0.1.0"}}
    write_json(tmp_path / "manifest.json", old)
    for read in (read_manifest, lambda folder: open_workdir(CONFIG, STAGES, folder)):
        with pytest.raises(UserError, match="made by rlbf_jax 0.1.0, whose runs this") as raised:
            read(tmp_path)
        assert "\n" not in str(raised.value) and "another --workdir" in str(raised.value)
        assert rlbf_jax.__version__ in str(raised.value)
    write_json(tmp_path / "manifest.json", {"config": {}, "format": FORMAT + 1})
    with pytest.raises(UserError, match="made by rlbf_jax an unknown version"):
        read_manifest(tmp_path)


def test_models_of_earlier_versions_are_brought_up_to_date(tmp_path):
    stored = opened(CONFIG, tmp_path)
    stored["config"]["model"]["remat"] = True
    write_json(tmp_path / "manifest.json", stored)
    assert read_manifest(tmp_path).experiment().base.model.remat == "block"


def test_a_run_of_three_mesh_axes_is_gone_on_with(tmp_path):
    stored = opened(CONFIG, tmp_path)
    del stored["config"]["mesh"]["slice"]
    write_json(tmp_path / "manifest.json", stored)
    open_workdir(CONFIG, STAGES, tmp_path)
    assert read_manifest(tmp_path).experiment().mesh == CONFIG.mesh


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("config"), "not a manifest"),
        (lambda m: m.update(config=3), "config is a int, expected an object"),
        (lambda m: m.pop("stages"), "not a manifest"),
        (lambda m: m.update(stages=[3]), "not a manifest"),
        (lambda m: m.update(stages=[{"name": "base"}]), "not a manifest"),
        (lambda m: m.pop("shared"), "not a manifest"),
    ],
)
def test_what_is_no_manifest_is_told(tmp_path, change, said):
    stored = opened(CONFIG, tmp_path)
    change(stored)
    write_json(tmp_path / "manifest.json", stored)
    with pytest.raises(UserError, match=f"manifest.json: .*{said}"):
        read_manifest(tmp_path)


def test_settings_of_another_kind_do_not_fit_this_version(tmp_path):
    stored = opened(CONFIG, tmp_path)
    for name, value in (("seed", "x"), ("model", {"num_heads": 3, "num_kv_heads": 2})):
        changed = stored | {"config": stored["config"] | {name: value}}
        write_json(tmp_path / "manifest.json", changed)
        with pytest.raises(UserError, match="config does not fit this version of the program"):
            read_manifest(tmp_path).experiment()


# Opening again ----------------------------------------------------------------------------------


def done(folder, *stages):
    for stage in stages:
        write_json(folder / "done" / stage, {})


def test_a_folder_of_the_same_settings_is_left_as_it_is(tmp_path):
    opened(CONFIG, tmp_path)
    done(tmp_path, "tokenizer", "base")
    before = (tmp_path / "manifest.json").read_bytes()
    open_workdir(CONFIG, STAGES, tmp_path)
    # What decides nothing may be another.
    patient = CONFIG.changed({"critic_endpoint.retries": 9, "judge_endpoint.max_unjudged": 0.9})
    assert changed_settings(patient, read_manifest(tmp_path).config) == []
    open_workdir(patient, recipe(patient), tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_settings_that_differ_are_named_by_their_flags(tmp_path):
    opened(CONFIG, tmp_path)
    (tmp_path / "stages" / "base").mkdir(parents=True)
    other = CONFIG.changed({"sft.steps": 9, "model.width": 64, "seed": 1, "max_drawn": 3})
    with pytest.raises(UserError) as raised:
        open_workdir(other, recipe(other), tmp_path)
    assert "max_drawn is 48 there, 3 here, model.width is 32 there, 64 here" in str(raised.value)
    assert "and 1 more" in str(raised.value) and "--workdir" in str(raised.value)
    assert read_manifest(tmp_path).experiment() == experiment_from(
        CONFIG.stored(), read_manifest(tmp_path).experiment().method
    )


def takes(folder, e):
    """Whether a folder becomes that of another experiment."""
    try:
        open_workdir(e, recipe(e), folder)
    except UserError as error:
        assert "holds a run with other settings" in str(error)
        return False
    return read_json(folder / "manifest.json")["config"] == json.loads(json.dumps(e.stored()))


def test_a_setting_is_mended_in_the_same_folder_until_it_has_counted(tmp_path):
    """While nothing is trained, and what is prepared is what the new settings would make."""
    opened(CONFIG, tmp_path)
    assert takes(tmp_path, CONFIG.changed({"data.vocab_size": 901}))
    assert takes(tmp_path, CONFIG)
    done(tmp_path, "tokenizer", "pretraining_data")
    manifest = read_json(tmp_path / "manifest.json") | {"data": {"tokenizer": "digest"}}
    write_json(tmp_path / "manifest.json", manifest)
    assert takes(tmp_path, CONFIG.replace(max_drawn=30))
    assert read_json(tmp_path / "manifest.json")["data"] == {"tokenizer": "digest"}
    assert takes(tmp_path, CONFIG.replace(sft_examples=30))
    assert not takes(tmp_path, CONFIG.changed({"data.vocab_size": 901}))
    assert not takes(tmp_path, CONFIG.replace(seed=1))
    done(tmp_path, "bsafe_plus_data")
    assert not takes(tmp_path, CONFIG)
    assert takes(tmp_path, CONFIG.replace(sft_examples=30, rollout_budget=2))
    done(tmp_path, "refusal_data")
    assert not takes(tmp_path, CONFIG.replace(sft_examples=30, baselines=False))
    (tmp_path / "stages" / "base").mkdir(parents=True)
    assert not takes(tmp_path, CONFIG.replace(sft_examples=30, rollout_budget=3))


def test_a_folder_in_which_another_process_works_is_not_taken(tmp_path):
    opened(CONFIG, tmp_path)
    done(tmp_path, "tokenizer")
    before = (tmp_path / "manifest.json").read_bytes()
    with held(tmp_path / "done"):
        assert not takes(tmp_path, CONFIG.replace(max_drawn=30))
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert takes(tmp_path, CONFIG.replace(max_drawn=30))


def test_a_file_in_the_folders_place_is_told(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="a file is there, and a folder is expected"):
        open_workdir(CONFIG, STAGES, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written .*choose another --workdir"):
        open_workdir(CONFIG, STAGES, tmp_path / "file" / "run")


def test_every_manifest_is_json_of_plain_values():
    made = make_manifest(CONFIG, STAGES)
    assert json.loads(json.dumps(made)) == made and isinstance(CONFIG.base.model, ModelConfig)
