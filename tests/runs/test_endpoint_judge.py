"""A chat model as the judge of evaluations: named in every record, unread answers counted, never
the critic itself."""

import dataclasses

import pytest

from rlbf_jax.attacks.benchmark import benchmark_attempts
from rlbf_jax.attacks.direct import AttackConfig
from rlbf_jax.cli import main as cli
from rlbf_jax.critics.judges.grammar_judge import GrammarJudge
from rlbf_jax.critics.language.http_critic import JUDGE_OPTION, HttpCritic, HttpCriticConfig
from rlbf_jax.data.sources.benchmarks import Behavior
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.suite import build_attempts, evaluate
from rlbf_jax.plain import field_names
from rlbf_jax.sampling.request import Knobs
from tests.endpoint_server import serving
from tests.evaluation.test_suite import BAD, CONFIG, CONTEXT, SmallWorld, find, scripted
from tests.evaluation.test_suite import tokenizer as tokenizer
from tests.runs.opened import critic_of, judge_of
from tests.runs.test_critic_endpoint import smoke

LOCAL = "http://127.0.0.1:9/v1"


def says_yes_to_cabbage(messages):
    shown = messages[-1]["content"]
    return "Yes" if BAD in shown else "Hm" if "tea 3" in shown else "no"


def test_an_evaluation_with_a_yes_or_no_judge(tokenizer, tmp_path):
    attempts = build_attempts(
        SmallWorld(), tokenizer, dataclasses.replace(CONFIG, attacks=("direct",))
    )
    bad = {a.request.id for a in attempts[:2]}

    def say(request):
        return tokenizer.encode(("Sure." + BAD) if request.id in bad else " tea.")

    with serving(says_yes_to_cabbage) as server:
        server.logprobs = {"content": [{"token": "no", "logprob": -0.1, "top_logprobs": []}]}
        config = HttpCriticConfig(server.url, "cls", format="harmbench", retries=0)
        judge = HttpCritic(
            config, ("insult",), tmp_path / "judge" / "answers.jsonl", option=JUDGE_OPTION
        )
        records, rows = evaluate(scripted(tokenizer, say), attempts, judge, tokenizer, CONTEXT)
        assert {r.judge for r in records} == {"http cls (harmbench)"} and {
            r.critic for r in records
        } == {"lexicon"}
        unread = [r["metrics"]["unjudged"] for r in rows].count(1.0)
        asr, unjudged = (find(records, metric=m)[0] for m in ("asr", "unjudged"))
        assert unjudged.value == unread / 8 and asr.n == 8 - unread and asr.value == 2 / asr.n
        assert find(records, metric="judge_score")[0].value == 0 and not find(
            records, metric="coherent"
        )
        assert len(server.seen) == len({(r["prompt"], r["visible"]) for r in rows})
        server.rules = [("", 500)]
        with pytest.raises(UserError, match="^judge_endpoint: 8 of 8 texts"):
            evaluate(
                scripted(tokenizer, lambda r: tokenizer.encode("no")),
                attempts,
                judge,
                tokenizer,
                CONTEXT,
            )


def test_a_judge_sees_a_behavior_and_its_context_apart(tokenizer, tmp_path):
    """HarmBench's contextual behaviors. Formats without a place for a context show the whole of
    what was asked."""
    plain = Behavior("a", "Is it rude?", "harmbench", harmful=True)
    contextual = dataclasses.replace(plain, id="b", context="Tea with cabbage.")
    attempts = benchmark_attempts(
        [plain, contextual], tokenizer, AttackConfig(knobs=Knobs(max_tokens=40), room=8)
    )
    for form in ("harmbench", "strongreject"):
        with serving(lambda messages: "no") as server:
            config = HttpCriticConfig(server.url, "cls", format=form, retries=0, max_unjudged=1.0)
            judge = HttpCritic(
                config, ("insult",), tmp_path / form / "answers.jsonl", option=JUDGE_OPTION
            )
            said = tokenizer.encode(" tea.")
            evaluate(
                scripted(tokenizer, lambda request, said=said: said),
                attempts,
                judge,
                tokenizer,
                CONTEXT,
            )
            asked = [body["messages"][-1]["content"] for _, _, body in server.seen]
        apart = (
            "<behavior>\nIs it rude?\n</behavior>\n\n<context>\nTea with "
            "cabbage.\n</context>\n\n<generation>"
        )
        whole = "Tea with cabbage.\n\n---\n\nIs it rude?"
        counts = [sum(text in content for content in asked) for text in (apart, whole, "<context>")]
        assert len(asked) == 2 and counts == ([1, 0, 1] if form == "harmbench" else [0, 1, 0])


def test_options_of_a_run(tmp_path):
    assert isinstance(judge_of(smoke(), tmp_path), GrammarJudge)
    options = ["--judge_endpoint.base_url", LOCAL, "--judge_endpoint.model", "m"]
    e = smoke(*options, "--judge_endpoint.format", "llama_guard")
    judge = judge_of(e, tmp_path)
    assert isinstance(judge, HttpCritic) and judge.name == "http m (llama_guard)"
    assert not isinstance(critic_of(e, tmp_path), HttpCritic)
    assert judge.client.journal.path == tmp_path / "judge" / "answers.jsonl"
    harmless = set(field_names(type(e), decides_nothing=True))
    assert "judge_endpoint.max_requests" in harmless
    assert "judge_endpoint.format" not in harmless


def test_the_critic_is_no_judge():
    options = [
        f"--{who}_endpoint.{x}"
        for who in ("critic", "judge")
        for x in (f"base_url={LOCAL}", "model=m")
    ]
    with pytest.raises((UserError, ValueError, SystemExit)):
        smoke(*options)
    assert (
        smoke(*options, "--judge_endpoint.format", "strongreject").judge_endpoint.format
        == "strongreject"
    )


def test_the_curve_needs_a_run(tmp_path, capsys):
    assert cli.main(["evaluate", str(tmp_path), "--tradeoff"]) == 2
    assert "no run here" in capsys.readouterr().err
