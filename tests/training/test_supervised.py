"""The supervised loss with control ids that weigh more, against a loop over targets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.directives import Semantics, layout
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.training.supervised import (
    Rows,
    SupervisedConfig,
    supervised_nll,
    supervised_objective,
    targets_of,
    total_weight,
    weights_of,
)
from tests.fakes import LetterTokenizer, random_model

TOKENIZER = LetterTokenizer()
RULE = TOKENIZER.controls.rule()
SMALL = dict(num_layers=1, width=16, num_heads=2, num_kv_heads=1, mlp_width=16)
MODELS = {
    "fused": random_model(TOKENIZER, **SMALL),
    "softcap": random_model(TOKENIZER, **SMALL, final_softcap=5.0),
}


def rows_of(seed, batch=3, length=14):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 30, (batch, length)).astype(np.int32)
    for row in tokens:  # a directive behind some ids
        at = int(rng.integers(4, length - 2))
        row[at : at + 2] = RULE.category_id("one"), RULE.backtrack_id(2)
    segment = np.where(np.arange(length) < length // 2, 1, 2).astype(np.int32)[None] + 0 * tokens
    in_response = np.broadcast_to(np.arange(length) % (length // 2) >= 2, tokens.shape)
    in_loss = in_response & (rng.random(tokens.shape) < 0.8)
    return Rows(*map(jnp.asarray, (tokens, segment, in_response, in_loss)))


def slow(name, rows, weight):
    """(sum of weighted negative log-likelihoods, sum of weights), target by target."""
    model, params = MODELS[name]
    where = layout(RULE, rows.tokens, rows.segment, rows.in_response, Semantics.REWIND)
    seen = Visibility(where.position, rows.segment, where.died)
    hidden, _ = transformer.forward(model, params, rows.tokens, seen)
    logp = np.asarray(jax.nn.log_softmax(transformer.unembed(model, params, hidden)), np.float64)
    tokens, segment, _, in_loss = map(np.asarray, rows)
    total, weights = 0.0, 0.0
    for b, t in np.argwhere(in_loss):
        if t == 0 or segment[b, t] != segment[b, t - 1]:
            continue
        w = weight if RULE.is_control(int(tokens[b, t])) else 1.0
        total, weights = total - w * logp[b, t - 1, tokens[b, t]], weights + w
    return total, weights


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("weight", [1.0, 0.25, 6.0])
def test_the_loss_equals_a_loop_over_targets(name, weight):
    model, params = MODELS[name]
    for seed in range(3):
        rows = rows_of(seed)
        total, weights = slow(name, rows, weight)
        term = supervised_nll(model, params, RULE, rows, Semantics.REWIND, weight)
        assert float(term.numerator) == pytest.approx(total, rel=1e-5)
        assert float(term.denominator) == pytest.approx(weights, rel=1e-6)
        assert float(total_weight(rows, RULE, weight)) == pytest.approx(weights, rel=1e-6)
        objective = supervised_objective(model, RULE, Semantics.REWIND, weight)
        assert float(objective.denominators(rows)["nll"]) == pytest.approx(weights, rel=1e-6)
        nll = objective.terms(params, rows)["nll"]
        assert float(nll.mean) == pytest.approx(total / weights, rel=1e-5)


def test_weights_are_a_mask_where_all_weigh_alike():
    rows = rows_of(0)
    assert weights_of(rows, RULE).dtype == bool
    np.testing.assert_array_equal(weights_of(rows, RULE), targets_of(rows))
    heavy = np.asarray(weights_of(rows, RULE, 3.0))
    assert set(np.unique(heavy)) == {0.0, 1.0, 3.0}
    np.testing.assert_array_equal(heavy > 0, targets_of(rows))


@pytest.mark.parametrize("name", list(MODELS))
def test_the_gradient_is_finite_and_weighs_directives(name):
    model, params = MODELS[name]
    rows = rows_of(1)

    def gradient(weight):
        def loss(p):
            return supervised_nll(model, p, RULE, rows, Semantics.REWIND, weight).mean

        return jax.grad(loss)(params)["embedding"]

    plain, heavy = gradient(1.0), gradient(6.0)
    assert np.isfinite(heavy).all()
    control = slice(RULE.first_id, RULE.end_id)
    assert jnp.abs(heavy[control]).sum() > 1.5 * jnp.abs(plain[control]).sum()


def test_weights_that_are_none_are_refused():
    for weight in (0.0, -1.0):
        with pytest.raises(ValueError, match="directive_weight"):
            dataclasses.replace(SupervisedConfig(), directive_weight=weight)
