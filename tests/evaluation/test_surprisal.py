"""Surprisal of each id: against one row at a time, unpadded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.evaluation.surprisal import surprisals
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from tests.fakes import LetterTokenizer, random_model

TOKENIZER = LetterTokenizer()


def test_it_is_that_of_one_row_at_a_time():
    model, params = random_model(
        TOKENIZER, num_layers=1, width=16, num_heads=2, num_kv_heads=1, mlp_width=16
    )
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(5, 30, before).tolist(), rng.integers(5, 30, count).tolist())
        for before, count in ((2, 7), (40, 60), (1, 1), (3, 9))
    ]
    found = surprisals(model, params, pairs, batch_size=3)

    @jax.jit
    def logits_of(tokens):
        where = Visibility(jnp.arange(128, dtype=jnp.int32)[None])
        hidden, _ = transformer.forward(model, params, tokens, where)
        return transformer.unembed(model, params, hidden)[0]

    for (prompt, text), nats in zip(pairs, found, strict=True):
        # Ids behind a text cannot change what stands before them.
        tokens = np.full((1, 128), 7, np.int32)
        tokens[0, : len(prompt) + len(text)] = prompt + text
        logits = np.asarray(logits_of(tokens), np.float64)
        wanted = [
            np.log(np.exp(logits[i - 1]).sum()) - logits[i - 1, tokens[0, i]]
            for i in range(len(prompt), len(prompt) + len(text))
        ]
        np.testing.assert_allclose(nats, wanted, atol=1e-4)


@pytest.mark.parametrize("pair", [((), (5,)), ((5,), ())])
def test_a_text_needs_something_before_it(pair):
    model, params = random_model(
        TOKENIZER, num_layers=1, width=16, num_heads=2, num_kv_heads=1, mlp_width=16
    )
    with pytest.raises(ValueError, match="pair 1: the (prompt|text) is empty"):
        surprisals(model, params, [((5,), (6,)), pair])
