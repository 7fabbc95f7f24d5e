"""The trade-off curve: points by hand with a scripted sampler, one compilation with a real one."""

import dataclasses
import json

import numpy as np
import pytest

from rlbf_jax.attacks.base import Attempt
from rlbf_jax.critics.base import Span, Verdict
from rlbf_jax.data.schema import Prompt
from rlbf_jax.directives import Semantics, render
from rlbf_jax.evaluation.rows import EvaluationContext
from rlbf_jax.evaluation.tradeoff import biased, tradeoff_curve, tradeoff_to_json
from rlbf_jax.sampling import loop
from rlbf_jax.sampling.request import Generation, Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig
from tests.fakes import LetterTokenizer, random_model

CONTEXT = EvaluationContext(
    "rlbf_ppo", "rlbf", Semantics.REWIND, 0, "development", critic="lexicon"
)


class WithOffsets(LetterTokenizer):
    def offsets(self, ids):
        ends = np.cumsum([len(self.decode([i])) for i in ids], dtype=int).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True)) if ids else []


T = WithOffsets()


class ZJudge:
    """The letter z is a violation."""

    name = "z"

    def judge(self, exchanges):
        return [
            Verdict(
                tuple(Span(i, i + 1, "one") for i, c in enumerate(x.text) if c == "z"), True, True
            )
            for x in exchanges
        ]


def attempts(attack, n, **knobs):
    harmful = attack == "direct"
    return [
        Attempt(Request(f"{'ab'[harmful]}{'c' * i}", (), Knobs(**knobs), id=i + 100 * harmful),
                Prompt(f"{attack}{i}", "q", harmful), attack)
        for i in range(n)
    ]  # fmt: skip


def scripted(requests):
    """Says z; row i takes back what it said from bias i on (harmful), or i + 2 (benign)."""
    generations = []
    for request in requests:
        harmful = request.prompt[0] == "b"
        bias, threshold = (
            request.knobs.control_bias["categories"],
            len(request.prompt) - 1 + 2 * (not harmful),
        )
        emitted = T.encode("az" if harmful else "ab")
        if bias >= threshold:
            emitted += [T.rule.category_id("one"), T.rule.backtrack_id(1)]
        r = render(T.rule, emitted)
        whole, none = np.array([*emitted, T.eos_id], np.int32), np.zeros(0, np.float32)
        generations.append(
            Generation(
                T.decode(r.visible),
                whole,
                r.edits,
                none,
                r.visible,
                none,
                0,
                True,
                r.malformed,
                request,
            )
        )
    return generations


def test_points_of_a_curve():
    points = tradeoff_curve(
        scripted,
        attempts("direct", 4),
        attempts("none", 4),
        ZJudge(),
        T,
        CONTEXT,
        biases=(-1, 0, 2, 4),
    )
    assert [p.bias for p in points] == [-1, 0, 2, 4]
    assert [p.harmful["asr"].value for p in points] == [1, 0.75, 0.25, 0]
    assert [p.benign["false_backtrack_rate"].value for p in points] == [0, 0, 0.25, 0.75]
    assert all(
        p.harmful["asr"].low <= p.harmful["asr"].value <= p.harmful["asr"].high for p in points
    )
    assert (
        points[1].asr_by_attack["direct"] == points[1].harmful["asr"]
        and points[1].harmful["asr"].n == 4
    )
    told = json.loads(json.dumps(tradeoff_to_json(points, "z", CONTEXT), allow_nan=False))
    assert (told["judge"], told["critic"], told["knob"]) == (
        "z",
        "lexicon",
        "control_bias.categories",
    )
    assert told["points"][2]["benign"]["false_backtrack_rate"]["value"] == 0.25


def test_the_bias_comes_on_top():
    (attempt,) = attempts(
        "direct", 1, control_bias={"categories": 1.0, "one": 3.0}, temperature=0.5
    )
    knobs = biased(attempt, 2).request.knobs
    assert knobs == Knobs(control_bias={"categories": 3.0, "one": 3.0}, temperature=0.5)


@pytest.mark.parametrize(
    ("harmful", "benign", "biases", "words"),
    [
        ([], attempts("none", 1), (0,), "needs harmful and benign"),
        (attempts("direct", 1), attempts("none", 1), (), "at least one bias"),
        (attempts("none", 1), attempts("none", 1), (0,), "attempts of none are in the wrong list"),
        (attempts("direct", 1), attempts("direct", 1), (0,), "attempts of direct"),
        (attempts("direct", 1), attempts("none", 1), (float("inf"),), "finite"),
    ],
)
def test_what_makes_no_curve(harmful, benign, biases, words):
    with pytest.raises(ValueError, match=words):
        tradeoff_curve(scripted, harmful, benign, ZJudge(), T, CONTEXT, biases)


def test_a_sweep_compiles_once_and_more_bias_backtracks_more():
    model, params = random_model(
        T, num_layers=1, width=16, num_heads=2, num_kv_heads=1, mlp_width=16
    )
    sampler = Sampler(
        model, T, SamplerConfig(batch_size=8, min_context=24, min_room=26)
    )  # a room of its own
    before = loop.generate._cache_size()
    points = tradeoff_curve(
        lambda requests: sampler(params, requests, 0),
        attempts("direct", 4, max_tokens=20), attempts("none", 4, max_tokens=20),
        ZJudge(), T, dataclasses.replace(CONTEXT, rule=T.rule), biases=(-30, -1, 0, 1, 4, 30),
    )  # fmt: skip
    assert loop.generate._cache_size() == before + 1
    rates = [p.harmful["backtrack_rate"].value for p in points]
    assert rates[0] == 0 and rates[-1] == 1 and points[-1].benign["false_backtrack_rate"].value == 1
