"""`--model.family` in an experiment: the family's structure at the experiment's size."""

from __future__ import annotations

import dataclasses

import pytest

from rlbf_jax.errors import UserError
from rlbf_jax.methods.rlbf import RlbfConfig
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.families import FAMILIES
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.sampling.request import Knobs
from tests.runs.opened import check_shapes, run_of


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_has_the_structure_of_its_family(family, tmp_path):
    e = Experiment(RlbfConfig()).replace(model=ModelConfig(family=family, width=48))
    model = run_of(e, tmp_path).base_model
    assert model.width == 48
    for name, value in FAMILIES[family].structure.items():
        assert getattr(model, name) == value


def test_rows_longer_than_the_model_has_positions_are_refused():
    short = ModelConfig(family="gpt2", max_positions=100)
    e = Experiment(RlbfConfig())
    with pytest.raises(UserError, match=r"data.row_length: \d+ ids; the model has 100 positions"):
        check_shapes(e.replace(model=short))
    whole = e.replace(model=ModelConfig(family="gpt2"))
    check_shapes(whole)
    suite = dataclasses.replace(e.evaluation, knobs=Knobs(max_tokens=1020))
    with pytest.raises(
        UserError,
        match=r"max_prompt \+ evaluation.knobs.max_tokens: 1044 ids; the model has 1024 pos",
    ):
        check_shapes(whole.replace(evaluation=suite))
