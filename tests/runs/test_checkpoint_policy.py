"""Folders as policies: stages of runs, published checkpoints, and what does not fit."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import pytest

from rlbf_jax.directives import BacktrackRule, ResetRule, Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.harness.answering import Question, QuestionSampler
from rlbf_jax.harness.likelihood import log_likelihoods
from rlbf_jax.models.families import styled
from rlbf_jax.models.weights.write import write_checkpoint
from rlbf_jax.runs.checkpoint_policy import open_model
from rlbf_jax.runs.manifest import FORMAT
from rlbf_jax.sampling.program import Single
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.tokenizers import import_tokenizer, train_tokenizer
from rlbf_jax.training.checkpoint import Checkpoints
from rlbf_jax.training.model_folder import load_model
from tests.fakes import LetterTokenizer, init, random_model
from tests.runs import tiny_checkpoint as tiny
from tests.tokenizers import families

CONFIG, _ = random_model(LetterTokenizer())


def test_a_published_checkpoint_takes_nothing_back(tmp_path):
    model = open_model(tiny.write(tmp_path / "model"))
    assert (
        not model.directives
        and model.policy.semantics is Semantics.KEEP
        and model.max_length == 256
    )
    # Reserved tokens of the family serve as control ids, so no rows were added.
    assert model.vocab_size == model.config.vocab_size == tiny.ROWS
    assert model.policy.program == Single(model.config)
    assert model.policy.name == str(tmp_path / "model")
    assert open_model(tmp_path / "model", semantics="rewind").policy.semantics is Semantics.REWIND
    with pytest.raises(UserError, match="semantics is 'forget', expected keep or rewind"):
        open_model(tmp_path / "model", semantics="forget")


def test_rows_for_control_ids_change_no_likelihood(tmp_path):
    families.gpt2(tmp_path)
    rows = import_tokenizer(tmp_path, (), 1).controls.first_id
    shape = dataclasses.replace(CONFIG, family="gpt2", vocab_size=rows, max_positions=64)
    config = styled(dataclasses.replace(shape, num_kv_heads=shape.num_heads))
    write_checkpoint(tmp_path, config, init(config, jax.random.key(0)))
    model = open_model(tmp_path)
    assert model.vocab_size == rows < model.config.vocab_size == model.policy.tokenizer.vocab_size
    before = log_likelihoods(*load_model(tmp_path), [([1, 2], [5, 6])], batch_size=4, max_length=64)
    after = log_likelihoods(
        model.config,
        model.policy.params,
        [([1, 2], [5, 6])],
        batch_size=4,
        max_length=64,
        vocab_size=model.vocab_size,
    )
    assert after[0].logprob == pytest.approx(before[0].logprob, abs=1e-5)
    sampler = QuestionSampler(model.policy, 4, 64, directives=model.directives)
    (drawn,) = sampler.answer([Question((1, 2), knobs=Knobs(max_tokens=20))])
    assert max(drawn.trace) < rows


def test_a_tokenizer_with_control_tokens_is_taken_as_it_is(tmp_path):
    folder = tiny.write(tmp_path / "model")
    import_tokenizer(folder, ("one",), 4, tiny.ROWS).save(folder)
    model = open_model(folder)
    assert model.directives and model.policy.tokenizer.controls.rule().categories == ("one",)
    assert not open_model(folder, directives=False).directives


def stage(run: pathlib.Path, semantics: str = "rewind", rule: str = "backtrack") -> pathlib.Path:
    """A run's folder with one stage, as far as it is read."""
    tokenizer = train_tokenizer(["tell me of the moon, and of tea for two"], 300, ("one", "two"), 6)
    tokenizer.save(run / "tokenizer")
    config, params = random_model(tokenizer)
    checkpoints = Checkpoints(run / "stages" / "sft" / "model", writes=True)
    checkpoints.save(0, params, {"stage": "sft", "model": dataclasses.asdict(config)})
    checkpoints.close()
    manifest = {
        "format": FORMAT,
        "config": {"semantics": semantics, "rule": rule},
        "stages": [],
        "shared": {},
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run / "stages" / "sft"


def test_a_stage_of_a_run(tmp_path):
    folder = stage(tmp_path)
    model = open_model(folder)
    assert (
        model.directives and model.policy.semantics is Semantics.REWIND and model.max_length == 2048
    )
    assert model.policy.tokenizer.controls.rule().categories == ("one", "two")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="manifest.json: not a manifest"):
        open_model(folder)
    with pytest.raises(UserError, match="none: no model here"):
        open_model(tmp_path / "none")


def test_the_rule_is_the_runs_or_the_one_an_export_has_noted(tmp_path):
    model = open_model(stage(tmp_path, rule="reset"))
    assert isinstance(model.policy.rule, ResetRule)
    with pytest.raises(UserError, match="no control ids of kind 'replace'.*the model's rule is"):
        open_model(stage(tmp_path / "other", rule="replace"))
    folder = tiny.write(tmp_path / "model")
    import_tokenizer(folder, ("one",), 4, tiny.ROWS).save(folder)
    assert isinstance(open_model(folder).policy.rule, BacktrackRule)
    note = folder / "rlbf_policy.json"
    note.write_text(json.dumps({"rule": "reset", "semantics": "rewind"}))
    policy = open_model(folder).policy
    assert isinstance(policy.rule, ResetRule) and policy.semantics is Semantics.REWIND
    note.write_text(json.dumps({"semantics": "forget"}))
    with pytest.raises(UserError, match="rlbf_policy.json: 'forget'.*export the stage again"):
        open_model(folder)


def test_forbidden_directives_take_no_probability(tmp_path):
    folder = tiny.write(tmp_path / "model")
    import_tokenizer(folder, ("one",), 4, tiny.ROWS).save(folder)
    knobs = Knobs(max_tokens=24, control_bias={"categories": 20.0})
    for forbid in (False, True):
        policy = open_model(folder, directives=not forbid).policy
        requests = [Request("tell me of tea", knobs=knobs)] * 4
        drawn = {int(i) for made in policy.sample(requests) for i in made.trace}
        assert drawn and drawn.isdisjoint(policy.tokenizer.controls.ids) is forbid


def test_tokenizers_that_do_not_fit(tmp_path):
    folder = stage(tmp_path / "run")
    train_tokenizer(["abc " * 9], 265, ("one",), 90).save(tmp_path / "large")
    with pytest.raises(
        UserError, match="the tokenizer has 3.. ids, the model in .* name the right one"
    ):
        open_model(folder, tmp_path / "large")
    with pytest.raises(UserError, match="name the tokenizer's folder as tokenizer=DIR"):
        open_model(folder, tmp_path)


def test_a_vocabulary_nested_without_end_takes_one_line(tmp_path):
    config, params = random_model(LetterTokenizer(), family="llama", scale_embeddings=False)
    write_checkpoint(tmp_path, config, params)
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="tokenizer.json: not JSON .nested too deeply") as error:
        open_model(tmp_path)
    assert "\n" not in str(error.value)
