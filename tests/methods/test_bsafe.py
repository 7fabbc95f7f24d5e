"""BSAFE: what its data teach, ids and loss, under its rule."""

from __future__ import annotations

import numpy as np
import pytest

from rlbf_jax.data.worlds.toy_world import ToyWorld
from rlbf_jax.directives import render
from rlbf_jax.methods import bsafe
from rlbf_jax.runs.execute import recipe
from rlbf_jax.runs.experiment import Experiment
from tests.methods.toy_examples import injected, responses_of

WORLD = ToyWorld()


@pytest.fixture(scope="module")
def made():
    return injected(WORLD, "replace", bsafe.replace_span)


def test_the_span_is_repeated_and_replaced(made):
    tokenizer, rule, examples = made
    kept_some = 0
    for example in examples:
        response, in_loss = responses_of(example)
        rendered = render(rule, response)
        (edit,) = rendered.edits
        (flag,) = (i for i, kind in enumerate(rendered.kinds) if kind == "category")
        copy = [response[i] for i, kind in enumerate(rendered.kinds) if kind == "copy"]
        assert list(edit.removed) == copy == response[flag + 1 : edit.index] and copy
        assert edit.category in WORLD.categories and rendered.malformed == 0
        kept_some += edit.kept > 0
        # The loss is on the flag and all that follows it, the copy included.
        np.testing.assert_array_equal(np.flatnonzero(in_loss), range(flag, len(response)))
        assert rendered.visible == (*response[: edit.kept], *response[edit.index + 1 :])
        assert response[-1] == tokenizer.eos_id
    assert kept_some > 10


def test_the_recipe_is_data_base_and_one_supervised_stage():
    assert [s.name for s in recipe(Experiment(bsafe.BsafeConfig()))] == [
        *("tokenizer", "pretraining_data", "bsafe_data", "base", "bsafe_sft"),
        *("evaluate_base", "evaluate_bsafe_sft"),
    ]
