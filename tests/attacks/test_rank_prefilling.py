"""Rank-based prefilling against a loop over prefixes: every forced id is among the first, and no
other answer would have got further."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.attacks import ATTACKS, SEARCHED
from rlbf_jax.attacks.base import Scene, Victim
from rlbf_jax.attacks.search.rank_prefilling import RankOptions, leading, rank_prefilling, ranks_of
from rlbf_jax.errors import InputError
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from tests.attacks.small_world import CONFIG, WORLD
from tests.fakes import random_model


@pytest.fixture(scope="module")
def victim(tokenizer):
    model, params = random_model(tokenizer, num_layers=1, width=16, num_heads=2, num_kv_heads=1)
    rule = tokenizer.controls.rule()
    return Victim(model, params, sample=lambda requests: [], rule=rule)


def logits_after(victim, ids):
    """The next id's logits, from one prefix alone."""
    tokens = jnp.asarray([list(ids)], jnp.int32)
    where = Visibility(jnp.arange(len(ids), dtype=jnp.int32)[None])
    hidden, _ = transformer.forward(victim.model, victim.params, tokens, where)
    return np.asarray(transformer.unembed(victim.model, victim.params, hidden))[0, -1]


def slow_ranks(victim, prompt, answer, control_ids):
    ranks = []
    for place, token in enumerate(answer):
        logits = logits_after(victim, [*prompt, *answer[:place]])
        likelier = [i for i in range(len(logits)) if logits[i] > logits[token]]
        if not control_ids:
            likelier = [i for i in likelier if not victim.rule.is_control(i)]
        ranks.append(len(likelier))
    return ranks


@pytest.mark.parametrize("control_ids", [True, False])
def test_ranks_equal_those_of_every_prefix_alone(victim, tokenizer, control_ids):
    prompt = tokenizer.encode_prompt("Tell me about tea.")
    answers = [tokenizer.encode(text) for text in ("The green tea", " otto sleeps at the mill", "")]
    found = ranks_of(victim, prompt, answers, RankOptions(control_ids=control_ids))
    for ranks, answer in zip(found, answers, strict=True):
        assert ranks.tolist() == slow_ranks(victim, prompt, answer, control_ids)
    assert max(found[0]) > 20


def scene_of(victim, tokenizer, seed=0, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return Scene(WORLD, tokenizer, np.random.default_rng(seed), config, victim)


@pytest.mark.parametrize("top", [1, 60, 200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_answer_that_gets_furthest_is_forced_as_far(victim, tokenizer, top):
    options = RankOptions(top, candidates=4)
    count = 2 if top == 10_000 else 5  # the slow twin reads every prefix of whole answers
    attempts = rank_prefilling("rank_prefilling", scene_of(victim, tokenizer), count, options)
    reached = []
    for attempt in attempts:
        forced = list(attempt.request.forced)
        asked = tokenizer.encode_prompt(attempt.prompt.text)
        ranks = slow_ranks(victim, asked, forced, True)
        assert all(rank < top for rank in ranks)
        assert len(forced) == attempt.num_bridge + attempt.num_span
        assert attempt.prompt.harmful and attempt.violation.category == attempt.prompt.category
        whole = tokenizer.encode(WORLD.opener(None) + attempt.violation.text)
        assert whole[: len(forced)] == forced
        assert attempt.by_construction == (len(forced) == len(whole))
        if not attempt.by_construction:
            logits = logits_after(victim, [*asked, *forced])
            assert (logits > logits[whole[len(forced)]]).sum() >= top
        reached.append(len(forced) / len(whole))
    assert (min(reached) == 1) == (top == 10_000) and (max(reached) == 0) == (top <= 60)


def test_more_candidates_get_no_less_far(victim, tokenizer):
    far = []
    for count in (1, 16):
        options = RankOptions(80, candidates=count)
        made = rank_prefilling("rank_prefilling", scene_of(victim, tokenizer), 8, options)
        far.append(sum(len(a.request.forced) for a in made))
    assert far[1] >= far[0]


def test_leading():
    assert [leading(np.asarray(x, bool)) for x in ([], [1, 1], [1, 0, 1], [0])] == [0, 2, 1, 0]


def test_what_it_needs_is_said(victim, tokenizer):
    assert {"rank_prefilling", "rank_prefilling_plain"} <= set(SEARCHED)
    assert not ATTACKS["rank_prefilling_plain"].options.control_ids
    with pytest.raises(InputError, match="none to attack"):
        ATTACKS["rank_prefilling"](WORLD, tokenizer, np.random.default_rng(0), 1, CONFIG)
    knobs = dataclasses.replace(CONFIG.knobs, max_tokens=20)
    with pytest.raises(InputError, match="set max_tokens to"):
        rank_prefilling("x", scene_of(victim, tokenizer, knobs=knobs), 1, RankOptions())
