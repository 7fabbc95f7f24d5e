"""A whole run on eight virtual devices, and what does not divide over them."""

import dataclasses
import json

import pytest
from rlbf_jax.training.reinforcement import ReinforcementConfig

from rlbf_jax.errors import UserError
from rlbf_jax.runs.experiment import ExperimentConfig
from rlbf_jax.runs.shapes import check_rows

MESHED = """
import dataclasses, pathlib, sys
from rlbf_jax.cli.main import load_experiment
from rlbf_jax.runs import execute as runner
from rlbf_jax.parallel.mesh import MeshConfig
replace = dataclasses.replace
config, _ = load_experiment(pathlib.Path("experiments/smoke.py"))
eight = lambda stage: replace(stage, batch_size=8)
config = replace(
    config,
    mesh=MeshConfig(2, 2, 2),
    pretraining=eight(config.pretraining),
    refusal_sft=eight(config.refusal_sft),
    sft=eight(config.sft),
    reinforcement=replace(config.reinforcement, guidance_batch_size=8, prompts_per_step=4, group_size=4),
    sampling_batch=16,
)
runner.run(config, pathlib.Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_the_whole_recipe_runs_on_a_mesh_of_eight(run_in_child, tmp_path):
    run_in_child(MESHED, str(tmp_path / "run"), devices=8, timeout=400)
    records = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {r["stage"] for r in records} == {"base", "refusal_sft", "sft", "sft_control", "rlbf"}
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_batches_that_do_not_divide_over_the_mesh_are_named():
    even = ExperimentConfig()
    check_rows(even, 8)
    uneven = dataclasses.replace(even, reinforcement=ReinforcementConfig(guidance_batch_size=12))
    check_rows(uneven, 4)
    with pytest.raises(
        UserError, match=r"reinforcement.guidance_batch_size: 12 rows .* multiple of 8"
    ):
        check_rows(uneven, 8)
    parts = dataclasses.replace(
        even, sft=dataclasses.replace(even.sft, batch_size=32, accumulate=8)
    )
    with pytest.raises(
        UserError, match=r"sft.batch_size: 32 rows .* 8 microbatches; choose a multiple of 64"
    ):
        check_rows(parts, 8)
