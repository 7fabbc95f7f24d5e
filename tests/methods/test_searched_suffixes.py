"""The stage that searches suffixes for rollouts."""

import pytest

from experiments.smoke import get_config
from rlbf_jax.errors import UserError
from rlbf_jax.methods.rlbf import rollout_source
from rlbf_jax.methods.searched_suffixes import suffixes_of
from rlbf_jax.runs.adopt import adopt
from rlbf_jax.runs.execute import recipe
from rlbf_jax.runs.files import write_json
from rlbf_jax.runs.manifest import shared_by
from rlbf_jax.runs.stage import fingerprint
from tests.runs.opened import do, keep, run_of

PLAIN = get_config().changed({"data.pretraining_examples": 100})
CONFIG = PLAIN.changed(
    {
        "rollouts.strange_suffix": 1.0,
        "rollouts.searched_share": 1.0,
        "suffixes.count": 3,
        "suffixes.steps": 2,
        "suffixes.width": 4,
        "suffixes.ids": 5,
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose SFT model is random, and the suffixes that were searched on it."""
    folder = tmp_path_factory.mktemp("suffixes") / "run"
    run = do(CONFIG, folder, "tokenizer")
    keep(run, "sft", run.initial_params())
    assert suffixes_of(run) == ()
    do(CONFIG, folder, "suffixes")
    return folder


def test_the_stage_is_there_only_where_rollouts_have_a_use_for_it():
    names = [stage.name for stage in recipe(CONFIG)]
    assert names.index("sft") < names.index("suffixes") < names.index("rlbf")
    for unused in (PLAIN, CONFIG.changed({"rollouts.strange_suffix": 0.0})):
        assert "suffixes" not in [stage.name for stage in recipe(unused)]
    stage = next(stage for stage in recipe(CONFIG) if stage.name == "rlbf")
    assert "suffixes" in stage.after

    def of(e):
        return fingerprint(recipe(e), "rlbf", shared_by(e))

    longer = {"suffixes.steps": 3}
    assert of(CONFIG.changed(longer)) != of(CONFIG)
    assert of(PLAIN.changed(longer)) == of(PLAIN)


def test_suffixes_follow_from_the_seed_and_are_what_rollouts_are_asked_with(folder):
    run = run_of(CONFIG, folder)
    found = suffixes_of(run)
    assert len(found) == 3 and all(found)
    (folder / "stages" / "suffixes" / "found.json").unlink()
    do(CONFIG, folder, "suffixes")
    assert suffixes_of(run) == found
    stage = next(stage for stage in recipe(CONFIG) if stage.name == "rlbf")
    prompts = [
        r.request.prompt for step in range(9) for r in rollout_source(run, stage.config)(step)
    ]
    assert sum(prompt.endswith(found) for prompt in prompts) > 5


def test_another_run_takes_them_over_with_the_model_that_they_were_searched_on(folder, tmp_path):
    for stage in ("tokenizer", "base", "sft", "suffixes"):
        write_json(folder / "done" / stage, {"seconds": 1.0})
    other = CONFIG.changed({"reinforcement.steps": 7})
    adopt(folder, other, tmp_path / "other", ("suffixes",))
    assert suffixes_of(run_of(other, tmp_path / "other")) == suffixes_of(run_of(CONFIG, folder))
    longer = CONFIG.changed({"suffixes.steps": 3})
    with pytest.raises(UserError, match="other settings \\(suffixes.steps"):
        adopt(folder, longer, tmp_path / "longer", ("suffixes",))
