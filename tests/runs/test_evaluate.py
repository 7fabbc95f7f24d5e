"""A stage that is asked and judged: settings, shapes, rows and records."""

import json

import numpy as np
import pytest

from experiments.smoke import get_config
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.results import read_results
from rlbf_jax.runs.evaluate import EvaluationSettings, Evaluator, evaluation_stages
from rlbf_jax.runs.execute import recipe
from rlbf_jax.runs.manifest import shared_by
from rlbf_jax.runs.stage import fingerprint
from rlbf_jax.runs.tradeoff import calibrate_stage
from tests.runs.opened import do, evaluator_of, keep, run_of

CONFIG = get_config().changed(
    {
        "data.pretraining_examples": 100,
        "evaluation.n": 2,
        "evaluation.attacks": ("none", "direct", "prefilling"),
        "perplexity_examples": 3,
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose base is random."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    run = do(CONFIG, folder, "tokenizer")
    keep(run, "base", run.initial_params())
    return folder


def test_every_kept_policy_is_evaluated_under_its_label():
    stages = [s for s in recipe(CONFIG) if not s.name.startswith("evaluate_")]
    made = {stage.name: stage for stage in evaluation_stages(CONFIG, stages)}
    kept = [s.name for s in stages if s.evaluated]
    assert list(made) == [f"evaluate_{name}" for name in kept]
    assert made["evaluate_rlbf"].config.method == "rlbf_ppo"
    assert made["evaluate_sft"].config.method == "sft"
    assert made["evaluate_sft"].after == ("tokenizer", "base", "sft")
    assert made["evaluate_base"].after == ("tokenizer", "base")


def test_an_evaluation_depends_on_its_questions_and_its_judge():
    def of(e, name="evaluate_sft"):
        return fingerprint(recipe(e), name, shared_by(e))

    for change in (
        {"evaluation.n": 3},
        {"judge_model": "folder"},
        {"perplexity_examples": 4},
        {"sft.steps": 9},
    ):
        assert of(CONFIG.changed(change)) != of(CONFIG), change
    for change in ({"judge_endpoint.retries": 9}, {"reinforcement.steps": 9}):
        assert of(CONFIG.changed(change)) == of(CONFIG), change


def test_rows_and_records_are_written_and_repeat_themselves(folder):
    records = evaluator_of(CONFIG, folder).evaluate()
    names = ("evaluation/base.jsonl", "evaluation/clean_text/base.jsonl", "results.json")
    before = [(folder / name).read_bytes() for name in names]
    rows = [json.loads(line) for line in before[0].splitlines()]
    assert {row["attack"] for row in rows} == {"none", "direct", "prefilling"}
    assert len(before[1].splitlines()) == 3
    stored = read_results(folder / "results.json")
    assert [r.key for r in stored] == [r.key for r in records]
    assert {(r.stage, r.method, r.data) for r in stored} == {("base", "base", "test")}
    assert all(row["seams"] == [] for row in rows if not row["edits"])
    asr = next(r for r in stored if (r.attack, r.metric) == ("direct", "asr"))
    mine = [row["metrics"]["asr"] for row in rows if row["attack"] == "direct"]
    assert asr.value == pytest.approx(np.mean(mine)) and asr.n == len(mine)
    evaluator_of(CONFIG, folder).evaluate()
    assert [(folder / name).read_bytes() for name in names] == before


def test_another_suite_changes_what_is_asked_and_nothing_else(folder):
    evaluator = evaluator_of(CONFIG, folder)
    more = evaluator.with_suite(n=3, pool="development")
    assert (more.suite.n, more.suite.pool) == (3, "development")
    assert (evaluator.suite.n, evaluator.suite.pool) == (2, "test")
    assert len(more.attempts) > len(evaluator.attempts)
    assert more.context().data == "development" and more.config.stage == "base"


def test_all_stages_sample_with_one_shape(folder):
    shapes = evaluator_of(CONFIG, folder).sampler().config
    room = CONFIG.evaluation.knobs.max_tokens
    assert (shapes.batch_size, shapes.min_room) == (16, room)
    assert shapes.min_context == CONFIG.max_prompt


def test_attacks_that_do_not_fit_name_the_option(folder):
    e = CONFIG.changed({"evaluation.knobs.max_tokens": 4})
    with pytest.raises(UserError, match=r"evaluation: .* as --evaluation.knobs.max_tokens"):
        _ = evaluator_of(e, folder).attempts


def test_a_stage_that_is_not_finished_is_told(folder):
    settings = EvaluationSettings.of(CONFIG, "sft", "")
    with pytest.raises(UserError, match="no finished stage 'sft'; finished are base"):
        _ = Evaluator(run_of(CONFIG, folder), settings).policy
    before = (folder / "results.json").read_bytes()
    with pytest.raises(UserError, match="no finished stage"):
        Evaluator(run_of(CONFIG, folder), settings).evaluate()
    assert (folder / "results.json").read_bytes() == before


def test_clean_texts_are_the_pools_and_follow_from_the_suites_seed(folder):
    one, same = (evaluator_of(CONFIG, folder).clean_examples() for _ in range(2))
    assert len(one) == 3
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    other = evaluator_of(CONFIG.changed({"evaluation.seed": 9}), folder).clean_examples()
    assert [e.tokens.tolist() for e in other] != [e.tokens.tolist() for e in one]


# Calibrated ---------------------------------------------------------------------------------------


CALIBRATED = CONFIG.changed({"evaluation.calibrate": 0.25})


def test_only_what_was_taught_directives_is_calibrated_and_before_it_is_asked():
    stages = {stage.name: stage for stage in recipe(CALIBRATED)}
    found = [name for name in stages if name.startswith("calibrate_")]
    assert found == ["calibrate_sft", "calibrate_sft_control", "calibrate_rlbf"]
    assert not [s.name for s in recipe(CONFIG) if s.name.startswith("calibrate_")]
    assert "calibrate_sft" in stages["evaluate_sft"].after
    assert stages["evaluate_base"].after == ("tokenizer", "base")
    names = list(stages)
    assert names.index("calibrate_rlbf") < names.index("evaluate_rlbf")


def calibrated(folder):
    """The random base as a stage that was taught directives."""
    settings = EvaluationSettings.of(CALIBRATED, "base", "", retracts=True)
    return Evaluator(run_of(CALIBRATED, folder), settings)


def test_answers_are_drawn_under_the_calibrated_bias_and_questions_do_not_show_it(folder):
    evaluator = calibrated(folder)
    with pytest.raises(UserError, match="no calibrated bias; delete .*calibrate_base"):
        evaluator.evaluate()
    calibrate_stage(evaluator.run, evaluator.config)
    kept = json.loads((folder / "evaluation" / "calibration_base.json").read_bytes())
    assert kept["data"] == "development" and kept["taken_back"]["value"] <= 0.25
    evaluator = calibrated(folder)
    assert evaluator.bias == kept["bias"] != 0
    records = evaluator.evaluate()
    assert next(r.value for r in records if r.metric == "control_bias") == kept["bias"]
    rows = [json.loads(x) for x in (folder / "evaluation/base.jsonl").read_text().splitlines()]
    assert all("control_bias" not in row["knobs"] for row in rows)
    by_hand = evaluator_of(
        CONFIG.changed({"evaluation.knobs.control_bias": {"categories": kept["bias"]}}), folder
    )
    by_hand.evaluate()
    again = [json.loads(x) for x in (folder / "evaluation/base.jsonl").read_text().splitlines()]
    assert [row["metrics"] for row in rows] == [row["metrics"] for row in again]


def test_a_calibration_needs_something_harmless(folder):
    e = CALIBRATED.changed({"evaluation.attacks": ("direct", "prefilling")})
    stage = next(s for s in recipe(e) if s.name == "calibrate_sft")
    with pytest.raises(UserError, match="evaluation.calibrate is 0.25, and of evaluation.attacks"):
        stage.fit(run_of(e, folder), stage.config)
