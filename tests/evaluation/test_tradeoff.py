"""The trade-off curve: points by hand with a scripted sampler, one compilation with a real one."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbf_jax.attacks.base import Attempt
from rlbf_jax.critics.base import Span, Verdict
from rlbf_jax.data.schema import Prompt
from rlbf_jax.directives import Semantics, render
from rlbf_jax.evaluation.rows import EvaluationContext
from rlbf_jax.evaluation.tradeoff import (
    Bench,
    CalibrationOptions,
    biased,
    calibrate,
    calibration_to_json,
    control_of,
    tradeoff_curve,
    tradeoff_to_json,
)
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
        Bench(scripted, ZJudge(), T, CONTEXT),
        attempts("direct", 4),
        attempts("none", 4),
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
        tradeoff_curve(Bench(scripted, ZJudge(), T, CONTEXT), harmful, benign, biases)


def test_a_sweep_compiles_once_and_more_bias_backtracks_more():
    model, params = random_model(
        T, num_layers=1, width=16, num_heads=2, num_kv_heads=1, mlp_width=16
    )
    sampler = Sampler(
        model, T, SamplerConfig(batch_size=8, min_context=24, min_room=26)
    )  # a room of its own
    before = loop.go_on._cache_size()
    points = tradeoff_curve(
        Bench(
            lambda requests: sampler(params, requests, 0),
            ZJudge(),
            T,
            dataclasses.replace(CONTEXT, rule=T.rule),
        ),
        attempts("direct", 4, max_tokens=20),
        attempts("none", 4, max_tokens=20),
        biases=(-30, -1, 0, 1, 4, 30),
    )
    assert loop.go_on._cache_size() == before + 1
    rates = [p.harmful["backtrack_rate"].value for p in points]
    assert rates[0] == 0 and rates[-1] == 1 and points[-1].benign["false_backtrack_rate"].value == 1


# Calibration ------------------------------------------------------------------------------------


def bench(thresholds, seen=None, **context):
    """Row i takes back from bias `thresholds[i]` on; a pair (from, to) means only below `to`."""

    def sample(requests):
        generations = []
        for request in requests:
            bias = request.knobs.control_bias["categories"]
            if seen is not None:
                seen.append((request.id, bias))
            threshold = thresholds[request.id % 100]
            least, end = threshold if isinstance(threshold, tuple) else (threshold, np.inf)
            bad = request.prompt[0] == "b"
            emitted = T.encode("az" if bad else "ab")
            if least <= bias < end:
                emitted += [T.rule.category_id("one"), T.rule.backtrack_id(1)]
            r = render(T.rule, emitted)
            whole, none = np.array([*emitted, T.eos_id], np.int32), np.zeros(0, np.float32)
            fields = (T.decode(r.visible), whole, r.edits, none, r.visible, none, 0, True)
            generations.append(Generation(*fields, r.malformed, request))
        return generations

    return Bench(sample, ZJudge(), T, dataclasses.replace(CONTEXT, **context))


def test_a_bias_is_found_that_takes_back_just_so_many():
    seen = []
    options = CalibrationOptions(most=0.25, tolerance=1 / 64)
    ours = bench([5.0, 3.1, 1.0, 9.0], seen)
    found = calibrate(ours, attempts("none", 4), attempts("direct", 4), options)
    # One of four may be taken back: from 1.0 on one is, from 3.1 on two are.
    assert 3.1 - 1 / 64 <= found.bias < 3.1 and (found.met, found.at_limit) == (True, False)
    assert found.taken_back.value == 0.25 and found.taken_back.n == 4
    assert found.taken_back.low < 0.25 < found.taken_back.high
    assert found.asr is not None and found.asr.value == 0.75
    assert found.monotone and found.knob == {"categories": found.bias}
    # Steps are paired: the same ids at each; harmful attempts are asked once.
    biases = [bias for id_, bias in seen if id_ == 0]
    assert [bias for id_, bias in seen if id_ == 3] == biases and len(set(biases)) == len(biases)
    assert {bias for id_, bias in seen if id_ >= 100} == {found.bias}
    assert found.tried == tuple(sorted(found.tried)) and len(found.tried) == len(biases)
    plain = json.loads(json.dumps(calibration_to_json(found, "z", CONTEXT, options)))
    assert (plain["bias"], plain["knob"]) == (found.bias, "control_bias.categories")
    assert plain["options"]["most"] == 0.25 and plain["monotone"] is True


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(-12, 12), min_size=1, max_size=6),
    st.floats(0, 0.99),
    st.sampled_from([1.0, 0.25]),
)
def test_calibration_agrees_with_sorting_the_thresholds(thresholds, most, tolerance):
    options = CalibrationOptions(most=most, tolerance=tolerance)
    found = calibrate(bench(thresholds), attempts("none", len(thresholds)), (), options)
    # At most k answers may be taken back, so the bias stays below the threshold of the next one.
    allowed = int(np.floor(most * len(thresholds) + 1e-12))
    while (allowed + 1) / len(thresholds) <= most:
        allowed += 1
    while allowed and allowed / len(thresholds) > most:
        allowed -= 1
    border = sorted(thresholds)[allowed]
    assert border - tolerance <= found.bias < border and found.met and found.asr is None
    assert found.monotone


def test_limits_of_a_calibration_are_said():
    never = calibrate(bench([99.0, 99.0]), attempts("none", 2))
    assert (never.bias, never.met, never.at_limit, len(never.tried)) == (16, True, True, 2)
    always = calibrate(bench([-99.0, 99.0]), attempts("none", 2), attempts("direct", 2))
    assert (always.bias, always.met, always.taken_back.value) == (-16, False, 0.5)
    assert always.asr is not None and always.asr.value == 0.5 and len(always.tried) == 1


def test_a_share_that_falls_again_is_said():
    twice = (0.0, 8.0)
    ours = bench([twice, twice, 10.0])
    found = calibrate(ours, attempts("none", 3), (), CalibrationOptions(most=0.0))
    assert found.met and found.taken_back.value == 0 and not found.monotone
    # Good enough, and not so within the tolerance above.
    shares = dict(found.tried)
    assert min(b for b, share in shares.items() if b > found.bias) - found.bias <= 0.125
    assert shares[min(b for b in shares if b > found.bias)] > 0


@pytest.mark.parametrize(
    ("benign", "harmful", "context", "words"),
    [
        ([], [], {}, "needs benign attempts"),
        (attempts("direct", 1), [], {}, "attempts of direct are in the wrong list"),
        (attempts("none", 1), attempts("none", 1), {}, "attempts of none"),
        (attempts("none", 1), [], {"data": "test"}, "of the test split"),
    ],
)
def test_what_cannot_be_calibrated(benign, harmful, context, words):
    with pytest.raises(ValueError, match=words):
        calibrate(bench([0.0], **context), benign, harmful)


def test_calibration_options_are_checked():
    for wrong in ({"most": 1.5}, {"tolerance": 0.0}, {"low": 3, "high": 3}):
        with pytest.raises(ValueError):
            CalibrationOptions(**wrong)


def test_the_bias_of_a_rule_without_categories_lies_on_its_retractions():
    tokenizer = WithOffsets(kind="reset")
    assert (
        control_of(tokenizer.controls.rule()) == "retractions"
        and control_of(T.rule) == "categories"
    )
    model, params = random_model(
        tokenizer, num_layers=1, width=16, num_heads=2, num_kv_heads=1, mlp_width=16
    )
    sampler = Sampler(model, tokenizer, SamplerConfig(batch_size=8, min_context=24, min_room=26))

    def sample(requests):
        return sampler(params, requests, 0)

    context = dataclasses.replace(CONTEXT, rule=tokenizer.controls.rule())
    benign, harmful = (attempts(name, 4, max_tokens=12, budget=1) for name in ("none", "direct"))
    ours = Bench(sample, ZJudge(), tokenizer, context)
    points = tradeoff_curve(ours, harmful, benign, biases=(-30, 30))
    rates = [point.benign["false_backtrack_rate"].value for point in points]
    assert rates == [0, 1]
    found = calibrate(ours, benign, (), CalibrationOptions(most=0.5, low=-30, high=30, tolerance=2))
    assert found.control == "retractions" and found.met and found.taken_back.value <= 0.5
    plain = tradeoff_to_json(points, "z", context, ours.control)
    assert plain["knob"] == "control_bias.retractions"
