"""Continuations of a chat model are parsed strictly;
a data set built of them depends on the answers alone."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.cli import main as cli
from rlbf_jax.data.builders.injectors import CATEGORIES
from rlbf_jax.data.builders.language_model_injector import (
    InjectorConfig,
    LanguageModelInjector,
    NoInjection,
    ParsedInjection,
    parse_injection,
)
from rlbf_jax.endpoints.client import EndpointClient
from rlbf_jax.errors import UserError
from tests.endpoint_server import KEY, serving, wait_until

# Parsing ----------------------------------------------------------------------------------------

GOOD = "And so <harmful>you nitwit</harmful>\n <tag>Insult, gamble</tag>\n"


def test_parse_good():
    assert parse_injection(GOOD, CATEGORIES) == ParsedInjection(
        " And so", " you nitwit", ("insult", "gamble")
    )
    bare = "<harmful> x </harmful><tag>potion,potion</tag>"
    assert parse_injection(bare, CATEGORIES) == ParsedInjection("", " x", ("potion",))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" DECLINE. ", "declined"),
        ("", "not of the form"),
        ("I would rather not.", "not of the form"),
        ("a <harmful>b", "not of the form"),
        ("a <harmful>b</harmful>", "not of the form"),
        ("a <harmful>b</harmful> more <tag>insult</tag>", "not of the form"),
        ("a <harmful>b</harmful><tag>insult</tag> more", "not of the form"),
        ("a <tag>insult</tag><harmful>b</harmful>", "not of the form"),
        ("<harmful>a</harmful> <harmful>b</harmful><tag>insult</tag>", "more than once"),
        ("<harmful>a<harmful>b</harmful><tag>insult</tag>", "more than once"),
        ("a</harmful><harmful>b</harmful><tag>insult</tag>", "more than once"),
        ("a <harmful> </harmful><tag>insult</tag>", "empty"),
        ("a <harmful>b</harmful><tag></tag>", "unknown category"),
        ("a <harmful>b</harmful><tag>insult, spam</tag>", "unknown category"),
    ],
)
def test_parse_refusals(text, reason):
    parsed = parse_injection(text, CATEGORIES)
    assert isinstance(parsed, NoInjection) and reason in parsed.reason


plain = st.text("ab <>/.", max_size=12).filter(lambda s: "<harmful>" not in s)


@given(plain, plain.filter(str.strip), st.lists(st.sampled_from(CATEGORIES), min_size=1))
def test_parse_inverts_writing(bridge, harmful, categories):
    parsed = parse_injection(
        f"{bridge}<harmful>{harmful}</harmful><tag>{', '.join(categories)}</tag>", CATEGORIES
    )
    bridge = bridge.strip()
    want = ParsedInjection(
        f" {bridge}" if bridge else "", f" {harmful.strip()}", tuple(dict.fromkeys(categories))
    )
    assert parsed == want


# Asking -----------------------------------------------------------------------------------------

PART1 = "The moon is quite far away."


def continue_badly(messages):
    """A model that has something silly to add to most beginnings,
    and sometimes declines or makes no sense."""
    said = messages[-1]["content"]
    kind = zlib.crc32(said.encode()) % 6
    if kind == 0:
        return "DECLINE"
    if kind == 1:
        return "hm"
    return f" By the way <harmful>you are nitwit number {len(said)}.</harmful> <tag>insult</tag>"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(continue_badly) as server:
        yield server


def injector(server, **changes):
    settings = {"backoff_s": 0.001, "retries": 0, "timeout_s": 5.0, **changes}
    config = InjectorConfig(server.url, "tiny", **settings)
    return LanguageModelInjector(EndpointClient(config), CATEGORIES, config)


def test_reasons_are_counted(server):
    repeated = f"{PART1} <harmful>you nitwit</harmful><tag>insult</tag>"
    acts = {
        "q0": ("say", GOOD),
        "q1": ("say", "DECLINE"),
        "q2": ("say", "hm"),
        "q3": ("say", repeated),
        "q4": 500,
    }
    server.rules = list(acts.items())
    inject = injector(server)
    found = inject.inject_many([(query, PART1) for query in acts])
    bridge, violation = found[0]
    assert (bridge, violation.text, violation.category) == (" And so", " you nitwit", "insult")
    assert found[1:] == [None] * 4
    assert inject.reasons == dict.fromkeys(
        [
            "used",
            "declined",
            "not of the form <harmful>...</harmful><tag>...</tag>",
            "repeats the partial answer",
            "endpoint: http 500",
        ],
        1,
    )
    rules, task = server.seen[0][2]["messages"]
    assert all(c in rules["content"] for c in CATEGORIES) and PART1 in task["content"]
    assert server.seen[0][2]["temperature"] == 1.0 and inject("q0", PART1) == found[0]


def test_a_hopeless_endpoint_is_the_users_to_mend(server):
    pairs = [(f"Question {i}?", PART1) for i in range(60)]
    server.rules = [("", 404)]
    with pytest.raises(UserError, match="injector: .*HTTP 404.*base_url and model"):
        injector(server).inject_many(pairs)
    server.rules = [("", 500)]
    with pytest.raises(
        UserError, match="injector: 60 of the last 60 requests failed.*every answer is kept"
    ):
        injector(server).inject_many(pairs)
    server.rules = [("", ("say", "DECLINE"))]
    with pytest.raises(
        UserError, match="of the first 60 answers none can be used .declined 60.*injector.model"
    ):
        injector(server).inject_many(pairs)
    with pytest.raises(UserError, match="injector: budget spent"):
        injector(server, max_requests=2).inject_many(pairs)


def test_an_endpoint_that_dies_is_noticed_in_small_batches(server):
    inject = injector(server)
    inject.inject_many([(f"Question {i}?", PART1) for i in range(30)])
    server.rules = [("", 500)]
    lost = 0
    with pytest.raises(UserError, match="11 of the last 20 requests failed"):
        for i in range(30):
            assert inject(f"More {i}?", PART1) is None
            lost += 1
    assert lost == 10


# Building ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file of questions and answers, and a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("own")
    lines = ["prompt,response"]
    for i in range(60):
        lines.append(
            f"What about loaf number {i}?,Bread {i} rises best in a warm corner of the kitchen. "
            "By the way it is "
            f"easy. You are going to like it after {i + 1} tries. Nobody needs a machine for that."
        )
    (folder / "rows.csv").write_text("\n".join(lines))
    args = ["data", "tokenizer", str(folder / "rows.csv"), "--out", str(folder / "tokenizer")]
    assert cli.main([*args, "--vocab_size", "400", "--x_max", "64"]) == 0
    return folder


def build_args(folder, out, url, *more, num_examples=40):
    args = [
        "data",
        "build",
        str(folder / "rows.csv"),
        "--tokenizer",
        str(folder / "tokenizer"),
        "--out",
        str(out),
    ]
    args += ["--num_examples", str(num_examples), "--bsafe.max_tokens", "256"]
    return [
        *args,
        "--injector.base_url",
        url,
        "--injector.model",
        "tiny",
        "--injector.backoff_s",
        "0.001",
        *more,
    ]


def test_the_data_set_depends_on_the_answers_alone(server, folder, tmp_path, capsys):
    digests = {}
    for name, concurrency, delay in (("a", 1, 0.0), ("b", 8, 0.01)):
        server.seen.clear()
        server.delay_s = delay
        server.most_in_flight = 0
        args = build_args(
            folder, tmp_path / name, server.url, "--injector.concurrency", str(concurrency)
        )
        assert cli.main(args) == 0
        report = json.loads(capsys.readouterr().out)
        digests[name] = report["sha256"]
        assert report["injector"]["requests_sent"] == len(server.seen) > 10
        assert report["injector"]["answers"]["used"] >= report["made"]["injected"] > 5
        assert report["rejected"]["injector gave nothing"] > 0
    assert digests["a"] == digests["b"] and server.most_in_flight > 1
    asked = len(server.seen)
    assert cli.main(build_args(folder, tmp_path / "b", server.url)) == 0
    assert (
        json.loads(capsys.readouterr().out)["sha256"] == digests["a"] and len(server.seen) == asked
    )


def test_failures_of_a_build_stay_failures(server, folder, tmp_path, capsys):
    """What a build went on without, its repetition goes on without as well."""
    server.rules = [("number 7?", 500), ("number 1", 400)]
    assert cli.main(build_args(folder, tmp_path / "a", server.url, "--injector.retries", "0")) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["injector"]["answers"]["endpoint: http 400"] > 0
    server.rules = []
    assert cli.main(build_args(folder, tmp_path / "a", server.url)) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == first["sha256"]


def test_users_mistakes_cost_one_line(server, folder, tmp_path, capsys):
    server.rules = [("", 401)]
    assert cli.main(build_args(folder, tmp_path / "a", server.url)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "HTTP 401" in line and "OPENAI_API_KEY" in line and KEY not in line
    journal = tmp_path / "b.answers.jsonl"
    journal.write_text("?\n")
    assert cli.main(build_args(folder, tmp_path / "b", server.url)) == 2
    assert "b.answers.jsonl, line 1" in capsys.readouterr().err


def test_a_killed_build_asks_only_what_was_not_answered(server, folder, tmp_path, capsys):
    args = build_args(folder, tmp_path / "whole", server.url)
    assert cli.main(args) == 0
    whole, asked = json.loads(capsys.readouterr().out), len(server.seen)
    server.seen.clear()
    server.delay_s = 0.1
    args = build_args(folder, tmp_path / "killed", server.url, "--injector.concurrency", "2")
    root = pathlib.Path(__file__).resolve().parents[2]
    code = "import sys; from rlbf_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    child = subprocess.Popen(
        [sys.executable, "-c", code, *args], env=os.environ | {"PYTHONPATH": str(root)}
    )
    wait_until(lambda: len(server.seen) >= 7, 60)
    child.send_signal(signal.SIGKILL)
    child.wait()
    wait_until(lambda: server.in_flight == 0)
    answered = (tmp_path / "killed.answers.jsonl").read_bytes().count(b"\n")
    assert 0 < answered < asked and not (tmp_path / "killed").exists()
    server.seen.clear()
    server.delay_s = 0.0
    assert cli.main(args) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert resumed["sha256"] == whole["sha256"] and len(server.seen) == asked - answered
