"""What the harness adapters share: log-likelihoods against lm_eval and a slow twin,
conversations, stop strings."""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlbf_jax
from rlbf_jax.directives import Semantics, render
from rlbf_jax.errors import InputError
from rlbf_jax.harness.answering import Question, QuestionSampler, is_settled, visible_until
from rlbf_jax.harness.likelihood import LogLikelihood, log_likelihoods
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.sampling.policy import Policy
from rlbf_jax.sampling.program import Contrast, LinearMix, Single
from rlbf_jax.sampling.request import Generation, Knobs, Request
from rlbf_jax.tokenizers import import_tokenizer, train_tokenizer
from rlbf_jax.tokenizers.conversation import conversation_ids
from tests.fakes import LetterTokenizer, random_model
from tests.runs import tiny_checkpoint as tiny

REFERENCE = pathlib.Path(__file__).resolve().parent.parent / "reference" / "lm_eval.npz"
LETTERS = LetterTokenizer()
CONFIG, PARAMS = random_model(LETTERS)


# Log-likelihoods ----------------------------------------------------------------------------------


def test_log_likelihoods_equal_those_of_the_hf_model_of_lm_eval():
    with np.load(REFERENCE) as file:
        reference = dict(file)
    rows = [row[row >= 0].tolist() for row in reference["ids"]]
    pairs = [(row[:n], row[n:]) for row, n in zip(rows, reference["contexts"], strict=True)]
    found = log_likelihoods(
        tiny.CONFIG, tiny.params(), pairs, batch_size=4, max_length=tiny.MAX_LENGTH
    )
    np.testing.assert_allclose([f.logprob for f in found], reference["logprob"], atol=1e-3, rtol=0)
    assert [f.is_greedy for f in found] == reference["greedy"].tolist()


@jax.jit
def logits_at(tokens, query):
    hidden, _ = transformer.forward(
        CONFIG, PARAMS, tokens, Visibility(jnp.arange(40, dtype=jnp.int32)[None])
    )
    return transformer.unembed(CONFIG, PARAMS, hidden[0, query])


def slow(context, continuation, max_length) -> LogLikelihood:
    """One pass for every id."""
    ids = [*context, *continuation][-(max_length + 1) :]
    total, greedy = 0.0, True
    for end in range(len(ids) - len(continuation), len(ids)):
        tokens = jnp.asarray([ids[:end] + [0] * (40 - end)], jnp.int32)
        logits = np.asarray(logits_at(tokens, end - 1), np.float64)
        total += logits[ids[end]] - np.log(np.exp(logits).sum())
        greedy &= int(np.argmax(logits)) == ids[end]
    return LogLikelihood(total, greedy)


some_ids = st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=9)


@settings(max_examples=8)
@given(
    st.lists(st.tuples(some_ids, some_ids), min_size=1, max_size=4),
    st.integers(0, CONFIG.vocab_size - 1),
    st.data(),
)
def test_log_likelihoods_equal_their_slow_twin(pairs, other, data):
    context, continuation = pairs[0]
    pairs = [*pairs, (context, [*continuation[:-1], other])]  # shares a pass with the first
    max_length = data.draw(st.integers(9, 20))
    found = log_likelihoods(CONFIG, PARAMS, pairs, batch_size=4, max_length=max_length)
    expected = [slow(*pair, max_length) for pair in pairs]
    np.testing.assert_allclose([f.logprob for f in found], [e.logprob for e in expected], atol=2e-4)
    assert [f.is_greedy for f in found] == [e.is_greedy for e in expected]


def test_log_likelihoods_over_the_ids_that_count():
    all_ids = log_likelihoods(CONFIG, PARAMS, [([1], [5])], batch_size=4, max_length=8)[0].logprob
    fewer = log_likelihoods(
        CONFIG, PARAMS, [([1], [5])], batch_size=4, max_length=8, vocab_size=10
    )[0].logprob
    assert fewer > all_ids
    same = log_likelihoods(
        CONFIG, PARAMS, [([1], [5])], batch_size=4, max_length=8, vocab_size=CONFIG.vocab_size
    )
    assert same[0].logprob == all_ids


def test_log_likelihoods_of_a_contrast_are_those_of_its_mix():
    program = Contrast((CONFIG, CONFIG), LinearMix((1.5, -0.5)))
    pairs = [([1, 2, 3], [5, 6, 7]), ([1], [9])]
    # A contrast of a model with itself is the model.
    found = log_likelihoods(program, (PARAMS, PARAMS), pairs, batch_size=2, max_length=20)
    expected = log_likelihoods(CONFIG, PARAMS, pairs, batch_size=2, max_length=20)
    np.testing.assert_allclose([f.logprob for f in found], [e.logprob for e in expected], atol=1e-4)


def test_log_likelihoods_of_nothing():
    assert log_likelihoods(CONFIG, PARAMS, [], batch_size=2, max_length=8) == []
    for pair, said in ((([], [1]), "context is empty"), (([1], []), "continuation is empty")):
        with pytest.raises(ValueError, match=said):
            log_likelihoods(CONFIG, PARAMS, [pair], batch_size=2, max_length=8)
    with pytest.raises(ValueError, match="9 ids exceeds max_length 8"):
        log_likelihoods(CONFIG, PARAMS, [([1], [1] * 9)], batch_size=2, max_length=8)


def policy_of(params=PARAMS) -> Policy:
    return Policy(Single(CONFIG), params, LETTERS, LETTERS.rule, Semantics.REWIND)


def test_greedy_continuations_are_those_that_the_sampler_draws():
    # Ids that are never legal in a response get no logit worth drawing,
    # as the plain model knows no mask.
    words = np.zeros((CONFIG.vocab_size, 1), np.float32)
    words[5 : LETTERS.rule.first_id] = 1
    params = PARAMS | {"unembedding": PARAMS["unembedding"] * words}
    prompt = tuple(LETTERS.encode_prompt("a b"))
    question = Question(prompt, knobs=Knobs(temperature=0, max_tokens=12))
    (drawn,) = QuestionSampler(policy_of(params), 4, 64).answer([question])
    answer = drawn.trace.tolist()
    wrong = [*answer[:-1], answer[-1] % 20 + 5]
    assert len(answer) == 12 and answer[-1] != wrong[-1]
    one_by_one = [((*prompt, *answer[:i]), answer[i : i + 1]) for i in range(12)]
    pairs = [(prompt, answer), (prompt, wrong), *one_by_one]
    whole, changed, *parts = log_likelihoods(CONFIG, params, pairs, batch_size=4, max_length=64)
    assert whole.is_greedy and not changed.is_greedy and all(part.is_greedy for part in parts)
    assert whole.logprob == pytest.approx(sum(part.logprob for part in parts), abs=1e-4)


# Answers ------------------------------------------------------------------------------------------


def test_answers_do_not_depend_on_company_and_repetitions_differ():
    asked = [
        Question(tuple(LETTERS.encode_prompt(t)), knobs=Knobs(max_tokens=16))
        for t in ("abc", "x", "abc", "a b c d e")
    ]
    together = QuestionSampler(policy_of(), 4, 64).answer(asked)
    one = QuestionSampler(policy_of(), 4, 64)
    alone = [one.answer([question])[0] for question in reversed(asked)][::-1]
    assert together[1].text == alone[1].text and together[3].text == alone[3].text
    assert {together[0].text, together[2].text} == {alone[0].text, alone[2].text}
    assert together[0].text != together[2].text
    other = dataclasses.replace(asked[1], seed=1)
    assert QuestionSampler(policy_of(), 4, 64).answer([other])[0].text != together[1].text


def test_prompts_lose_their_beginning_and_directives_can_be_forbidden():
    question = Question(tuple(LETTERS.encode_prompt("a" * 60)), knobs=Knobs(max_tokens=30))
    sampler = QuestionSampler(policy_of(), 4, 40)
    assert len(sampler.answer([question])[0].prompt_ids) == 10
    with pytest.raises(
        InputError, match="max_tokens is 40, 0 ids are forced, and the model's texts have 40"
    ):
        sampler.check(dataclasses.replace(question, knobs=Knobs(max_tokens=40)))
    with pytest.raises(InputError, match="top_p is 0"):
        sampler.check(dataclasses.replace(question, knobs=Knobs(max_tokens=4, top_p=0)))
    asked = [question] * 8
    eager = [
        dataclasses.replace(q, knobs=dataclasses.replace(q.knobs, control_bias={"categories": 4.0}))
        for q in asked
    ]
    assert any(g.edits for g in QuestionSampler(policy_of(), 4, 64).answer(eager))
    assert not any(
        g.edits for g in QuestionSampler(policy_of(), 4, 64, directives=False).answer(eager)
    )


def generation(text: str, num_forced: int = 0) -> Generation:
    """A generation from letters and <n>, which stands for a directive that takes back n ids."""
    trace: list[int] = []
    for part in text.replace(">", "<").split("<"):
        if part.isdecimal():
            trace += [LETTERS.rule.first_id, LETTERS.rule.first_id + 1 + int(part)]
        else:
            trace += LETTERS.encode(part)
    done = render(LETTERS.rule, trace)
    return Generation(
        LETTERS.decode(done.visible), np.asarray(trace, np.int32), done.edits, np.zeros(len(trace)),
        done.visible, np.zeros(1, np.int32), num_forced, False, 0, Request(""),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "forced", "stops", "shown"),
    [
        ("abc", 0, (), "abc"),
        ("abc", 0, ("", "x"), "abc"),
        ("abcabc", 0, ("c",), "ab"),
        ("abc", 0, ("c", "b"), "a"),
        ("abx<1>cd", 0, (), "abcd"),
        ("abx<1>cd", 0, ("c",), "ab"),
        ("abx<1>cd", 0, ("x",), "ab"),  # seen before it was taken back
        ("ab<1>b<2>cab", 0, ("ca",), ""),
        ("abx<1>cd", 0, ("bx",), "a"),
        ("abx<1>cd", 0, ("bc",), "a"),
        ("abx<1>cd", 0, ("xc",), "abcd"),  # never stood in the visible text
        ("abcd", 2, (), "cd"),
        ("abcd", 2, ("b", "d"), "c"),
        ("ab<2>cd", 2, (), "cd"),
        ("ab<1>cd", 2, (), "acd"),
        ("<1>", 0, ("x",), ""),
        ("", 0, ("x",), ""),
    ],
)
def test_text_until_a_stop_string(text, forced, stops, shown):
    assert visible_until(generation(text, forced), LETTERS, stops) == shown


def cut(whole: Generation, n: int) -> Generation:
    """The first n ids of a generation."""
    done = render(LETTERS.rule, whole.trace[:n])
    return dataclasses.replace(
        whole,
        text=LETTERS.decode(done.visible),
        trace=whole.trace[:n],
        edits=done.edits,
        visible=done.visible,
    )


@given(
    st.lists(st.sampled_from(["a", "b", "c", "<1>", "<2>"]), max_size=14).map("".join),
    st.integers(0, 3),
    st.lists(st.text("abc", max_size=3), max_size=3),
)
def test_a_settled_text_stays_what_it_is(text, forced, stops):
    whole = generation(text, forced)
    for n in range(min(forced, len(whole.trace)), len(whole.trace) + 1):
        part = cut(whole, n)
        if is_settled(part, LETTERS, stops):
            assert visible_until(part, LETTERS, stops) == visible_until(whole, LETTERS, stops)
        else:
            # Nothing is settled too late: no stop string stands there,
            # or a longer one may still begin before it.
            at = min(
                (i for s in stops if s and (i := visible_until(part, LETTERS, ()).find(s)) >= 0),
                default=None,
            )
            assert at is None or len(visible_until(part, LETTERS, ())) < at + max(map(len, stops))


def test_decoding_ends_soon_after_a_stop_string_and_texts_are_the_same():
    knobs = Knobs(max_tokens=120, stop_ids=())
    questions = [
        Question(tuple(LETTERS.encode_prompt(t)), knobs=knobs) for t in ("abc", "x", "d e")
    ]
    stopped = [
        dataclasses.replace(q, stops=stops)
        for q, stops in zip(questions, (("b",), ("zzz",), ()), strict=True)
    ]
    whole = QuestionSampler(policy_of(), 2, 160).answer(questions)
    short = QuestionSampler(policy_of(), 2, 160).answer(stopped)
    for question, one, other in zip(stopped, whole, short, strict=True):
        assert np.array_equal(other.trace, one.trace[: len(other.trace)])
        assert np.allclose(other.logprobs, one.logprobs[: len(other.trace)], atol=1e-5)
        assert visible_until(other, LETTERS, question.stops) == visible_until(
            one, LETTERS, question.stops
        )
    assert len(short[0].trace) == 32 and {len(g.trace) for g in (*whole, *short[1:])} == {120}


# Conversations ------------------------------------------------------------------------------------


def said(*turns: str) -> list[dict[str, str]]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[turn[0]], "content": turn[1:]} for turn in turns]


def test_conversations_of_one_turn():
    prompt = LETTERS.encode_prompt("hi")
    assert conversation_ids(LETTERS, said("uhi")) == (prompt, [])
    assert conversation_ids(LETTERS, said("uhi", "aso")) == (prompt, LETTERS.encode("so"))
    tokenizer = train_tokenizer(["be nice and say hi to all of them"], 290, ("one",), 4)
    assert conversation_ids(tokenizer, said("sbe nice", "uhi")) == (
        tokenizer.encode_prompt("be nice\n\nhi"),
        [],
    )
    with pytest.raises(InputError, match="of user, assistant, user: .* one turn only"):
        conversation_ids(LETTERS, said("uhi", "aso", "uhi"))
    for nothing in ([], said("aso"), said("sbe nice")):
        with pytest.raises(InputError, match="needs a message of the user"):
            conversation_ids(LETTERS, nothing)


def test_conversations_by_a_checkpoints_template(tmp_path):
    tokenizer = import_tokenizer(tiny.write(tmp_path / "model"), ("one",), 4, tiny.ROWS)
    messages = said("sbe nice", "uhi <|eot_id|>", "aso", "u[CATEGORY_ONE] [BACKTRACK_BY_2]")
    assert conversation_ids(tokenizer, messages) == (tokenizer.encode_chat(messages), [])
    prompt, forced = conversation_ids(tokenizer, [*messages, *said("a so")])
    assert (prompt, forced) == (tokenizer.encode_chat(messages), tokenizer.encode(" so"))
    assert not {i for i in prompt if tokenizer.controls.rule().is_control(i)}


# Nobody else needs the harnesses ------------------------------------------------------------------

ADAPTERS = {"lm_eval_model.py": {"lm_eval"}, "inspect_provider.py": {"inspect_ai", "anyio"}}
ADAPTERS["inspect_registry.py"] = {"inspect_ai"}


def test_only_the_adapters_import_the_harnesses():
    for path in pathlib.Path(rlbf_jax.__file__).parent.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
        assert names & {"lm_eval", "inspect_ai", "anyio", "datasets"} <= ADAPTERS.get(
            path.name, set()
        ), path


def test_the_package_runs_without_the_harnesses():
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('lm_eval', 'inspect_ai', 'datasets', "
        "'torch')));"
        "import rlbf_jax.cli.main, rlbf_jax.runs.execute, rlbf_jax.runs.checkpoint_policy, "
        "rlbf_jax.harness.answering, rlbf_jax.harness.likelihood"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_prompt_ids_take_the_place_of_the_prompt():
    sampler = QuestionSampler(policy_of(), 4, 64)._sampler
    ids = tuple(LETTERS.encode_prompt("a b"))
    knobs = Knobs(max_tokens=8)
    plain, placed = (
        sampler(PARAMS, [request], jax.random.key(0))[0]
        for request in (Request("a b", (), knobs, 3), Request("shown only", (), knobs, 3, ids))
    )
    assert plain.trace.tolist() == placed.trace.tolist() and placed.request.prompt == "shown only"
    with pytest.raises(InputError, match="prompt ids must lie in"):
        sampler(PARAMS, [Request("", (), knobs, 3, (10**6,))], 0)
    with pytest.raises(InputError, match="at least one id"):
        sampler(PARAMS, [Request("", (), knobs, 3, ())], 0)
