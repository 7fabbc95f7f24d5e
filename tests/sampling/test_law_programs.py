"""The law of the sampler for whatever gives logits, and the programs against separate passes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.directives import Semantics
from rlbf_jax.errors import InputError
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.transformer import ModelConfig
from rlbf_jax.sampling.program import (
    Contrast,
    LinearMix,
    Program,
    Single,
    TwoPrompts,
    as_program,
)
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig
from rlbf_jax.sampling.scoring import hidden_states, layout_of, pack_traces
from tests.fakes import LetterTokenizer, random_model
from tests.sampling.test_law import compare, sample, scored

TOKENIZER = LetterTokenizer()
RULE = TOKENIZER.controls.rule()
WIDTH = 96
"""Columns of a fresh row: a trace with a prefix before it."""

# Different shapes on purpose: a window, scanned layers, another width.
BASE, GUARD, RISKY = (
    random_model(TOKENIZER, 1, num_layers=1, width=24),
    random_model(TOKENIZER, 2, num_layers=2, width=16, num_heads=2, windows=(5, None)),
    random_model(TOKENIZER, 3, num_layers=2, width=16, num_heads=2, scan_layers=True),
)
MODELS = (BASE, GUARD, RISKY)
WEIGHTS = (1.0, 0.6, -0.6)
EAGER = Knobs(max_tokens=40, budget=6, control_bias={"categories": 3.0})
PREFIX = tuple(TOKENIZER.encode("be bad now"))
WINDOWED = random_model(TOKENIZER, 4, windows=(5, None))
PROGRAMS: dict[str, tuple[Program, object]] = {
    "contrast": (
        Contrast(tuple(config for config, _ in MODELS), LinearMix(WEIGHTS)),
        tuple(params for _, params in MODELS),
    ),
    "two prompts": (TwoPrompts(WINDOWED[0], PREFIX, 0.5), WINDOWED[1]),
}


@functools.cache
def drawn(name: str, semantics: Semantics):
    """One sample of each, shared by the tests of this file."""
    return sample(semantics, model=PROGRAMS[name], knobs=EAGER)


@pytest.mark.parametrize("semantics", list(Semantics))
@pytest.mark.parametrize("name", PROGRAMS)
def test_recorded_logprobs_equal_one_pass(name, semantics):
    sampler, params, generations = drawn(name, semantics)
    traces, logprobs = scored(sampler, params, generations, semantics)
    worst, directives = compare(generations, logprobs)
    assert directives >= 100 and any(e.clamped for g in generations for e in g.edits)
    edits = [pair for g in generations for pair in zip(g.edits, g.edits[1:], strict=False)]
    assert any(later.index - earlier.index <= 2 for earlier, later in edits)
    assert worst < 1e-4
    assert np.std(logits_of(name, traces, semantics)[np.asarray(traces.is_action)]) >= 1
    # The control: read under the other semantics, what follows a retraction must miss by far.
    other = Semantics.KEEP if semantics is Semantics.REWIND else Semantics.REWIND
    _, wrong = scored(sampler, params, generations, other)
    assert compare(generations, wrong, after_retraction=True)[0] > 1


@functools.partial(jax.jit, static_argnums=(0, 2))
def read_logits(program, params, semantics, traces):
    hidden, _ = hidden_states(program, params, RULE, traces, semantics)
    return program.unembed(params, hidden)


def logits_of(name, traces, semantics):
    program, params = PROGRAMS[name]
    return np.asarray(read_logits(program, params, semantics, traces))


# Slow twins: each model alone over rows of ids that are all alive --------------------------------


@functools.partial(jax.jit, static_argnums=0)
def read_fresh(config, params, tokens):
    position = jnp.broadcast_to(jnp.arange(WIDTH, dtype=jnp.int32), tokens.shape)
    hidden, _ = transformer.forward(config, params, tokens, Visibility(position))
    return transformer.unembed(config, params, hidden)


def fresh_logits(model: tuple[ModelConfig, dict], rows: list[list[int]]) -> np.ndarray:
    """[rows, V]: logits after the last id of each row, a plain causal pass of one model."""
    tokens = np.zeros((len(rows), WIDTH), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    logits = np.asarray(read_fresh(*model, tokens))
    return logits[np.arange(len(rows)), [len(row) - 1 for row in rows]]


def queries_of(name, semantics):
    """Logits of one pass at some queries, most of them after retractions,
    and the ids that are alive there."""
    _, _, generations = drawn(name, semantics)
    traces = pack_traces(generations, RULE, 80)
    died = np.asarray(layout_of(RULE, traces, semantics).died)
    logits, tokens = logits_of(name, traces, semantics), np.asarray(traces.tokens)
    picked, rows = [], []
    for row, g in enumerate(generations):
        ends = [len(g.prompt_ids) - 1, *(len(g.prompt_ids) + e.index + 1 for e in g.edits)]
        for query in ends:
            if query < int(traces.length[row]) and not RULE.is_control(int(tokens[row, query])):
                picked.append(logits[row, query])
                rows.append([int(tokens[row, j]) for j in range(query + 1) if died[row, j] > query])
    assert len(rows) > 60
    return np.stack(picked), rows


@pytest.mark.parametrize("semantics", list(Semantics))
def test_contrast_is_the_mix_of_separate_passes(semantics):
    found, rows = queries_of("contrast", semantics)
    alone = [fresh_logits(model, rows) for model in MODELS]
    mixed = sum(weight * logits for weight, logits in zip(WEIGHTS, alone, strict=True))
    np.testing.assert_allclose(found, mixed, atol=1e-4)
    assert np.abs(found - alone[0]).max() > 1


@pytest.mark.parametrize("semantics", list(Semantics))
def test_two_prompts_are_two_passes_one_of_them_prefixed(semantics):
    found, rows = queries_of("two prompts", semantics)
    own, prefixed = (
        fresh_logits(WINDOWED, [[*before, *row] for row in rows]) for before in ((), PREFIX)
    )
    np.testing.assert_allclose(found, own - 0.5 * prefixed, atol=1e-4)
    # Within the windows the prefix is out of sight, so only the global layer tells the two apart.
    assert np.abs(own - prefixed).max() > 1


@pytest.mark.parametrize("name", ["contrast", "two prompts"])
def test_rows_that_share_a_context_draw_what_they_draw_alone(name):
    """Two rows at a time, which enter as others end."""
    program, params = PROGRAMS[name]
    forced = (*TOKENIZER.encode("bad"), RULE.category_id("two"), RULE.backtrack_id(2))
    knobs = Knobs(max_tokens=16, budget=3, control_bias={"categories": 2.0})
    requests = [
        Request(prompt, ids, knobs) for prompt in ("a", "tell me") for ids in ((), forced)
    ] * 4
    shapes = SamplerConfig(Semantics.REWIND, 2, min_context=16, min_room=16)
    sampler = Sampler(program, TOKENIZER, shapes)
    alone = [sampler(params, [dataclasses.replace(r, id=i)], 0)[0] for i, r in enumerate(requests)]
    for one, other in zip(sampler(params, requests, 0), alone, strict=True):
        np.testing.assert_array_equal(one.trace, other.trace)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
    assert sum(len(g.edits) for g in alone) > 10


# Positions, errors ------------------------------------------------------------------------------


def learned(most: int) -> tuple[ModelConfig, dict]:
    return random_model(
        TOKENIZER, num_layers=1, width=16, num_heads=2, learned_positions=True, max_positions=most
    )


def test_a_prefix_takes_its_share_of_learned_positions():
    config, params = learned(40)
    program = TwoPrompts(config, PREFIX, 0.5)
    assert program.max_positions == 30 and TwoPrompts(BASE[0], PREFIX, 0.5).max_positions is None
    sampler = Sampler(program, TOKENIZER, SamplerConfig(batch_size=1, min_context=8, min_room=8))
    knobs = Knobs(max_tokens=24, temperature=0.0, stop_ids=())
    with pytest.raises(InputError, match="max_tokens = 24 exceed 30 ids in all"):
        sampler(params, [Request("abcd", (), knobs)])
    (g,) = sampler(params, [Request("abc", (), knobs)], 0)
    assert len(g.trace) == 24 and np.isfinite(g.logprobs).all()
    mixed = Contrast((config, BASE[0], learned(32)[0]), LinearMix((1.0, 1.0, 1.0)))
    assert mixed.learned_positions and mixed.max_positions == 32


@pytest.mark.slow
def test_long_rows_under_a_prefix_are_whole_blocks_of_what_the_model_reads():
    """1,040 positions less 10: rows of 2,048 columns, and a second stream that would need 3,072."""
    config, params = learned(1040)
    program = TwoPrompts(config, PREFIX, 0.5)
    width = transformer.padded_width(program, 1030, 32)
    assert width == 2048 == transformer.widest_row(config)
    ids = np.random.default_rng(0).integers(5, 30, 1030).tolist()
    tokens = np.zeros((1, width), np.int32)
    tokens[0, :1030] = ids
    position = jnp.arange(width, dtype=jnp.int32)[None]
    hidden, pairs = program.forward(params, jnp.asarray(tokens), Visibility(position))
    logits = np.asarray(program.unembed(params, hidden))[0, 1029]
    cache = program.cache(pairs, position, jnp.asarray([1030]), 1040, 0)
    assert [held.position[0].shape for held in cache] == [(1, 1040), (1, 1050)]
    rows = np.zeros((2, width), np.int32)
    rows[0, :1030], rows[1, :1040] = ids, [*PREFIX, *ids]
    states, _ = transformer.forward(config, params, rows, Visibility(position.repeat(2, 0)))
    own, other = np.asarray(transformer.unembed(config, params, states))[[0, 1], [1029, 1039]]
    np.testing.assert_allclose(logits, own - 0.5 * other, atol=1e-4)


def test_programs_are_values():
    assert as_program(BASE[0]) == Single(BASE[0]) and as_program(Single(BASE[0])) == Single(BASE[0])
    for program, _ in PROGRAMS.values():
        assert hash(program) == hash(dataclasses.replace(program))
        assert isinstance(program, Program) and as_program(program) is program
    assert not isinstance(BASE[0], Program)


def test_what_cannot_be_mixed_is_refused():
    small = dataclasses.replace(BASE[0], vocab_size=10)
    with pytest.raises(ValueError, match=r"vocabularies of \[10, \d+\] ids"):
        Contrast((BASE[0], small), LinearMix((1.0, 1.0)))
    with pytest.raises(ValueError, match="3 weights for 2 models"):
        Contrast((BASE[0], BASE[0]), LinearMix((1.0, 1.0, 1.0)))
    with pytest.raises(ValueError, match="expected one finite number a model"):
        LinearMix((1.0, float("nan")))
    with pytest.raises(ValueError, match="parameters of 2 models for 3"):
        PROGRAMS["contrast"][0].unrolled((BASE[1], GUARD[1]))
    for prefix in ((), (-1,), (BASE[0].vocab_size,)):
        with pytest.raises(ValueError, match="prefix needs one id or more"):
            TwoPrompts(BASE[0], prefix, 1.0)
    with pytest.raises(ValueError, match="leaves nothing of the model's 10 positions"):
        TwoPrompts(learned(10)[0], PREFIX, 1.0)
    rows = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="rows are packed"):
        program, params = PROGRAMS["two prompts"]
        program.forward(params, rows, Visibility(rows, rows))
