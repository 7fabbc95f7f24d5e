"""Stages that papers share: what they come after, and what is said of sizes that do not fit."""

import json

import numpy as np
import pytest

from experiments.smoke import get_config
from rlbf_jax.directives import Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.methods import shared
from rlbf_jax.models.config import LoraConfig
from rlbf_jax.runs.execute import recipe, view
from rlbf_jax.runs.files import read_json, write_json
from tests.runs.opened import do, run_of

CONFIG = get_config().changed({"data.pretraining_examples": 100, "sft_examples": 20})


def by_name(stages):
    return {stage.name: stage for stage in stages}


def test_the_foundation_is_trained_or_taken():
    own = by_name(shared.foundation(CONFIG))
    assert list(own) == ["tokenizer", "pretraining_data", "base"]
    assert own["base"].after == ("tokenizer", "pretraining_data")
    published = by_name(shared.foundation(CONFIG.replace(start_from="folder")))
    assert list(published) == ["tokenizer", "base"] and published["base"].after == ("tokenizer",)
    assert published["tokenizer"].config.start_from == "folder"
    assert own["base"].evaluated and own["base"].headline


def test_the_base_has_no_adapters_and_depends_on_no_directive():
    """So runs of all rules, semantics and ranks share it."""
    base = by_name(shared.foundation(CONFIG.changed({"model.lora.rank": 4})))["base"]
    assert base.config.model.lora == LoraConfig()


def test_a_supervised_stage_comes_after_its_data_and_its_start():
    sft = shared.supervised_stage(CONFIG, "sft", CONFIG.method.sft, "bsafe_plus")
    assert sft.after == ("tokenizer", "bsafe_plus_data", "base") and sft.evaluated
    again = shared.supervised_stage(CONFIG, "more", CONFIG.method.sft, "refusal", "sft")
    assert again.after == ("tokenizer", "refusal_data", "base", "sft")
    assert (again.config.start, again.config.examples) == ("sft", "refusal_examples")
    assert sft.config.examples == "sft_examples"


@pytest.mark.parametrize(
    ("stage", "dataset", "said"),
    [
        ("base", "pretraining", "pretraining.batch_size is 4, .* raise data.pretraining_examples"),
        ("sft", "bsafe_plus", "sft.batch_size is 4, .*bsafe_plus has 3 rows; raise sft_examples"),
        ("refusal_sft", "refusal", "refusal_sft.batch_size is 4, .* raise refusal_examples"),
        ("rlbf", "bsafe_plus", "reinforcement.guidance_batch_size is 2, .* raise sft_examples"),
    ],
)
def test_data_sets_that_are_too_small_name_the_option_that_makes_them_larger(
    tmp_path, stage, dataset, said
):
    stages = recipe(CONFIG)
    made = by_name(stages)[stage]
    rows = 1 if stage == "rlbf" else 3
    write_json(tmp_path / "data" / "report.json", {dataset: {"rows": rows}})
    with pytest.raises(UserError, match=said):
        made.fit(view(run_of(CONFIG, tmp_path), stages, made), made.config)
    for flag in (said.split(" ")[0], said.split("raise ")[1]):
        CONFIG.changed({flag: 5})  # both are options


def test_tokenizer_and_data_follow_from_the_seed(tmp_path):
    def made(folder, e):
        for name in ("tokenizer", "bsafe_plus_data"):
            run = do(e, folder, name)
        stored = read_json(folder / "manifest.json")["data"]
        report = json.loads((folder / "data" / "report.json").read_text())
        assert report["bsafe_plus"]["sha256"] == stored["bsafe_plus"]
        return stored, run.tokenizer.digest()

    one, same = made(tmp_path / "one", CONFIG), made(tmp_path / "same", CONFIG)
    assert one == same and one[0]["tokenizer"] == one[1]
    keep = made(tmp_path / "keep", CONFIG.replace(semantics=Semantics.KEEP))
    assert keep == one  # the texts are the same; how they are read is not
    other = made(tmp_path / "other", CONFIG.replace(seed=1))
    assert other[0]["bsafe_plus"] != one[0]["bsafe_plus"]


def test_settings_that_cannot_build_a_data_set_are_told(tmp_path):
    do(CONFIG, tmp_path, "tokenizer")
    with pytest.raises(UserError, match="longer than max_tokens"):
        do(CONFIG.changed({"bsafe_plus.max_tokens": 12}), tmp_path, "bsafe_plus_data")
    assert not (tmp_path / "data" / "bsafe_plus").exists()


def test_a_vocabulary_that_is_too_small_is_told(tmp_path):
    with pytest.raises(UserError, match="data: vocab_size 260 is too small"):
        do(CONFIG.changed({"data.vocab_size": 260}), tmp_path, "tokenizer")
    assert not (tmp_path / "tokenizer").exists()


def test_base_is_trained_and_a_stage_goes_on_from_it(tmp_path):
    e = CONFIG.changed({"pretraining.steps": 2, "sft.steps": 2})
    for name in ("tokenizer", "pretraining_data", "bsafe_plus_data", "base", "sft"):
        run = do(e, tmp_path, name)
    first, base, sft = (
        params["embedding"]
        for params in (run.initial_params(), *(run.model_of(s)[1] for s in ("base", "sft")))
    )
    assert (np.asarray(first) != np.asarray(base)).any()
    assert (np.asarray(base) != np.asarray(sft)).any()
    rows = (tmp_path / "stages" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 1]
