"""A whole run on eight virtual devices, and what does not divide over them."""

import dataclasses
import json

import pytest

from rlbf_jax.errors import UserError
from rlbf_jax.methods.rlbf import RlbfConfig
from rlbf_jax.runs.experiment import Experiment
from tests.runs.opened import check_shapes

MESHED = """
import dataclasses, pathlib, sys
from rlbf_jax.cli.run import load_experiment
from rlbf_jax.runs import execute
from rlbf_jax.parallel.mesh import MeshConfig
replace = dataclasses.replace
e, _ = load_experiment(pathlib.Path("experiments/smoke.py"))
eight = replace(e.method.sft, batch_size=8)
reinforcement = replace(
    e.method.reinforcement, guidance_batch_size=8, prompts_per_step=4, group_size=4
)
e = e.replace(
    mesh=MeshConfig(2, 2, 2),
    pretraining=replace(e.base.pretraining, batch_size=8),
    refusal_sft=eight,
    sft=eight,
    reinforcement=reinforcement,
    sampling_batch=16,
)
execute.run(e, pathlib.Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_the_whole_recipe_runs_on_a_mesh_of_eight(run_in_child, tmp_path):
    run_in_child(MESHED, str(tmp_path / "run"), devices=8, timeout=400)
    records = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {r["stage"] for r in records} == {"base", "refusal_sft", "sft", "sft_control", "rlbf"}
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_batches_that_do_not_divide_over_the_mesh_are_named():
    even = Experiment(RlbfConfig())
    check_shapes(even, 8)
    uneven = even.changed({"reinforcement.guidance_batch_size": 12})
    check_shapes(uneven, 4)
    with pytest.raises(
        UserError, match=r"reinforcement.guidance_batch_size: 12 rows .* multiple of 8"
    ):
        check_shapes(uneven, 8)
    parts = even.replace(sft=dataclasses.replace(even.method.sft, batch_size=32, accumulate=8))
    with pytest.raises(
        UserError, match=r"sft.batch_size: 32 rows .* 8 microbatches; choose a multiple of 64"
    ):
        check_shapes(parts, 8)
