"""Annotated shapes and dtypes are checked while tests run, in every module that says it is."""

from __future__ import annotations

import importlib
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from rlbf_jax.objectives.masked import masked_term, per_row_mean
from rlbf_jax.objectives.sft import sequence_logprobs
from rlbf_jax.sampling.distribution import Truncation, draw
from tests.conftest import CHECKED

WRONG = jaxtyping.TypeCheckError
B, T = 2, 3
NLL, COUNTS = jnp.ones((B, T)), jnp.ones((B, T), bool)


def test_a_wrong_shape_or_dtype_raises():
    assert sequence_logprobs(NLL, COUNTS).shape == (B,)
    for nll, counts in ((NLL, COUNTS[:, :2]), (NLL[0], COUNTS[0]), (NLL, NLL), (COUNTS, COUNTS)):
        with pytest.raises(WRONG):
            sequence_logprobs(nll, counts)
    with pytest.raises(WRONG):
        sequence_logprobs(NLL, COUNTS, NLL, 2)
    with pytest.raises(WRONG):
        masked_term(NLL, COUNTS[0])
    with pytest.raises(WRONG):
        per_row_mean(NLL[0], COUNTS[0])
    row, none = jnp.ones(B), Truncation(jnp.zeros(B, jnp.int32), jnp.ones(B), jnp.zeros(B))
    assert draw(NLL, none, row, row * 0.5).dtype == jnp.int32
    with pytest.raises(WRONG):
        draw(NLL, none, row, jnp.ones(T))


def test_shapes_are_checked_while_programs_are_traced():
    with pytest.raises(WRONG):
        jax.eval_shape(sequence_logprobs, NLL, COUNTS[:, :2])


@pytest.mark.parametrize("name", CHECKED)
def test_checked_modules_exist_and_are_hooked(name):
    module = importlib.import_module(name)
    assert type(module.__spec__.loader).__name__ == "_JaxtypingLoader"
    assert "from jaxtyping import" in pathlib.Path(module.__file__).read_text(encoding="utf-8")


def test_nothing_is_checked_outside_of_tests():
    code = (
        "import sys, jax.numpy as jnp\n"
        "from rlbf_jax.objectives.masked import masked_term\n"
        "assert float(masked_term(jnp.ones((2, 3)), jnp.ones(3, bool)).numerator) == 6\n"
        "assert 'beartype' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
