"""What answers: sampling and scoring by one object, and the door of the room."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from rlbf_jax import sampling
from rlbf_jax.directives import Semantics
from rlbf_jax.errors import InputError
from rlbf_jax.sampling import (
    Contrast,
    Knobs,
    LinearMix,
    Policy,
    Request,
    SamplerConfig,
    Single,
)
from tests.fakes import LetterTokenizer, random_model

TOKENIZER = LetterTokenizer()
CONFIG, PARAMS = random_model(TOKENIZER, num_layers=1)
POLICY = Policy(
    Single(CONFIG), PARAMS, TOKENIZER, TOKENIZER.controls.rule(), Semantics.REWIND, "tiny"
)
BUSY = Knobs(max_tokens=24, control_bias={"categories": 2.0}, temperature=0.8)
CATEGORY, BACK_2 = (
    TOKENIZER.controls.rule().category_id("two"),
    TOKENIZER.controls.rule().backtrack_id(2),
)
FORCED = Request("hello", (*TOKENIZER.encode("bad"), CATEGORY, BACK_2), BUSY)


@pytest.mark.parametrize("semantics", list(Semantics))
def test_what_is_scored_was_recorded(semantics):
    policy = POLICY.replace(semantics=semantics)
    generations = policy.sample(["tell me", "a", FORCED, "z", "no"], seed=3, knobs=BUSY)
    for g, logprobs in zip(generations, policy.score(generations), strict=True):
        np.testing.assert_allclose(logprobs, g.logprobs, atol=1e-4, equal_nan=True)
        assert logprobs.dtype == np.float32 and len(logprobs) == len(g.trace)
    assert np.isnan(generations[2].logprobs[:5]).all() and generations[2].edits[0].index == 4
    assert sum(len(g.edits) for g in generations) > 4
    # Read under the other semantics, what follows a retraction is another distribution.
    other = next(s for s in Semantics if s is not semantics)
    wrong = policy.replace(semantics=other).score(generations)
    pairs = zip(wrong, generations, strict=True)
    assert max(np.nanmax(np.abs(read - g.logprobs)) for read, g in pairs) > 0.1


def test_what_a_contrast_samples_it_scores():
    program = Contrast((CONFIG, CONFIG), LinearMix((1.5, -0.5)))
    _, others = random_model(TOKENIZER, 5, num_layers=1)
    policy = POLICY.replace(program=program, params=(PARAMS, others), name="contrast")
    generations = policy.sample(["tell me", FORCED], knobs=BUSY)
    for g, logprobs in zip(generations, policy.score(generations), strict=True):
        np.testing.assert_allclose(logprobs, g.logprobs, atol=1e-4, equal_nan=True)


def test_nothing_and_one():
    assert POLICY.sample([]) == [] and POLICY.score([]) == []
    (one,) = POLICY.sample(["a"], seed=1, knobs=BUSY)
    (logprobs,) = POLICY.score([one])
    np.testing.assert_allclose(logprobs, one.logprobs, atol=1e-4)
    # Nothing drawn, nothing scored but NaN.
    (forced,) = POLICY.sample([dataclasses.replace(FORCED, knobs=Knobs(max_tokens=5))])
    assert np.isnan(POLICY.score([forced])[0]).all() and len(forced.trace) == 5
    with pytest.raises(InputError, match="top_k is -1"):
        POLICY.sample(["a"], knobs=Knobs(top_k=-1))


def test_batches_of_a_longer_list(monkeypatch):
    monkeypatch.setattr(sampling.policy, "ROWS", 2)
    knobs = Knobs(max_tokens=6)
    generations = POLICY.sample(["a", "tell me", "z"], knobs=knobs)
    assert [g.request.prompt for g in generations] == ["a", "tell me", "z"]
    for g, logprobs in zip(generations, POLICY.score(generations), strict=True):
        np.testing.assert_allclose(logprobs, g.logprobs, atol=1e-4)


def test_the_policy_decides_rule_and_semantics():
    reset = LetterTokenizer(kind="reset").rule
    policy = POLICY.replace(semantics=Semantics.KEEP, rule=reset)
    sampler = policy.sampler(SamplerConfig(Semantics.REWIND, batch_size=3))
    assert sampler.config == SamplerConfig(Semantics.KEEP, batch_size=3)
    assert sampler.rule is reset and sampler.program is policy.program
    assert policy.sampler().config.semantics is Semantics.KEEP and POLICY.rule is not reset
    with pytest.raises(TypeError, match="rules"):
        POLICY.replace(rules=reset)


def test_the_door_opens_lazily():
    code = (
        "import sys, rlbf_jax.sampling as s\n"
        "assert 'jax' not in sys.modules, 'jax'\n"
        "assert set(s.__all__) <= set(dir(s))\n"
        "from rlbf_jax.sampling import Request\n"
        "assert 'rlbf_jax.sampling.sampler' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in sampling.__all__:
        assert getattr(sampling, name).__module__.startswith("rlbf_jax.sampling.")
    with pytest.raises(AttributeError, match="has no attribute 'Sampling'"):
        _ = sampling.Sampling
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from rlbf_jax.sampling import nothing  # noqa: F401
