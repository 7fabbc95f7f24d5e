"""Which goals the attacks on one checkpoint set, and what becomes of the suffixes they find."""

import dataclasses

import numpy as np
import pytest

from rlbf_jax.attacks import ATTACKS, DRAWN, SEARCHED
from rlbf_jax.attacks.base import AttackConfig, Scene, Victim
from rlbf_jax.attacks.search import optimized
from rlbf_jax.attacks.search.gcg import Found, GcgConfig
from rlbf_jax.attacks.search.optimized import OPTIMIZED, OptimizedConfig, attack_model
from rlbf_jax.critics.base import Exchange
from rlbf_jax.critics.judges.grammar_judge import GrammarJudge
from rlbf_jax.data.worlds.toy_world import ToyWorld
from rlbf_jax.directives import NEVER
from rlbf_jax.errors import InputError
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.sampling.request import Generation, Knobs
from rlbf_jax.tokenizers import train_tokenizer

WORLD = ToyWorld()
CONFIG = OptimizedConfig(GcgConfig(steps=5, search_width=16), control_weight=0.25, window=3)


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    documents = [WORLD.document(rng) for _ in range(200)]
    texts = [text for d in documents for text in (d.prompt.text, d.response)]
    return train_tokenizer(texts, 500, WORLD.categories, 8)


@pytest.fixture
def goals(tokenizer, monkeypatch):
    """`goals(name)`: what an attack searches for and with which settings; searches find " now" at
    once."""

    def search(model, params, tokenizer, goals, config, **_):
        seen.extend((goal, config) for goal in goals)
        return [
            Found(g, (1,), g.prompt + " now", 1.0, 2.0, np.ones(1), np.ones((1, 1)), False, 0, 80)
            for g in goals
        ]

    def sample(requests):
        """Answers with ids 300, 301, ... up to `max_tokens`."""
        for request in requests:
            assert (
                request.knobs.temperature == 0
                and request.knobs.forbid_to == NEVER
                and request.knobs.forbid_from == 0
            )
        rows = [
            (r, np.asarray([*r.forced, *range(300, 300 + r.knobs.max_tokens - len(r.forced))]))
            for r in requests
        ]
        return [
            Generation(
                "", trace, (), np.zeros(len(trace)), (), np.zeros(1), len(r.forced), False, 0, r
            )
            for r, trace in rows
        ]

    def run(name, n=4, attacked=True):
        seen.clear()
        config = AttackConfig("development", "rl", Knobs(max_tokens=20))
        victim = Victim(ModelConfig(), {}, sample) if attacked else None
        scene = Scene(WORLD, tokenizer, np.random.default_rng(3), config, victim)
        made = attack_model(name, scene, n, CONFIG)
        return made, list(seen)

    seen: list = []
    run.sample = sample
    monkeypatch.setattr(optimized, "gcg", search)
    monkeypatch.setattr(optimized, "random_search", search)
    return run


def test_the_harmful_attacks_want_the_same_violations(goals, tokenizer):
    wanted = {}
    for name in ("gcg", "adaptive_gcg", "random_search"):
        made, seen = goals(name)
        wanted[name] = [(goal.prompt, goal.answer[slice(*goal.target)]) for goal, _ in seen]
        for (goal, _), attempt in zip(seen, (m.attempt for m in made), strict=True):
            assert (
                attempt.attack == name
                and attempt.prompt.harmful
                and attempt.prompt.text == goal.prompt
            )
            assert attempt.request.prompt == goal.prompt + " now" and attempt.request.forced == ()
            target = tokenizer.decode(goal.answer[slice(*goal.target)])
            assert asked_for(attempt.prompt.category, target)
    assert wanted["gcg"] == wanted["adaptive_gcg"] == wanted["random_search"]
    assert len({prompt for prompt, _ in wanted["gcg"]}) == 4


def asked_for(category: str, target: str) -> bool:
    """Whether a target holds one violation, of the category asked for, and ends with it."""
    (verdict,) = GrammarJudge(WORLD).judge([Exchange("", target, "")])
    return [(span.category, span.end) for span in verdict.spans if span.complete] == [
        (category, len(target))
    ]


def test_a_directive_counts_after_the_violation_and_costs_in_adaptive_gcg(goals):
    _, seen = goals("adaptive_gcg")
    for goal, config in seen:
        assert config.control_weight == 0.25 and goal.target[0] == 0
        assert goal.control == (goal.target[1], goal.target[1] + 3)
        assert goal.answer[slice(*goal.control)] == (300, 301, 302)
    assert {config.control_weight for _, config in goals("gcg")[1]} == {0.0}


def test_trigger_keeps_half_of_the_models_own_answer_and_rewards_a_directive_there(goals):
    made, seen = goals("trigger")
    for goal, config in seen:
        assert config.control_weight == -0.25
        assert (goal.target, goal.control) == ((0, 10), (10, 13)) and goal.answer == tuple(
            range(300, 313)
        )
    assert not any(m.attempt.prompt.harmful for m in made)


def test_random_search_has_the_budget_of_gcg(goals):
    _, seen = goals("random_search")
    assert {config.generations * config.neighbors for _, config in seen} == {5 * 16}


def test_mistakes_are_named(goals):
    with pytest.raises(InputError, match="unknown attack 'direct'"):
        goals("direct")
    with pytest.raises(InputError, match="rlbf attack RUN --attack gcg"):
        goals("gcg", attacked=False)
    with pytest.raises(ValueError, match="search.control_weight is set"):
        OptimizedConfig(dataclasses.replace(CONFIG.search, control_weight=1.0))


def test_searched_attacks_are_in_the_list_and_make_attempts_of_a_scene(goals, tokenizer):
    ranked = ("rank_prefilling", "rank_prefilling_plain")
    assert tuple(SEARCHED) == (*OPTIMIZED, *ranked) and not SEARCHED & DRAWN
    assert SEARCHED | DRAWN == set(ATTACKS)
    made, _ = goals("trigger")  # also gives the spec a search that finds at once
    config = AttackConfig("development", "rl", Knobs(max_tokens=20))
    rng = np.random.default_rng(3)
    with pytest.raises(InputError, match="there is none to attack"):
        ATTACKS["trigger"](WORLD, tokenizer, rng, 4, config)
    victim = Victim(ModelConfig(), {}, goals.sample)
    scene = Scene(WORLD, tokenizer, np.random.default_rng(3), config, victim)
    spec = ATTACKS["trigger"]
    found = [dataclasses.replace(m.attempt, search=m.found) for m in made]
    assert repr(spec.make(scene, 4, CONFIG)) == repr(found) and spec.benign
