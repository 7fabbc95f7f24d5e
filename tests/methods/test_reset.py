"""RESET: what its data teach, ids and loss, under its rule."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.data.worlds.toy_world import ToyWorld
from rlbf_jax.directives import Semantics, layout, render
from rlbf_jax.methods import reset
from rlbf_jax.runs.execute import recipe
from rlbf_jax.runs.experiment import Experiment
from tests.methods.toy_examples import injected, responses_of

WORLD = ToyWorld()


@pytest.fixture(scope="module")
def made():
    return injected(WORLD, "reset", reset.start_again)


def test_the_reader_sees_the_whole_safe_answer_and_nothing_else(made):
    tokenizer, rule, examples = made
    for example in examples:
        response, in_loss = responses_of(example)
        rendered = render(rule, response)
        (edit,) = rendered.edits
        assert edit.kept == 0 and len(edit.before) > 0
        # Everything after the reset is visible, and the loss is on it and on the reset alone.
        assert rendered.visible == tuple(response[edit.index + 1 :])
        np.testing.assert_array_equal(np.flatnonzero(in_loss), range(edit.index, len(response)))
        assert response[-1] == tokenizer.eos_id
        # The unsafe prefix begins as the safe answer does, where the prompt was harmless.
        safe, prefix = tokenizer.decode(rendered.visible), tokenizer.decode(edit.before)
        assert safe.strip() and not prefix.startswith(safe)


def test_under_rewind_the_fresh_answer_sees_the_prompt_alone(made):
    _, rule, examples = made
    example = examples[0]
    tokens = jnp.asarray(example.tokens[None])
    time = jnp.arange(tokens.shape[1])[None]
    where = layout(
        rule, tokens, jnp.ones_like(tokens), time >= example.prompt_length, Semantics.REWIND
    )
    (reset_at,) = np.flatnonzero(rule.is_retraction(example.tokens))
    died = np.asarray(where.died[0])
    assert (died[example.prompt_length : reset_at + 1] == reset_at + 1).all()
    assert (died[: example.prompt_length] > tokens.shape[1]).all()
    assert where.position[0, reset_at + 1] == example.prompt_length


def test_the_recipe_is_data_base_and_one_supervised_stage():
    stages = recipe(Experiment(reset.ResetConfig()))
    assert [s.name for s in stages] == [
        *("tokenizer", "pretraining_data", "reset_data", "base", "reset_sft"),
        *("evaluate_base", "evaluate_reset_sft"),
    ]
