"""A chat model as the judge of evaluations: named in every record, unread answers counted, never the critic itself."""

import dataclasses

import pytest

from rlbf_jax import cli
from rlbf_jax.critics.http_critic import JUDGE_OPTION, HttpCritic, HttpCriticConfig
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.grammar_judge import GrammarJudge
from rlbf_jax.evaluation.suite import build_attempts, evaluate
from rlbf_jax.methods import runner
from tests.endpoint_server import serving
from tests.evaluation.test_suite import BAD, CONFIG, CONTEXT, SmallWorld, find, scripted
from tests.evaluation.test_suite import tokenizer as tokenizer
from tests.methods.test_critic_endpoint import smoke

LOCAL = "http://127.0.0.1:9/v1"


def says_yes_to_cabbage(messages):
    shown = messages[-1]["content"]
    return "Yes" if BAD in shown else "Hm" if "tea 3" in shown else "no"


def test_an_evaluation_with_a_yes_or_no_judge(tokenizer, tmp_path):
    attempts = build_attempts(SmallWorld(), tokenizer, dataclasses.replace(CONFIG, attacks=("direct",)))
    bad = {a.request.id for a in attempts[:2]}

    def say(request):
        return tokenizer.encode(("Sure." + BAD) if request.id in bad else " tea.")

    with serving(says_yes_to_cabbage) as server:
        server.logprobs = {"content": [{"token": "no", "logprob": -0.1, "top_logprobs": []}]}
        config = HttpCriticConfig(server.url, "cls", format="harmbench", retries=0)
        judge = HttpCritic(config, ("insult",), tmp_path / "judge" / "answers.jsonl", option=JUDGE_OPTION)
        records, rows = evaluate(scripted(tokenizer, say), attempts, judge, tokenizer, CONTEXT)
        assert {r.judge for r in records} == {"http cls (harmbench)"} and {r.critic for r in records} == {"lexicon"}
        unread = [r["metrics"]["unjudged"] for r in rows].count(1.0)
        asr, unjudged = (find(records, metric=m)[0] for m in ("asr", "unjudged"))
        assert unjudged.value == unread / 8 and asr.n == 8 - unread and asr.value == 2 / asr.n
        assert find(records, metric="judge_score")[0].value == 0 and not find(records, metric="coherent")
        assert len(server.seen) == len({(r["prompt"], r["visible"]) for r in rows})
        server.rules = [("", 500)]
        with pytest.raises(UserError, match="^judge_endpoint: 8 of 8 texts"):
            evaluate(scripted(tokenizer, lambda r: tokenizer.encode("no")), attempts, judge, tokenizer, CONTEXT)


def test_options_of_a_run(tmp_path):
    assert isinstance(runner.open_workspace(smoke(), tmp_path).judge, GrammarJudge)
    options = ["--judge_endpoint.base_url", LOCAL, "--judge_endpoint.model", "m"]
    work = runner.open_workspace(smoke(*options, "--judge_endpoint.format", "llama_guard"), tmp_path)
    assert isinstance(work.judge, HttpCritic) and work.judge.name == "http m (llama_guard)"
    assert not isinstance(work.critic, HttpCritic)
    assert work.judge.client.journal.path == tmp_path / "judge" / "answers.jsonl"
    assert "judge_endpoint.max_requests" in runner.CHANGEABLE and "judge_endpoint.format" not in runner.CHANGEABLE


def test_the_critic_is_no_judge():
    options = [f"--{who}_endpoint.{x}" for who in ("critic", "judge") for x in (f"base_url={LOCAL}", "model=m")]
    with pytest.raises((UserError, ValueError, SystemExit)):
        smoke(*options)
    assert smoke(*options, "--judge_endpoint.format", "strongreject").judge_endpoint.format == "strongreject"


def test_the_curve_needs_a_run(tmp_path, capsys):
    assert cli.main(["evaluate", str(tmp_path), "--tradeoff"]) == 2
    assert "no run here" in capsys.readouterr().err
