"""The exported recipe in `transformers` itself, with tiny random models;
needs a python that has torch."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.directives import (
    BacktrackRule,
    EditRule,
    Limits,
    ReplaceRule,
    Semantics,
    layout,
    render,
)
from rlbf_jax.models.export.recipe import ResponseLimits, exported_rule, write_recipe
from rlbf_jax.models.weights.read import read_checkpoint
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig

pytestmark = pytest.mark.slow
CHILD = pathlib.Path(__file__).with_name("recipe_child.py")
ROWS, VOCAB, EOS = 50, 48, 2
RULE = BacktrackRule(20, ("one", "two"), (0, 1), x_max=6, vocab_size=47)
REPLACE = ReplaceRule(20, ("one", "two"), (0, 1, 47))
LIMITS = ResponseLimits(max_emitted=64, budget=3)
NO_DIRECTIVES = dataclasses.replace(LIMITS, budget=0)


@pytest.fixture(scope="session")
def peers_python() -> str:
    python = os.environ.get("RLBF_JAX_PEERS")
    if not python:
        pytest.skip(
            "RLBF_JAX_PEERS is not set: point it at a python that has torch and transformers"
        )
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.fail(f"RLBF_JAX_PEERS={python} cannot import torch and transformers")
    return python


def random_cases() -> dict:
    """Prompts, and forced traces; many are malformed, clamp, or spend more than the budget."""
    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, 19, rng.integers(1, 12)).tolist() for _ in range(ROWS)]
    weights = np.where((np.arange(VOCAB) >= 20) & (np.arange(VOCAB) < 28), 3.0, 1.0)
    weights[[0, 1, EOS, 47]] = 0
    forced = [
        rng.choice(VOCAB, rng.integers(0, 26), p=weights / weights.sum()).tolist()
        for _ in range(ROWS)
    ]
    too_large = exported_rule(
        dataclasses.replace(RULE, first_id=VOCAB - 3), (EOS,), LIMITS
    ).fields()
    taught = rng.integers(3, 11, (ROWS, 4)).tolist()
    replace = exported_rule(REPLACE, (EOS,), LIMITS).fields()
    return dict(prompts=prompts, forced=forced, taught=taught, too_large=too_large, replace=replace)


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def run(request, peers_python, tmp_path_factory) -> dict:
    """What the child found, with the cases it was given."""
    work = tmp_path_factory.mktemp(request.param)
    cases = random_cases()
    for name in ("model", "tuned"):
        write_recipe(work / name, RULE, (EOS,), LIMITS)
    write_recipe(work / "other" / "model", RULE, (EOS,), NO_DIRECTIVES)
    (work / "cases.json").write_text(json.dumps(cases))
    # The modules' cache must be fresh, and the child must not see this package.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {
        "HF_HOME": str(work / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [peers_python, str(CHILD), request.param, str(work)]
    child = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-4000:]
    found = json.loads((work / "found.json").read_text())
    return found | dict(work=work, cases=cases, logits=np.load(work / "logits.npz")["logits"])


LAYOUT = jax.jit(layout, static_argnums=(0, 4))


def legal_ids(traces, limits: ResponseLimits, rule: EditRule = RULE) -> np.ndarray:
    """[rows, time, VOCAB]: what `directives` allows before each id of each trace."""
    width = max(map(len, traces)) + 1
    tokens = np.asarray([[*trace, *[5] * (width - len(trace))] for trace in traces], np.int32)
    before = LAYOUT(
        rule, tokens, np.ones_like(tokens), np.ones_like(tokens, bool), Semantics.KEEP
    ).before
    arrays = Limits(
        **{name: jnp.asarray(value) for name, value in dataclasses.asdict(limits).items()}
    )
    return np.asarray(rule.legal_ids(rule.legal(before, arrays), VOCAB))


def check(found: dict, forced, max_emitted: int, rule: EditRule = RULE) -> None:
    """Visible ids, edits, legality and length of every row, by our rules."""
    limits = dataclasses.replace(LIMITS, max_emitted=max_emitted)
    legal = legal_ids(found["traces"], limits, rule)
    for row, (trace, start) in enumerate(zip(found["traces"], forced, strict=True)):
        assert trace[: len(start)] == start
        drawn = range(len(start), len(trace))
        assert all(legal[row, time, trace[time]] for time in drawn)
        assert EOS not in trace[len(start) : -1]
        assert found["finished"][row] == (trace[-1] == EOS)
        assert found["finished"][row] or len(trace) == max_emitted
        rendered = render(rule, trace)
        ended = trace[-1] == EOS and rendered.kinds[-1] == "content"
        assert found["visible"][row] == list(rendered.visible[:-1] if ended else rendered.visible)
        assert found["shown"][row] == found["visible"][row]
        assert found["malformed"][row] == rendered.malformed
        assert found["edits"][row] == [
            [e.index, e.category, e.requested, list(e.removed)] for e in rendered.edits
        ]


def test_greedy_takes_the_likeliest_legal_id(run):
    check(run["greedy"], [[]] * ROWS, 40)
    traces = run["greedy"]["traces"]
    legal = legal_ids(traces, dataclasses.replace(LIMITS, max_emitted=40))
    unmasked = 0
    for row, trace in enumerate(traces):
        for time, token in enumerate(trace):
            logits = run["logits"][row, time] + 3 * np.isin(
                np.arange(VOCAB), [20, 21]
            )  # the caller's processor
            assert token == np.argmax(np.where(legal[row, time], logits, -np.inf))
            unmasked += token != np.argmax(logits)
    assert unmasked > 50  # the mask changes what is drawn
    assert sum(map(len, run["greedy"]["edits"])) > 10
    assert run["alone"] == traces[:8]  # padding and neighbors change nothing
    width = max(map(len, run["greedy"]["visible"]))
    assert run["ids"] == [[*v, *[0] * (width - len(v))] for v in run["greedy"]["visible"]]


def test_forced_traces_and_sampling_render_as_ours(run):
    check(run["forced"], run["cases"]["forced"], 30)
    assert sum(run["forced"]["malformed"]) > 20
    assert sum(map(len, run["forced"]["edits"])) > 100
    lengths = [len(forced) for forced in run["cases"]["forced"]]
    ended = [
        t[-1] == EOS
        for t, length in zip(run["forced"]["traces"], lengths, strict=True)
        if len(t) > length
    ]
    assert any(ended) and not all(ended)


def test_replacements_render_as_ours(run):
    found = run["replaced"]
    check(found, run["cases"]["forced"], 30, REPLACE)
    assert sum(map(len, found["edits"])) > 50 and sum(found["malformed"]) > 5
    assert sum(bool(edit[3]) for edits in found["edits"] for edit in edits) > 30
    # Some end inside a copy, and nothing of what is visible is taken for that end.
    kinds = [render(REPLACE, trace).kinds[-1] for trace in found["traces"]]
    ended = [kind for kind, done in zip(kinds, found["finished"], strict=True) if done]
    assert {"content", "copy"} <= set(ended)


def test_several_returns_of_one_prompt(run):
    check(run["returned"], [[]] * 12, 25)
    traces = run["returned"]["traces"]
    assert len({tuple(trace) for trace in traces}) > 8
    assert sum(map(len, run["returned"]["edits"])) > 5


@pytest.mark.parametrize(
    ("case", "rows", "most"),
    [
        ("unlimited", ROWS, 64),
        ("bare_config", ROWS, 64),
        ("of_model", ROWS, 10),
        ("of_call", ROWS, 7),
        ("twice", 8, 9),
    ],
)
def test_answers_are_as_long_as_somebody_said(run, case, rows, most):
    """transformers 4 gives every generation config a `max_length` of 20,
    prompt included: nobody said that."""
    check(run[case], [[]] * rows, most)
    assert max(map(len, run[case]["traces"])) == most


def test_rows_end_by_the_callers_criteria_too(run):
    stop = max(run["greedy"]["traces"], key=len)[3]
    for trace, whole in zip(run["stopped"]["traces"], run["greedy"]["traces"], strict=True):
        assert trace == (whole[: whole.index(stop) + 1] if stop in whole else whole)


def test_a_response_that_is_over_stays_so(run):
    assert run["over"]["traces"] == [[5, EOS]]
    assert run["over"]["visible"] == [[5]]


def test_recipes_in_folders_of_one_name_do_not_mix(run):
    controls = {i for trace in run["other"] for i in trace if RULE.is_control(i)}
    assert not controls
    assert any(RULE.is_control(i) for trace in run["greedy"]["traces"] for i in trace)


def test_a_model_loaded_with_remote_code_generates_with_the_recipe(run):
    assert run["loaded"] == run["ids"]


# Our own sampler, on the weights that transformers saved ---------------------------------------


class Numbers:
    """A tokenizer whose texts are lists of ids: "5 6 7"."""

    eos_id, eos_ids, rule, vocab_size = EOS, (EOS,), RULE, VOCAB

    def encode_prompt(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


def ours(run, folder: str, prompts: str, forced, max_tokens: int, bias: float) -> dict:
    """Greedy answers of our sampler under KEEP, in the form of the child's."""
    config, params = read_checkpoint(run["work"] / folder)
    knobs = Knobs(
        temperature=0,
        budget=LIMITS.budget,
        max_tokens=max_tokens,
        control_bias={"categories": bias},
    )
    texts = [" ".join(map(str, prompt)) for prompt in run["cases"][prompts]]
    requests = [
        Request(text, tuple(start), knobs) for text, start in zip(texts, forced, strict=True)
    ]
    sampler = Sampler(config, Numbers(), SamplerConfig(semantics=Semantics.KEEP, batch_size=ROWS))
    done = sampler(params, requests)
    return dict(traces=[g.trace.tolist() for g in done], visible=[list(g.visible) for g in done])


def same(run, case: str, **settings) -> None:
    sampled = ours(run, **settings)
    assert sampled["traces"] == run[case]["traces"]
    assert sampled["visible"] == run[case]["visible"]


def test_our_sampler_answers_alike(run):
    same(
        run,
        "greedy",
        folder="model",
        prompts="prompts",
        forced=[[]] * ROWS,
        max_tokens=40,
        bias=3.0,
    )


def test_our_sampler_goes_on_from_forced_traces_alike(run):
    same(
        run,
        "forced_greedy",
        folder="model",
        prompts="prompts",
        forced=run["cases"]["forced"],
        max_tokens=30,
        bias=3.0,
    )


def test_our_sampler_answers_alike_with_a_tuned_model(run):
    check(run["tuned"], [[]] * ROWS, 40)
    taken_back = [edit for edits in run["tuned"]["edits"] for edit in edits]
    assert sum(edit[3] == [14, 15] for edit in taken_back) > ROWS // 2
    assert sum(run["tuned"]["finished"]) > ROWS // 2
    same(
        run, "tuned", folder="tuned", prompts="taught", forced=[[]] * ROWS, max_tokens=40, bias=0.0
    )


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("beams", "num_beams > 1"),
        ("streamer", "text_events"),
        ("right", "pad on the left"),
        ("start", "response_start is"),
        ("length", "leaves no room after 11 input ids; say max_new_tokens"),
        ("room", "raise max_tokens"),
        ("vocabulary", "this model has 48 ids, but the control ids of the recipe go up to 52"),
        ("rule", "format is 9"),
    ],
)
def test_what_does_not_go_with_edits_is_refused(run, case, message):
    assert message in run["refused"][case]
