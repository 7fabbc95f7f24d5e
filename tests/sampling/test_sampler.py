"""The sampler around its law: rows alone and together, limits, knobs,
compilations, errors, reading."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbf_jax.directives import Semantics
from rlbf_jax.errors import InputError
from rlbf_jax.evaluation.metrics import take_apart
from rlbf_jax.models import transformer
from rlbf_jax.sampling import loop, scoring
from rlbf_jax.sampling.batching import control_bias_of
from rlbf_jax.sampling.distribution import legal_logits
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig
from rlbf_jax.sampling.scoring import hidden_states, pack_traces, score
from tests.fakes import LetterTokenizer, random_model

TOKENIZER = LetterTokenizer()
RULE = TOKENIZER.controls.rule()
MODEL, PARAMS = random_model(TOKENIZER)
CONFIG = SamplerConfig(Semantics.REWIND, batch_size=8, min_context=32, min_room=32)
SAMPLER = Sampler(MODEL, TOKENIZER, CONFIG)
BUSY = Knobs(max_tokens=32, budget=4, control_bias={"categories": 2.0})
CATEGORY, BACK_2 = RULE.category_id("two"), RULE.backtrack_id(2)
REQUESTS = [
    Request("a", (), BUSY, 0),
    Request("what is it.", tuple(TOKENIZER.encode("sure x")), BUSY, 1),
    Request("tell me", (), dataclasses.replace(BUSY, temperature=0.6, top_p=0.8), 2),
    Request("z", (*TOKENIZER.encode("bad"), CATEGORY, BACK_2), BUSY, 3),
    Request("no", (), dataclasses.replace(BUSY, max_tokens=9, budget=1), 4),
    Request("the quick brown fox", (), dataclasses.replace(BUSY, temperature=0.0), 5),
    Request("hello", (), dataclasses.replace(BUSY, grammar=False, top_k=20), 6),
    Request("tell me", (), dataclasses.replace(BUSY, min_p=0.1), 7),
]


@functools.cache
def together():
    return SAMPLER(PARAMS, REQUESTS, 0)


def same(one, other, tolerance=None):
    np.testing.assert_array_equal(one.trace, other.trace)
    if tolerance is None:
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
    else:
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=tolerance)
    assert (one.text, one.edits, one.visible, one.finished) == (
        other.text,
        other.edits,
        other.visible,
        other.finished,
    )


def drawn_ids(generation):
    return generation.trace[generation.num_forced :].tolist()


def controls(ids):
    return [i for i in ids if RULE.is_control(int(i))]


# Rows -------------------------------------------------------------------------------------------


@given(st.permutations(range(8)), st.integers(1, 8))
@settings(max_examples=8)
def test_a_row_is_bit_equal_whatever_its_neighbors_slot_and_order(order, count):
    order = order[:count]
    for row, g in zip(
        order, SAMPLER(PARAMS, [REQUESTS[i] for i in order], jax.random.key(0)), strict=True
    ):
        same(g, together()[row])
    assert sum(len(g.edits) for g in together()) > 5


def test_a_row_is_bit_equal_beside_strangers():
    strangers = [
        Request("q" * n, tuple(TOKENIZER.encode("abc"[: n % 4])), Knobs(max_tokens=3 * n))
        for n in range(1, 8)
    ]
    for slot, request in enumerate(REQUESTS):
        mixed = [*strangers[:slot], request, *strangers[slot:]]
        same(SAMPLER(PARAMS, mixed, 0)[slot], together()[slot])


def test_ids_default_to_the_index_over_batches_and_keys_matter():
    plain = [dataclasses.replace(REQUESTS[0], id=None)] * 10
    generations = SAMPLER(PARAMS, plain, 0)
    for index in (0, 7, 8, 9):
        (alone,) = SAMPLER(PARAMS, [dataclasses.replace(plain[0], id=index)], 0)
        same(alone, generations[index])
    assert len({tuple(g.trace) for g in generations}) == 10
    assert SAMPLER(PARAMS, plain[:1], 1)[0].trace.tolist() != generations[0].trace.tolist()
    assert SAMPLER(PARAMS, [], 0) == []


def test_a_batch_of_one_and_one_hot_writes_draw_the_same():
    alone = Sampler(MODEL, TOKENIZER, dataclasses.replace(CONFIG, batch_size=1))
    for request, g in zip(REQUESTS, together(), strict=True):
        same(alone(PARAMS, [request], 0)[0], g, 1e-4)
    one_hot = Sampler(MODEL, TOKENIZER, dataclasses.replace(CONFIG, one_hot_writes=True))
    for one, g in zip(one_hot(PARAMS, REQUESTS, 0), together(), strict=True):
        same(one, g, 1e-4)


def test_prompts_are_read_whole_at_any_length():
    prompts = ["", "a", "abcdefghijklmnopqrstuvwxyz", "tell"]
    knobs = Knobs(max_tokens=6, temperature=0.0)
    generations = SAMPLER(PARAMS, [Request(p, (), knobs) for p in prompts], 0)
    for prompt, g in zip(prompts, generations, strict=True):
        assert g.prompt_ids.tolist() == TOKENIZER.encode_prompt(prompt)
    check_greedy(generations)


# Limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forced", [(), tuple(TOKENIZER.encode("abcd")), (*TOKENIZER.encode("ab"), CATEGORY)]
)
def test_one_new_id_and_none(forced):
    for extra in (0, 1):
        knobs = dataclasses.replace(BUSY, max_tokens=len(forced) + extra, stop_ids=())
        (g,) = SAMPLER(PARAMS, [Request("hi", forced, knobs)], 0)
        assert g.trace[: len(forced)].tolist() == list(forced)
        assert len(g.trace) == len(forced) + extra
        assert (
            np.isnan(g.logprobs[: len(forced)]).all()
            and np.isfinite(g.logprobs[len(forced) :]).all()
        )
        assert not g.finished
        # No room for a directive, but an open category must be closed.
        assert len(controls(drawn_ids(g))) == (extra and CATEGORY in forced)


def test_budget_zero_never_starts_a_directive():
    knobs = dataclasses.replace(
        BUSY, budget=0, control_bias={"categories": 50.0, "retractions": 50.0}
    )
    generations = SAMPLER(PARAMS, [Request(r.prompt, (), knobs) for r in REQUESTS], 0)
    assert not any(controls(g.trace) for g in generations)
    for grammar in (True, False):
        one = dataclasses.replace(knobs, budget=1, grammar=grammar)
        assert all(
            len(g.edits) == 1 or (len(g.edits) == 0 and g.malformed == 1)
            for g in SAMPLER(PARAMS, [Request(r.prompt, (), one) for r in REQUESTS], 0)
        )


def test_stop_ids_are_per_row():
    letters = tuple(TOKENIZER.encode("abcdefghijklmnopqrstuvwxyz"))
    e = TOKENIZER.encode("e")[0]
    stops = [letters, (), None, (e,)]
    knobs = Knobs(max_tokens=32, budget=0, control_bias={"categories": -1e9})
    requests = [Request("tell me", (), dataclasses.replace(knobs, stop_ids=s)) for s in stops * 2]
    ends = 0
    for g in SAMPLER(PARAMS, requests, 3):
        ids = g.request.knobs.stop_ids
        expected = (TOKENIZER.eos_id,) if ids is None else ids
        assert not set(g.trace[:-1].tolist()) & set(expected)
        assert g.finished == (int(g.trace[-1]) in expected)
        assert len(g.visible) == len(g.trace) - g.finished
        assert g.finished or len(g.trace) == 32
        ends += g.finished
    assert ends >= 3


def test_forced_ids_may_end_a_response():
    (g,) = SAMPLER(PARAMS, [Request("a", (*TOKENIZER.encode("hi"), TOKENIZER.eos_id), BUSY)], 0)
    assert g.finished and g.text == "hi" and drawn_ids(g) == []


@pytest.mark.parametrize("stop", ["category", "retraction", "forced"])
def test_a_stop_at_a_control_id_keeps_the_text(stop):
    """No visible id goes for an end that nobody sees, and the control id stays one."""
    ids = range(RULE.first_id, RULE.first_retraction)
    if stop != "category":
        ids = range(RULE.first_retraction, RULE.end_id)
    knobs = dataclasses.replace(BUSY, control_bias={"categories": 9.0}, stop_ids=tuple(ids))
    forced = (*TOKENIZER.encode("hello "), CATEGORY, BACK_2)
    forced = {"category": forced[:-2], "retraction": forced[:-1], "forced": forced}[stop]
    (g,) = SAMPLER(PARAMS, [Request("a", forced, knobs)], 0)
    assert g.finished and int(g.trace[-1]) in ids
    content = [int(i) for i in g.trace if not RULE.is_control(int(i))]
    kept = g.edits[-1].kept if g.edits else len(content)
    assert list(g.visible) == content[:kept] and g.text == TOKENIZER.decode(content[:kept])
    assert g.malformed == (stop == "category")
    kinds = [item.kind for item in take_apart(g, TOKENIZER, RULE).items]
    assert kinds[-1] == ("category" if stop == "category" else "retraction")
    assert "end" not in kinds


def test_forced_directives_are_applied():
    greedy = dataclasses.replace(BUSY, temperature=0.0)
    forced = (*TOKENIZER.encode("abc"), CATEGORY, BACK_2, *TOKENIZER.encode("xy"))
    edited, plain = SAMPLER(
        PARAMS, [Request("z", f, greedy) for f in (forced, tuple(TOKENIZER.encode("axy")))], 0
    )
    assert edited.edits[0].removed == tuple(TOKENIZER.encode("bc"))
    assert (edited.edits[0].index, edited.edits[0].category, edited.edits[0].requested) == (
        4,
        "two",
        2,
    )
    # Two ids after a retraction nothing tells the two apart but how many ids were emitted.
    assert drawn_ids(edited)[0] == drawn_ids(plain)[0]
    assert edited.logprobs[len(forced)] == pytest.approx(plain.logprobs[3], abs=1e-4)
    keep = Sampler(MODEL, TOKENIZER, dataclasses.replace(CONFIG, semantics=Semantics.KEEP))
    kept = keep(PARAMS, [Request("z", forced, greedy)], 0)[0]
    assert kept.edits[0] == edited.edits[0]
    assert abs(kept.logprobs[len(forced)] - plain.logprobs[3]) > 1e-2


# Knobs ------------------------------------------------------------------------------------------


@jax.jit
def teacher_forced_logits(params, traces):
    """Raw and legal logits of every query of a whole pass, at temperature 1."""
    hidden, where = hidden_states(MODEL, params, RULE, traces, Semantics.REWIND)
    raw = transformer.unembed(MODEL, params, hidden)
    limits = jax.tree.map(lambda x: x[:, None], traces.limits)
    before = jax.tree.map(lambda x: jnp.roll(x, -1, axis=1), where.before)
    legal = RULE.legal(before, limits)
    ones = jnp.ones(traces.tokens.shape)
    return raw, legal_logits(RULE, raw, legal, traces.control_bias[:, None], ones)


def check_greedy(generations):
    """Every drawn id is the likeliest of a whole pass over its trace."""
    logits = np.asarray(teacher_forced_logits(PARAMS, pack_traces(generations, RULE, 80))[1])
    for row, g in enumerate(generations):
        for index in range(g.num_forced, len(g.trace)):
            query = logits[row, len(g.prompt_ids) + index - 1]
            assert query[g.trace[index]] >= query.max() - 1e-4


def test_temperature_zero_is_the_argmax_of_a_whole_pass():
    def run(**fields):
        knobs = dataclasses.replace(BUSY, **fields)
        return SAMPLER(PARAMS, [dataclasses.replace(r, knobs=knobs) for r in REQUESTS], 4)

    greedy = run(temperature=0.0)
    check_greedy(greedy)
    assert sum(len(g.edits) for g in greedy) > 5
    for one, g in zip(run(top_k=1), greedy, strict=True):
        same(one, g)
    for cold, likeliest, g in zip(run(temperature=1e-4), run(min_p=1.0), greedy, strict=True):
        np.testing.assert_array_equal(cold.trace, g.trace)
        np.testing.assert_array_equal(likeliest.trace, g.trace)
    assert any(a.trace.tolist() != b.trace.tolist() for a, b in zip(run(), greedy, strict=True))


def test_control_bias_by_name():
    knobs = [
        Knobs(control_bias={"categories": 1.0, "one": 2.0, "[CATEGORY_TWO]": -4.0}),
        Knobs(control_bias={"retractions": 0.5, "[BACKTRACK_BY_6]": 1.0}),
        Knobs(),
    ]
    np.testing.assert_array_equal(
        control_bias_of(RULE, knobs),
        [[3, -3, 0, 0, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 1.5], [0] * 8],
    )
    with pytest.raises(InputError, match="unknown name 'three'"):
        SAMPLER(PARAMS, [Request("a", (), Knobs(control_bias={"three": 1.0}))])


def test_control_bias_decides_what_is_drawn():
    bias = {"categories": 6.0, "one": -1e9, "retractions": -1e9, "[BACKTRACK_BY_5]": 1e9}
    knobs = Knobs(max_tokens=32, control_bias=bias)
    generations = SAMPLER(PARAMS, [Request(r.prompt, (), knobs) for r in REQUESTS], 0)
    edits = [e for g in generations for e in g.edits]
    assert len(edits) > 10
    assert {(e.category, e.requested) for e in edits} == {("two", 5)}
    silent = Knobs(max_tokens=32, control_bias={"categories": -1e9})
    assert not any(
        controls(g.trace)
        for g in SAMPLER(PARAMS, [Request(r.prompt, (), silent) for r in REQUESTS], 0)
    )


def test_template_ids_are_never_drawn():
    never = list(RULE.never)
    loud = PARAMS | {"unembedding": PARAMS["unembedding"].at[jnp.asarray(never)].multiply(20.0)}
    generations = SAMPLER(loud, [Request(r.prompt, (), BUSY, r.id) for r in REQUESTS], 0)
    traces = pack_traces(generations, RULE, 80)
    raw = np.asarray(teacher_forced_logits(loud, traces)[0]).argmax(-1)[
        np.asarray(traces.in_response)
    ]
    # The model wants little else.
    assert np.isin(raw, never).mean() > 0.5
    assert not any(np.isin(g.trace, never).any() for g in generations)


def test_a_sweep_of_49_settings_compiles_once():
    # A room of its own, so that no other test has compiled this shape before.
    sampler = Sampler(MODEL, TOKENIZER, dataclasses.replace(CONFIG, min_room=11))
    knobs = [
        Knobs(
            temperature=(0.0, 0.3, 0.5, 0.7, 1.0, 1.3, 2.0)[i % 7],
            top_p=(1.0, 0.9, 0.5, 0.2, 0.95, 1.0, 1.0)[i // 7],
            top_k=(0, 5, 0)[i % 3],
            min_p=0.05 * (i % 2),
            control_bias={"categories": float(i % 4)},
            budget=i % 5,
            forbid_from=(0, 3, 100)[i % 3],
            forbid_to=5,
            grammar=i % 2 == 0,
            max_tokens=5 + i % 6,
            stop_ids=((2,), None)[i % 2],
        )
        for i in range(49)
    ]
    before = loop.go_on._cache_size()
    generations = sampler(PARAMS, [Request("tell me", (), k) for k in knobs], 0)
    assert loop.go_on._cache_size() == before + 1
    assert len({tuple(g.trace) for g in generations}) > 30
    sampler(
        PARAMS,
        [
            Request("no", (7, 8), dataclasses.replace(k, budget=9, temperature=0.9))
            for k in knobs[:9]
        ],
        5,
    )
    assert loop.go_on._cache_size() == before + 1


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (Request("a", (5, 6, 7), Knobs(max_tokens=2)), "3 forced ids exceed max_tokens = 2"),
        (Request("a", (5, -1)), "forced ids must lie in 0"),
        (Request("a", (MODEL.vocab_size,)), "forced ids must lie in 0"),
        (Request("a", (), Knobs(temperature=-0.1)), "temperature is -0.1"),
        (Request("a", (), Knobs(temperature=float("nan"))), "temperature is nan"),
        (Request("a", (), Knobs(top_p=0.0)), "top_p is 0.0"),
        (Request("a", (), Knobs(top_p=1.1)), "top_p is 1.1"),
        (Request("a", (), Knobs(min_p=-0.1)), "min_p is -0.1"),
        (Request("a", (), Knobs(min_p=1.5)), "min_p is 1.5"),
        (Request("a", (), Knobs(top_k=-1)), "top_k is -1"),
    ],
)
def test_errors_name_the_field(request_, match):
    with pytest.raises(ValueError, match=match):
        SAMPLER(PARAMS, [REQUESTS[0], request_])


def test_a_model_smaller_than_its_tokenizer_is_refused():
    with pytest.raises(ValueError, match="the model has 10 ids"):
        Sampler(dataclasses.replace(MODEL, vocab_size=10), TOKENIZER)


# Reading ----------------------------------------------------------------------------------------


def test_scores_of_drawn_ids_alone_are_the_same():
    traces = pack_traces(together(), RULE, 80)
    read = jax.jit(
        lambda t, drawn: score(MODEL, PARAMS, RULE, t, Semantics.REWIND, drawn), static_argnums=1
    )
    whole = read(traces, None)
    most = int((traces.length - traces.prompt_length - traces.num_forced).max())
    for count in (most, 500):
        part = read(traces, count)
        action = np.asarray(traces.is_action)
        for full, some in zip(whole, part, strict=True):
            np.testing.assert_allclose(
                np.asarray(some)[action], np.asarray(full)[action], atol=1e-5
            )
            assert not np.asarray(some)[~action].any()
    assert np.asarray(whole.logprobs)[np.asarray(traces.in_response & ~traces.is_action)].any()


def test_scoring_in_time_chunks_changes_neither_values_nor_gradients(monkeypatch):
    traces = pack_traces(together(), RULE, 80)
    weights = jnp.cos(jnp.arange(80.0))

    def read(params):
        scores = score(MODEL, params, RULE, traces, Semantics.REWIND)
        drawn = jnp.where(traces.is_action, scores.logprobs + 0.3 * scores.entropy, 0.0)
        return jnp.sum(drawn * weights), scores

    run = functools.partial(jax.value_and_grad, has_aux=True)
    (_, whole), gradient = jax.jit(run(lambda p: read(p)))(PARAMS)
    # Three of the 79 columns at a time: the last chunk is padded.
    monkeypatch.setattr(scoring, "ids_at_once", lambda vocab_size: 8 * 3)
    (_, pieces), other = jax.jit(run(lambda p: read(p)))(PARAMS)
    action = np.asarray(traces.is_action)
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(np.asarray(a)[action], np.asarray(b)[action], atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(a).max() + 1)),
        gradient,
        other,
    )


@pytest.mark.parametrize("semantics", list(Semantics))
def test_answers_up_to_the_last_learned_position_are_those_of_a_loose_bucket(semantics):
    """The table's rows beyond the text are padding's alone:
    45 positions (a bucket that is cut), and the same in a table of 64 with other rows behind,
    give the same ids and log-probabilities; scoring agrees."""
    tokenizer = LetterTokenizer()
    tight, params = random_model(
        tokenizer, learned_positions=True, max_positions=45, norm="layer", gated_mlp=False
    )
    loose = dataclasses.replace(tight, max_positions=64)
    more = jax.random.normal(jax.random.key(9), (19, tight.width))
    wide = params | {"position_embedding": jnp.concatenate([params["position_embedding"], more])}
    knobs = Knobs(max_tokens=12, budget=3, control_bias={"categories": 2.0}, stop_ids=())
    requests = [
        Request("tell me all about the fox and ab"[: 30 - 3 * i], (7,) * i, knobs) for i in range(4)
    ]
    assert max(len(tokenizer.encode_prompt(r.prompt)) for r in requests) + knobs.max_tokens == 45
    shapes = SamplerConfig(semantics, batch_size=4, min_context=8, min_room=8)
    found = [
        Sampler(c, tokenizer, shapes)(p, requests, 3) for c, p in ((tight, params), (loose, wide))
    ]
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a.trace, b.trace)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        assert np.isfinite(a.logprobs[a.num_forced :]).all()
    assert (
        sum(len(g.edits) for g in found[0]) > 2
        and max(len(g.prompt_ids) + len(g.trace) for g in found[0]) == 45
    )
    traces = pack_traces(found[0], tokenizer.controls.rule(), 45)
    read = np.asarray(score(tight, params, tokenizer.controls.rule(), traces, semantics).logprobs)
    for row, g in enumerate(found[0]):
        drawn = slice(len(g.prompt_ids) + g.num_forced, len(g.prompt_ids) + len(g.trace))
        np.testing.assert_allclose(read[row, drawn], g.logprobs[g.num_forced :], atol=1e-4)
