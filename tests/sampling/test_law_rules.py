"""The law of the sampler for RESET and REPLACE; `test_law.py` has it for BACKTRACK."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.directives import Semantics, render
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig
from rlbf_jax.sampling.scoring import hidden_states, pack_traces, score
from tests.fakes import LetterTokenizer, random_model
from tests.sampling.test_law import BOTH, compare, sample, scored

KNOBS = {
    "reset": Knobs(max_tokens=40, budget=8, control_bias={"[RESET]": 2.5}),
    "replace": Knobs(max_tokens=40, budget=8, control_bias={"categories": 1.5, "[REPLACE]": 2.5}),
}


@pytest.mark.parametrize("semantics", BOTH)
@pytest.mark.parametrize("kind", KNOBS)
def test_recorded_logprobs_equal_one_pass(kind, semantics):
    """With a ring and a global layer; forced ids hold directives of every shape."""
    sampler, params, generations = sample(
        semantics, kind=kind, knobs=KNOBS[kind], rows=48, windows=(5, None)
    )
    assert sampler.rule.kind == kind
    traces, logprobs = scored(sampler, params, generations, semantics)
    worst, directives = compare(generations, logprobs)
    edits = [edit for g in generations for edit in g.edits]
    assert directives >= 100
    assert sum(bool(edit.removed) for edit in edits) >= 60
    assert any(edit.clamped for edit in edits) == (kind == "replace")
    pairs = [pair for g in generations for pair in zip(g.edits, g.edits[1:], strict=False)]
    assert any(b.start == a.index + 1 for a, b in pairs)
    assert any(edit.index < g.num_forced for g in generations for edit in g.edits)
    if kind == "replace":
        # A flag that was forced, and closed by the model's own [REPLACE].
        assert any(e.start < g.num_forced < e.index for g in generations for e in g.edits)
        assert max(edit.requested for edit in edits) >= 5
    assert worst < 1e-4
    hidden, _ = hidden_states(sampler.model, params, sampler.rule, traces, semantics)
    assert np.std(transformer.unembed(sampler.model, params, hidden)[traces.is_action]) >= 1
    # The control: read under the other semantics, what follows a retraction must miss by far.
    other = Semantics.KEEP if semantics is Semantics.REWIND else Semantics.REWIND
    _, wrong = scored(sampler, params, generations, other)
    missed, _ = compare(generations, wrong, after_retraction=True)
    assert missed > 1


@pytest.mark.parametrize("semantics", BOTH)
def test_law_without_grammar_holds_for_flags_dropped_and_replacements_of_nothing(semantics):
    bias = {"categories": 1.5, "[REPLACE]": 1.5}
    knobs = Knobs(max_tokens=40, budget=9, grammar=False, control_bias=bias)
    sampler, params, generations = sample(semantics, kind="replace", knobs=knobs)
    assert sum(g.malformed for g in generations) > 20
    edits = [edit for g in generations for edit in g.edits]
    assert sum(edit.category is None for edit in edits) > 10
    assert sum(edit.category is not None and edit.requested == 0 for edit in edits) > 3
    _, logprobs = scored(sampler, params, generations, semantics)
    assert compare(generations, logprobs)[0] < 1e-4


@pytest.mark.parametrize("kind", KNOBS)
def test_rewound_logits_equal_a_fresh_decode_of_the_live_ids(kind):
    """From the second id after a retraction on; the first is drawn from the directive's query.
    Within an open copy too, where the flag and what was copied are alive."""
    rewind = Semantics.REWIND
    sampler, params, generations = sample(rewind, kind=kind, knobs=KNOBS[kind])
    traces = pack_traces(generations, sampler.rule, 80)
    hidden, where = hidden_states(sampler.model, params, sampler.rule, traces, rewind)
    tokens, died = np.asarray(traces.tokens), np.asarray(where.died)
    rows, kinds = [], []
    for row, g in enumerate(generations):
        start = len(g.prompt_ids)
        for index, what in enumerate(render(sampler.rule, g.trace).kinds):
            if not g.edits or index <= g.edits[0].index or what == "retraction":
                continue
            query = start + index
            live = [j for j in range(query + 1) if died[row, j] > query]
            assert int(where.position[row, query]) == len(live) - 1
            rows.append((row, query, tokens[row, live]))
            kinds.append(what)
    assert len(rows) > 150
    assert {"content", "copy", "category"} - set(kinds) == (
        set() if kind == "replace" else {"copy", "category"}
    )
    fresh = np.zeros((len(rows), 80), np.int32)
    for at, (_, _, live) in enumerate(rows):
        fresh[at, : len(live)] = live
    positions = jnp.broadcast_to(jnp.arange(80, dtype=jnp.int32), fresh.shape)
    alone = jax.jit(
        lambda p, ids: transformer.forward(sampler.model, p, ids, Visibility(positions))[0]
    )(params, fresh)
    last = np.asarray([len(live) - 1 for _, _, live in rows])
    read = np.asarray([hidden[row, query] for row, query, _ in rows])
    np.testing.assert_allclose(np.asarray(alone)[np.arange(len(rows)), last], read, atol=2e-5)


def test_ring_of_a_window_survives_long_copies():
    """A copy takes the cursor as far up as it goes down again; the ring must bear both."""
    tokenizer = LetterTokenizer(kind="replace")
    config, params = random_model(tokenizer, windows=(4,))
    rule = tokenizer.controls.rule()
    flag, close = rule.category_id("one"), rule.replace_id
    letters = tokenizer.encode("abcdefghijklmnopqrstuvwxyz")
    # Long copies in a row, one of them dropped by the next flag, one clamped.
    forced = (*letters, flag, *letters[:9], close, flag, *letters[:12], flag, *letters[:20], close)
    knobs = Knobs(max_tokens=110, budget=9, control_bias={"categories": 2.0, "[REPLACE]": -2.0})
    requests = [Request("abc", forced[:k], knobs) for k in range(len(forced) - 16, len(forced) + 1)]
    sampler = Sampler(
        config, tokenizer, SamplerConfig(Semantics.REWIND, batch_size=17, min_room=110)
    )
    generations = sampler(params, requests, 1)
    assert sum(len(e.removed) > 6 for g in generations for e in g.edits) > 17
    traces = pack_traces(generations, rule, 128)
    read = np.asarray(score(config, params, rule, traces, Semantics.REWIND).logprobs)
    assert compare(generations, read)[0] < 1e-4


def test_an_end_inside_a_copy_takes_no_visible_id():
    """Nobody sees it there, so nothing of the text is taken for it."""
    tokenizer = LetterTokenizer(kind="replace")
    config, params = random_model(tokenizer)
    flag, end = tokenizer.controls.rule().category_id("one"), tokenizer.eos_id
    forced = (*tokenizer.encode("ab"), flag, tokenizer.encode("b")[0], end)
    (inside,) = Sampler(config, tokenizer)(params, [Request("abc", forced)])
    assert (inside.text, inside.finished, inside.malformed) == ("ab", True, 1)
    (outside,) = Sampler(config, tokenizer)(params, [Request("abc", (*forced[:2], end))])
    assert (outside.text, outside.finished) == ("ab", True)
