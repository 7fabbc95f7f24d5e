"""`--model.family` in an experiment: the family's structure at the experiment's size."""

from __future__ import annotations

import dataclasses
import types

import pytest
from rlbf_jax.runs.workspace import Workspace

from rlbf_jax.errors import UserError
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.families import FAMILIES
from rlbf_jax.runs.experiment import ExperimentConfig
from rlbf_jax.runs.shapes import check_rows
from rlbf_jax.sampling.request import Knobs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_has_the_structure_of_its_family(family, tmp_path):
    config = ExperimentConfig(model=ModelConfig(family=family, width=48))
    work = Workspace(config, tmp_path, types.SimpleNamespace())
    work.__dict__["tokenizer"] = types.SimpleNamespace(vocab_size=77)
    assert work.model.vocab_size == 77 and work.model.width == 48
    for name, value in FAMILIES[family].structure.items():
        assert getattr(work.model, name) == value


def test_rows_longer_than_the_model_has_positions_are_refused():
    config = ExperimentConfig(model=ModelConfig(family="gpt2", max_positions=100))
    with pytest.raises(UserError, match=r"data.row_length: \d+ ids; the model has 100 positions"):
        check_rows(config, 1)
    check_rows(dataclasses.replace(config, model=ModelConfig(family="gpt2")), 1)
    asked = dataclasses.replace(config.evaluation, knobs=Knobs(max_tokens=1020))
    with pytest.raises(
        UserError,
        match=r"max_prompt \+ evaluation.knobs.max_tokens: 1044 ids; the model has 1024 pos",
    ):
        check_rows(
            dataclasses.replace(config, model=ModelConfig(family="gpt2"), evaluation=asked), 1
        )
