"""A run's folder: data sets, random numbers, models with adapters, notes."""

import json

import numpy as np
import pytest

from experiments.smoke import get_config
from rlbf_jax.data.builders.examples import BuildReport
from rlbf_jax.data.datasets import content_hash
from rlbf_jax.data.schema import Example
from rlbf_jax.errors import UserError
from rlbf_jax.models.config import LoraConfig
from rlbf_jax.runs.files import read_json
from tests.runs.opened import do, keep, run_of

CONFIG = get_config().changed({"data.pretraining_examples": 100, "data.row_length": 16})


def example(number, length=7):
    tokens = np.full(length, number + 5, np.int32)
    return Example(tokens, 2, np.arange(length) >= 2)


def write(run, name="things", examples=None):
    made = [example(i) for i in range(9)] if examples is None else examples
    run.write_dataset(name, made, BuildReport({"plain": len(made)}, {"too long": 1}))


def test_a_data_set_is_packed_counted_and_hashed(tmp_path):
    run = do(CONFIG, tmp_path, "tokenizer")
    write(run)
    counts = read_json(tmp_path / "data" / "report.json")["things"]
    assert counts["rows"] == run.rows_of("things") == 5  # two examples a row of 16 ids
    assert (counts["made"], counts["rejected"]) == ({"plain": 9}, {"too long": 1})
    assert counts["sha256"] == content_hash(tmp_path / "data" / "things")
    assert run.noted_data("things") == counts["sha256"]
    write(run, "others")
    assert set(read_json(tmp_path / "data" / "report.json")) == {"things", "others"}
    assert run.noted_data("tokenizer") == run.tokenizer.digest()
    assert run.rows_of("nothing") == 0 and run.noted_data("nothing") is None


def test_an_example_longer_than_a_row_is_told(tmp_path):
    with pytest.raises(UserError, match=r"data.row_length: .*\(max_tokens of the data set\)"):
        write(run_of(CONFIG, tmp_path), examples=[example(0, 17)])


def test_batches_go_on_from_their_state_and_depend_on_the_seed(tmp_path):
    run = run_of(CONFIG, tmp_path)
    write(run)
    batches = run.batches("things", 2)
    first = [next(batches)["tokens"] for _ in range(3)]
    state = batches.get_state()
    after = next(batches)["tokens"]
    again = run.batches("things", 2)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["tokens"], after)
    same = run.batches("things", 2)
    for wanted in first:
        np.testing.assert_array_equal(next(same)["tokens"], wanted)
    other = run_of(CONFIG.replace(seed=1), tmp_path).batches("things", 2)
    assert any((next(other)["tokens"] != wanted).any() for wanted in first)


def test_missing_data_say_which_marker_makes_them_again(tmp_path):
    with pytest.raises(
        UserError, match="delete .*done/things_data, then `rlbf run` makes the same"
    ):
        run_of(CONFIG, tmp_path).batches("things", 2)


def test_random_numbers_follow_from_seed_and_purpose(tmp_path):
    def drawn(seed, purpose):
        return run_of(CONFIG.replace(seed=seed), tmp_path).rng(purpose).integers(2**60)

    assert drawn(0, "refusal") == drawn(0, "refusal")
    assert len({drawn(s, p) for s in (0, 1) for p in ("refusal", "bsafe_plus", "a", "b")}) == 8


def test_adapters_train_the_rows_of_the_rules_control_ids(tmp_path):
    run = do(CONFIG, tmp_path, "tokenizer")
    rule = run.rule("backtrack")
    assert run.tuned(LoraConfig(), rule) == run.model
    tuned = run.tuned(LoraConfig(rank=2), rule)
    assert (tuned.lora.first_row, tuned.lora.rows) == (rule.first_id, rule.num_controls)
    assert tuned.vocab_size == run.tokenizer.vocab_size and not run.model.lora.rank


def test_files_are_written_whole(tmp_path):
    run = run_of(CONFIG, tmp_path)
    run.write_lines("evaluation/a.jsonl", [{"text": "é"}, {"text": "b"}])
    lines = (tmp_path / "evaluation" / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "é"}, {"text": "b"}]
    assert "é" in lines[0]


def test_an_unfinished_stage_is_told_with_the_finished_ones(tmp_path):
    run = do(CONFIG, tmp_path, "tokenizer")
    with pytest.raises(UserError, match="no finished stage 'sft'; finished are none"):
        run.model_of("sft")
    keep(run, "base", run.initial_params())
    with pytest.raises(UserError, match="no finished stage 'sft'; finished are base"):
        run.trainable("sft", LoraConfig(), run.rule("backtrack"))


def test_initial_parameters_follow_from_the_seed(tmp_path):
    run = do(CONFIG, tmp_path, "tokenizer")
    one, same = run.initial_params(), run.initial_params()
    other = run_of(CONFIG.replace(seed=1), tmp_path).initial_params()
    np.testing.assert_array_equal(one["embedding"], same["embedding"])
    assert (np.asarray(one["embedding"]) != np.asarray(other["embedding"])).any()
