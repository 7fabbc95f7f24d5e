"""What is there, opened: a run, one of its stages, a checkpoint."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from experiments.smoke import get_config
from rlbf_jax.directives import Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.runs.load import load, open_run
from rlbf_jax.sampling import Knobs
from tests.runs.opened import do, keep

CONFIG = get_config().changed({"data.pretraining_examples": 100, "critic_noise.accuracy": 0.75})


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run whose stages base and sft are finished, with other parameters each."""
    folder = tmp_path_factory.mktemp("load") / "run"
    run = do(CONFIG, folder, "tokenizer")
    params = run.initial_params()
    keep(run, "base", params)
    keep(run, "sft", jax.tree.map(lambda x: x + 1, params))
    return folder


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    assert (one.program, one.rule, one.semantics) == (other.program, other.rule, other.semantics)
    assert one.tokenizer.digest() == other.tokenizer.digest() and one.name == other.name


def test_a_run_is_loaded_by_its_last_finished_stage_or_by_a_named_one(run_folder):
    opened = open_run(run_folder)
    assert opened.last_stage == "sft"
    sft, base = load(run_folder), load(str(run_folder), "base")
    assert (sft.name, base.name) == ("sft", "base")
    same(sft, opened.policy())
    same(base, opened.policy("base"))
    assert not np.array_equal(sft.params["embedding"], base.params["embedding"])
    assert sft.semantics is Semantics.REWIND
    assert sft.rule == opened.run.tokenizer.controls.rule("backtrack")


def test_a_stages_folder_is_that_stage(run_folder):
    for stage in ("base", "sft"):
        same(load(run_folder / "stages" / stage), load(run_folder, stage))


def test_what_a_loaded_policy_says_can_be_sampled(run_folder):
    (answer,) = load(run_folder).sample(["Hello."])
    assert answer.trace.size and isinstance(answer.text, str)


def test_a_checkpoint_is_loaded_from_its_own_folder(run_folder, tmp_path):
    from rlbf_jax.cli import main as cli

    out = tmp_path / "out"
    assert cli.main(["export", str(run_folder / "stages" / "sft"), str(out)]) == 0
    exported, stage = load(out), load(run_folder, "sft")
    assert exported.tokenizer.encode("Hello.") == stage.tokenizer.encode("Hello.")
    # Published weights have other scales, and the same answers; a checkpoint is read under KEEP.
    knobs = Knobs(temperature=0, max_tokens=12)
    answers = [
        policy.sample(["Hello.", "Tell me."], knobs=knobs)
        for policy in (exported, stage.replace(semantics=Semantics.KEEP))
    ]
    for ours, theirs in zip(*answers, strict=True):
        assert ours.trace.tolist() == theirs.trace.tolist()


def test_an_opened_run_has_its_experiment_questions_and_critic(run_folder):
    opened = open_run(run_folder)
    e = opened.experiment
    assert (e.method.name, e.rule, e.seed) == ("rlbf", "backtrack", CONFIG.seed)
    for field in dataclasses.fields(e):
        if field.name != "method":
            assert getattr(e, field.name) == getattr(CONFIG, field.name), field.name
    assert opened.evaluator().config.stage == "sft"
    assert opened.evaluator("rlbf").config.method == "rlbf_ppo"
    assert opened.evaluator("sft").config.method == "sft"
    assert opened.evaluator("sft").suite == CONFIG.evaluation
    # Errors are the critic's of training, and not the judge's.
    assert "0.75" in opened.training_critic.name
    assert opened.evaluator("base").judge.name != opened.training_critic.name


def test_a_stage_that_is_not_finished_is_told_with_those_that_are(run_folder, tmp_path):
    for stage in ("rlbf", "sfft"):
        with pytest.raises(UserError, match=f"no finished stage '{stage}'; finished are base, sft"):
            load(run_folder, stage)
    shutil.copytree(run_folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "stages")
    with pytest.raises(UserError, match="no stage of it is finished; run it first"):
        load(tmp_path / "run")


def test_folders_that_hold_nothing_are_told(run_folder, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no run here .*make one with `rlbf run`"):
            load(folder)
        with pytest.raises(UserError, match=r"no run here .*make one with `rlbf run`"):
            open_run(folder)
    with pytest.raises(UserError, match="no run, hence no stage 'sft' of it"):
        load(run_folder / "stages" / "base", "sft")


def test_another_tokenizer_than_the_runs_is_told(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["data"]["tokenizer"] = "another"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="not the tokenizer that this run was made with; delete"):
        load(folder)
