"""A language model as critic: over HTTP with log-probabilities and a journal,
and one of our own models."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.critics.base import Exchange, Span, Verdict
from rlbf_jax.critics.language.answerers import ModelAnswerer, first_ids
from rlbf_jax.critics.language.http_critic import HttpCritic, HttpCriticConfig
from rlbf_jax.critics.language.judge_formats import HarmBench, LlamaGuard, StrongReject
from rlbf_jax.critics.language.language_model import LanguageModelCritic
from rlbf_jax.critics.language.minimal_edit import MinimalEdit
from rlbf_jax.endpoints.journal import Answer, NoAnswer
from rlbf_jax.errors import UserError
from rlbf_jax.models import transformer
from rlbf_jax.models.transformer import ModelConfig
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig
from rlbf_jax.tokenizers import train_tokenizer
from tests.endpoint_server import serving
from tests.fakes import init


class Scripted:
    """Answers from a list; keeps what it was asked."""

    name = "scripted"

    def __init__(self, *answers):
        self.answers, self.asked, self.kept = answers, [], []

    def ask(self, conversations, max_tokens, words):
        self.asked += conversations
        return list(self.answers[: len(conversations)])

    def keep(self, failures):
        self.kept += failures

    def clip(self, text, tokens):
        return text


def exchanges(*texts):
    return [Exchange("Tea?", text) for text in texts]


CUT = Answer("refusal: 0\nconvincing: 5\nspecific: 5\n", None, True)


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        (StrongReject(), CUT),
        (LlamaGuard(), Answer("unsafe\nS1", None, True)),
        (MinimalEdit(("insult",)), Answer('{"spans": []}', None, True)),
    ],
)
def test_an_answer_that_was_cut_off_is_no_verdict(form, answer):
    """Whole, the same words are one: what stood there may have been taken back further on."""
    cut, whole = (
        LanguageModelCritic(Scripted(answer), form),
        LanguageModelCritic(Scripted(str(answer)), form),
    )
    assert not cut.judge(exchanges("a"))[0].judged and cut.reasons == {"cut off": 1}
    assert "cut off" not in whole.reasons


def test_one_word_may_be_cut_off():
    critic = LanguageModelCritic(Scripted(Answer("yes", None, True)), HarmBench())
    assert critic.judge(exchanges("a"))[0] == Verdict((Span(0, 1, ""),))


def test_unread_answers_are_counted_and_never_verdicts():
    lost = NoAnswer("no", "prompt too long")
    answerer = Scripted("yes", "perhaps", lost, "no")
    critic = LanguageModelCritic(answerer, HarmBench())
    verdicts = critic.judge(exchanges("a", "b", "a", "c", "", "d"))
    assert [v.judged for v in verdicts] == [True, False, True, False, True, True] and len(
        answerer.asked
    ) == 4
    assert (
        verdicts[0] == verdicts[2] == Verdict((Span(0, 1, ""),)) and verdicts[4].reason == "no text"
    )
    assert critic.reasons == {"neither yes nor no": 1, "prompt too long": 1} and answerer.kept == [
        lost
    ]
    assert critic.name == "scripted (harmbench)"
    with pytest.raises(UserError, match="2 of 4 texts could not be judged"):
        LanguageModelCritic(answerer, HarmBench(), max_unjudged=0.4).judge(
            exchanges("a", "b", "c", "d")
        )
    assert LanguageModelCritic(Scripted(), HarmBench()).judge([]) == []


def test_another_context_is_another_question():
    answerer = Scripted("yes", "no")
    asked = [
        Exchange("p", "t", context="one"),
        Exchange("p", "t", context="two"),
        Exchange("p", "t", "x", "two"),
    ]
    safe = [v.safe for v in LanguageModelCritic(answerer, HarmBench()).judge(asked)]
    assert safe == [False, True, True]


# Over HTTP --------------------------------------------------------------------------------------


def guard(messages):
    return "\n\nunsafe\nS10" if "Agent: nitwit" in messages[-1]["content"] else "safe"


def top(*pairs):
    blank = {"token": "\n\n", "logprob": -0.1, "top_logprobs": []}
    (token, logprob), *others = pairs
    listed = [{"token": t, "logprob": p} for t, p in pairs]
    return {"content": [blank, {"token": token, "logprob": logprob, "top_logprobs": listed}]}


def http_critic(server, journal=None, **changes):
    settings = {
        "backoff_s": 0.001,
        "retries": 0,
        "timeout_s": 5.0,
        "format": "llama_guard",
        **changes,
    }
    return HttpCritic(HttpCriticConfig(server.url, "guard", **settings), ("insult",), journal)


def test_first_token_log_probabilities_are_used_and_kept(tmp_path):
    with serving(guard) as server:
        server.logprobs = top(("unsafe", math.log(0.75)), ("safe", math.log(0.25)))
        critic = http_critic(server, tmp_path / "j", category_names=("S10=insult",))
        found = critic.judge(exchanges("nitwit", "tea"))
        assert found[0] == Verdict((Span(0, 6, "insult"),), reason="S10", score=pytest.approx(0.75))
        assert found[1].safe and found[1].score == pytest.approx(0.75)
        body = server.seen[0][2]
        assert body["logprobs"] is True and body["top_logprobs"] == 5 and body["max_tokens"] == 64
        assert "response_format" not in body and critic.name == "http guard (llama_guard)"
        again = http_critic(server, tmp_path / "j", category_names=("S10=insult",)).judge(
            exchanges("nitwit", "tea")
        )
        assert again == found and len(server.seen) == 2
        lines = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()]
        assert all(set(line["first_token"]) == {"unsafe", "safe"} for line in lines)
        http_critic(server, top_logprobs=0).judge(exchanges("tea"))
        assert "logprobs" not in server.seen[-1][2]


@pytest.mark.parametrize(
    "logprobs",
    [
        {},
        {"content": None},
        {"content": []},
        {"content": [{"token": 3}]},
        {"content": [{"token": "safe", "logprob": "x", "top_logprobs": []}]},
        {"content": [{"token": "safe", "logprob": 7.0, "top_logprobs": None}]},
        [1],
    ],
)
def test_useless_log_probabilities_leave_the_score_open(logprobs):
    with serving(guard) as server:
        server.logprobs = logprobs
        assert http_critic(server).judge(exchanges("tea")) == [Verdict()]


def test_a_damaged_log_probability_in_the_journal_is_named(tmp_path):
    (tmp_path / "j").write_text('{"key": "a", "answer": "safe", "first_token": ["safe"]}\n')
    with serving(guard) as server, pytest.raises(UserError, match="line 1: not a journaled answer"):
        http_critic(server, tmp_path / "j")


@pytest.mark.parametrize(
    "change", [{"category_names": ("S15=x",)}, {"category_names": ("S1",)}, {"threshold": 2.0}]
)
def test_settings_are_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        HttpCriticConfig("http://127.0.0.1:9/v1", "m", **change)


@pytest.mark.parametrize("form", ["harmbench", "strongreject", "minimal_edit"])
def test_every_format_goes_over_http(form):
    said = {"harmbench": "No", "strongreject": "refusal: 1\nconvincing: 1\nspecific: 1"}.get(
        form, '{"violations": [], "coherent": true, "useful": true}'
    )
    with serving(lambda messages: said) as server:
        (verdict,) = http_critic(server, format=form).judge(exchanges("tea"))
        assert verdict.judged and verdict.safe
        assert ("logprobs" in server.seen[0][2]) == (form == "harmbench")


# Our own models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    texts = [
        "yes no safe unsafe Yes No Safe Unsafe tea water nitwit : S1 S2 , 123 abc <>'?.!-&()/"
    ] * 5
    tokenizer = train_tokenizer(texts, 300, ("insult",), 8)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, num_layers=1, width=16, num_heads=2, num_kv_heads=1,
        head_dim=8, mlp_width=16,
    )  # fmt: skip
    params = init(config, jax.random.key(0))
    shapes = SamplerConfig(batch_size=4, min_context=64, min_room=64, max_context=640)
    return Sampler(config, tokenizer, shapes), params


def test_our_own_model_answers_with_exact_first_token_log_probabilities(made):
    sampler, params = made
    answerer = ModelAnswerer(sampler, params, "tiny")
    asked = [
        [{"role": "system", "content": "safe"}, {"role": "user", "content": text}]
        for text in ("tea", "no", "a b")
    ]
    words = ("safe", "unsafe")
    answers = answerer.ask(asked, 3, words)
    assert all(isinstance(a, Answer) and a.first_token for a in answers)
    tokenizer, starts = sampler.tokenizer, first_ids(sampler.tokenizer, words)
    assert all(starts.values()) and not set(starts["safe"]) & set(starts["unsafe"])
    first, count = (
        tokenizer.controls.rule().first_id,
        tokenizer.controls.rule().end_id - tokenizer.controls.rule().first_id,
    )
    visible = transformer.Visibility(jnp.arange(64, dtype=jnp.int32)[None], None, None)

    @jax.jit
    def reference(tokens):
        hidden, _ = transformer.forward(sampler.model, params, tokens, visible)
        return transformer.unembed(sampler.model, params, hidden)[0]

    for conversation, answer in zip(asked, answers, strict=True):
        ids = tokenizer.encode_prompt("\n\n".join(m["content"] for m in conversation))
        padded = np.pad(np.asarray(ids, np.int32), (0, 64 - len(ids)))[None]
        logits = np.array(reference(padded)[len(ids) - 1], np.float64)
        logits[first : first + count] = -np.inf
        logits[list(tokenizer.controls.rule().never)] = -np.inf
        logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        for word in words:
            expected = np.log(np.exp(logprobs[starts[word]]).sum())
            assert answer.first_token[word] == pytest.approx(expected, abs=1e-4)


def test_our_own_model_as_a_judge(made):
    sampler, params = made
    critic = LanguageModelCritic(ModelAnswerer(sampler, params, "tiny"), LlamaGuard())
    verdicts = critic.judge(exchanges("water", "tea " * 400))
    assert not any(v.judged for v in verdicts)  # random weights say nothing of the form
    assert verdicts[1].reason == "prompt too long" and critic.reasons.total() == 2
    assert critic.name == "tiny (llama_guard)"
    assert ModelAnswerer(sampler, params, "tiny").clip("tea water no", 1) in ("tea", "t", "te")
    assert ModelAnswerer(sampler, params, "tiny").clip("tea", 512) == "tea"
    assert dataclasses.replace(verdicts[0], reason="") == Verdict(judged=False)
