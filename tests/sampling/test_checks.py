"""What the sampler refuses: models that say nothing of the next id, and requests out of range."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.data.schema import Example
from rlbf_jax.directives import Semantics
from rlbf_jax.errors import InputError, UserError
from rlbf_jax.evaluation.utility import score_texts
from rlbf_jax.harness.likelihood import log_likelihoods
from rlbf_jax.sampling.checks import LEAST_TEMPERATURE, check_knobs
from rlbf_jax.sampling.distribution import NONE_LEGAL, NOT_FINITE, Truncation, draw
from rlbf_jax.sampling.policy import Policy
from rlbf_jax.sampling.program import Contrast, Single
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig
from tests.fakes import LetterTokenizer, random_model

TOKENIZER = LetterTokenizer()
RULE = TOKENIZER.controls.rule()
MODEL, PARAMS = random_model(TOKENIZER, num_layers=1)
SHAPES = SamplerConfig(Semantics.REWIND, batch_size=4, min_context=32, min_room=32)
SAMPLER = Sampler(MODEL, TOKENIZER, SHAPES)
FREE = Knobs(max_tokens=12, stop_ids=())


def poisoned(ids, value=np.nan):
    """Parameters under which every query that sees one of these ids gives such logits."""
    return PARAMS | {"embedding": PARAMS["embedding"].at[jnp.asarray(ids)].set(value)}


# Draws that are no ids ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [7, 3000])
def test_a_draw_from_what_is_no_distribution_is_a_mark(temperature, vocab):
    good = jax.random.normal(jax.random.key(0), (vocab,))
    rows = [
        good,
        good.at[3].set(jnp.nan),
        good.at[vocab - 1].set(jnp.inf),
        jnp.full(vocab, -jnp.inf),
        good.at[0].set(-jnp.inf),
    ]
    none = Truncation(jnp.zeros(5, jnp.int32), jnp.ones(5), jnp.zeros(5))
    some = none._replace(top_k=jnp.full(5, 4), top_p=jnp.full(5, 0.9), min_p=jnp.full(5, 0.01))
    for cut in (none, some):
        ids = draw(jnp.stack(rows), cut, jnp.full(5, temperature), jnp.full(5, 0.5)).tolist()
        assert ids[1:4] == [NOT_FINITE, NOT_FINITE, NONE_LEGAL]
        assert 0 <= ids[0] < vocab and 0 < ids[4] < vocab


@pytest.mark.parametrize(
    "knobs", [FREE, dataclasses.replace(FREE, temperature=0.0), dataclasses.replace(FREE, top_k=3)]
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_is_not_finite_is_refused_by_request_and_step(knobs, value):
    params = poisoned(TOKENIZER.encode("q"), value)
    requests = [
        Request("a", (), FREE, 5),
        Request("tell", tuple(TOKENIZER.encode("sq")), knobs, 7),
    ]
    match = r"request 1 \(id 7\), emitted id 2: the model's logits are not finite"
    with pytest.raises(UserError, match=match):
        SAMPLER(params, requests, 0)
    # Where nothing is drawn, nothing is wrong.
    (forced,) = SAMPLER(
        params, [dataclasses.replace(requests[1], knobs=dataclasses.replace(knobs, max_tokens=2))]
    )
    assert np.isnan(forced.logprobs).all() and len(forced.trace) == 2


def test_a_model_that_breaks_later_is_refused_where_it_breaks():
    """The first drawn letter breaks it: the next id has no distribution."""
    requests = [Request("a", (), FREE, 3)]
    (clean,) = SAMPLER(PARAMS, requests, 2)
    letters = [i for i in range(5, RULE.first_id) if i not in TOKENIZER.encode("a")]
    first = next(k for k, token in enumerate(clean.trace) if int(token) in letters)
    for ended in (None, lambda place, generation: False):
        with pytest.raises(UserError, match=rf"id 3\), emitted id {first + 1}: .*not finite"):
            SAMPLER(poisoned(letters), requests, 2, ended)


@dataclasses.dataclass(frozen=True)
class Muted:
    """A mix that leaves no id."""

    def __call__(self, logits):
        return jnp.full_like(logits[0], -jnp.inf)

    def check(self, models):
        pass


def test_a_row_without_a_legal_id_is_refused():
    program = Contrast((MODEL,), Muted())
    with pytest.raises(UserError, match="request 0 .id 0., emitted id 0: .*logit of -inf"):
        Sampler(program, TOKENIZER, SHAPES)((PARAMS,), [Request("a", (), FREE)], 0)


def test_scores_that_are_not_finite_are_refused():
    """The same model where nothing is drawn: a policy's scores, a harness's, an evaluation's."""
    params, letters = poisoned(TOKENIZER.encode("q")), TOKENIZER.encode("aqa")
    policy = Policy(Single(MODEL), PARAMS, TOKENIZER, RULE, Semantics.KEEP, "sick")
    generations = policy.sample([Request("a", (), FREE), Request("q", (), FREE)])
    assert len(policy.score(generations)) == 2
    with pytest.raises(UserError, match="generation 1: the logits of sick are not finite"):
        policy.replace(params=params).score(generations)
    pairs = [([1], letters[:1]), (letters, letters)]
    with pytest.raises(UserError, match="pair 1: the model's logits are not finite"):
        log_likelihoods(MODEL, params, pairs, batch_size=2, max_length=8)
    texts = [
        Example(np.asarray(ids), 1, np.arange(3) > 0) for ids in (TOKENIZER.encode("abc"), letters)
    ]
    with pytest.raises(UserError, match="text 1: its likelihood is not finite"):
        score_texts(MODEL, params, texts, 2)


# Rows that no id stands for -----------------------------------------------------------------------


def spare_rows():
    """A model that wants little but the rows beyond its tokenizer."""
    config, params = random_model(TOKENIZER, num_layers=1)
    spare = jnp.arange(TOKENIZER.vocab_size, config.vocab_size)
    assert len(spare) == 3
    return config, params | {"unembedding": params["unembedding"].at[spare].multiply(20.0)}


@pytest.mark.parametrize("says", [True, False])
def test_rows_beyond_the_tokenizer_are_never_drawn_and_take_no_probability(says):
    """Whether the rule says how many ids there are, or the tokenizer alone."""
    config, params = spare_rows()
    rule = RULE if says else dataclasses.replace(RULE, vocab_size=None)
    policy = Policy(Single(config), params, TOKENIZER, rule, Semantics.REWIND)
    assert policy.rule.vocab_size == TOKENIZER.vocab_size
    for knobs in (FREE, dataclasses.replace(FREE, temperature=0.0)):
        requests = [Request("tell me", (), knobs) for _ in range(8)]
        sampler = Sampler(config, TOKENIZER, SHAPES, rule=rule)
        generations = sampler(params, requests, 0)
        assert max(g.trace.max() for g in generations) < TOKENIZER.vocab_size
        for g, scores in zip(generations, policy.score(generations), strict=True):
            np.testing.assert_allclose(scores, g.logprobs, atol=1e-4)


def test_a_model_of_the_tokenizers_size_keeps_its_rule():
    config = dataclasses.replace(MODEL, vocab_size=TOKENIZER.vocab_size)
    rule = dataclasses.replace(RULE, vocab_size=None)
    assert Sampler(config, TOKENIZER, rule=rule).rule is rule
    assert RULE.within(10**6) is RULE and RULE.within(9).vocab_size == 9


# Requests -----------------------------------------------------------------------------------------


def with_knobs(**fields):
    return Request("a", (), Knobs(**fields))


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (Request("a", id=-1), "id is -1, expected a whole number in 0..4294967295"),
        (Request("a", id=2**32), "id is 4294967296, expected"),
        (Request("a", id=1.5), "id is 1.5, expected"),
        (Request("a", prompt_ids=(5, TOKENIZER.vocab_size)), "prompt ids must lie in 0..40; 41 "),
        (Request("a", prompt_ids=(5, -1)), "prompt ids must lie in 0..40; -1 does not"),
        (Request("a", prompt_ids=(5.0, 6.5)), "prompt ids must be whole numbers in 0..40"),
        (Request("a", prompt_ids=(2**70,)), "prompt ids must be whole numbers"),
        (Request("a", (2**31,)), "forced ids must lie in 0..40; 2147483648 does not"),
        (with_knobs(stop_ids=(2**31,)), "stop ids must lie in 0..40"),
        (with_knobs(stop_ids=(-1,)), "stop ids must lie in 0..40"),
        (with_knobs(forbid_from=2**31), "forbid_from is 2147483648, expected .* 0..2147483647"),
        (with_knobs(forbid_to=-1), "forbid_to is -1, expected"),
        (with_knobs(max_tokens=2**31), "max_tokens is 2147483648, expected"),
        (with_knobs(max_tokens=2**31 - 1), "max_tokens = 2147483647 exceed 32768 ids"),
        (with_knobs(max_tokens=7.5), "max_tokens is 7.5, expected a whole number"),
        (with_knobs(budget=2**31), "budget is 2147483648, expected"),
        (with_knobs(budget=True), "budget is True, expected"),
        (with_knobs(top_k=2**31), "top_k is 2147483648, expected"),
        (with_knobs(top_k=2.5), "top_k is 2.5, expected"),
        (with_knobs(grammar="no"), "grammar is no, expected True or False"),
        (with_knobs(temperature=1e-40), "temperature is 1e-40, expected 0 .greedy., or 1e-06"),
        (with_knobs(temperature=1e39), "temperature is 1e.39, expected"),
        (with_knobs(temperature=np.inf), "temperature is inf, expected"),
        (with_knobs(top_p=np.nan), "top_p is nan"),
        (with_knobs(min_p=np.nan), "min_p is nan"),
        (with_knobs(control_bias={"categories": np.nan}), "control_bias of 'categories' is nan"),
        (with_knobs(control_bias={"one": np.inf}), "'one' is inf, expected a finite number"),
        (with_knobs(control_bias={"one": -np.inf}), "'one' is -inf, .*-1e9 says never"),
        (with_knobs(control_bias={"one": 1e39}), "'one' is 1e.39, expected"),
        (with_knobs(control_bias={"one": "2"}), "'one' is 2, expected a finite number"),
        (with_knobs(control_bias={"three": 1.0}), "control_bias: unknown name 'three'"),
    ],
)
def test_every_id_and_knob_is_checked(request_, match):
    with pytest.raises(InputError, match=match) as error:
        SAMPLER(PARAMS, [Request("a"), request_])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [-(2**31) - 1, 2**32, 2**70])
def test_seeds_that_others_would_share_are_refused(seed):
    with pytest.raises(InputError, match=f"the seed is {seed}, expected"):
        SAMPLER(PARAMS, [Request("a")], seed)


def test_the_ends_of_the_ranges_are_sampled():
    """Log-probabilities are finite at the least temperature, the largest biases and ids."""
    knobs = dataclasses.replace(FREE, temperature=LEAST_TEMPERATURE, forbid_from=2**31 - 1)
    bias = {"categories": 1e12, "one": 1e12, "retractions": -1e12}
    requests = [
        Request("a", (), knobs, 2**32 - 1),
        Request("a", (), dataclasses.replace(knobs, control_bias=bias), np.int64(0)),
        Request("a", (), dataclasses.replace(FREE, temperature=3e38, top_k=np.int32(4))),
        Request("a", (), dataclasses.replace(FREE, control_bias=bias, top_p=1e-9)),
    ]
    for g in SAMPLER(PARAMS, requests, np.int64(2**32 - 1)):
        assert np.isfinite(g.logprobs).all() and len(g.trace) == 12
    check_knobs(Knobs(temperature=0, grammar=np.bool_(True)))
