"""The endpoint client against a local server that misbehaves."""

import json
import threading

import pytest

from rlbf_jax.endpoints.client import (
    EndpointClient,
    EndpointConfig,
    EndpointError,
    raise_hopeless,
)
from rlbf_jax.endpoints.journal import AnswerJournal
from rlbf_jax.endpoints.replies import retry_after
from rlbf_jax.errors import UserError
from tests.endpoint_server import KEY, serving


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as server:
        yield server


class Clock:
    """Stands in for time.sleep and writes down what was asked of it."""

    def __init__(self):
        self.slept = []

    def __call__(self, seconds):
        self.slept.append(seconds)


def client(server, journal=None, sleep=None, **changes):
    config = EndpointConfig(
        server.url, "tiny", **{"backoff_s": 0.001, "retries": 2, "timeout_s": 5.0, **changes}
    )
    return EndpointClient(
        config, None if journal is None else AnswerJournal(journal), sleep=sleep or Clock()
    )


def user(text):
    return [{"role": "user", "content": text}]


def kinds(answers):
    return [a.kind if isinstance(a, EndpointError) else a for a in answers]


# One request ------------------------------------------------------------------------------------


def test_request_and_answer(server):
    assert client(server).chat(user("hi"), temperature=0.5) == "HI"
    [(path, authorization, body)] = server.seen
    assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert body == {"model": "tiny", "messages": user("hi"), "temperature": 0.5}


def test_no_key_no_authorization(server, monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    client(server).chat(user("hi"))
    assert server.seen[0][1] is None


@pytest.mark.parametrize(
    "script",
    [
        [429, 500],
        [503, 502],
        ["close"],
        ["half"],
        ["cut", "html"],
        ["deep"],
        ["surrogate"],
        ["half", "close"],
    ],
)
def test_transient_failures_are_retried(server, script):
    server.script = list(script)
    clock = Clock()
    assert client(server, sleep=clock).chat(user("hi")) == "HI"
    assert len(server.seen) == len(script) + 1 == len(clock.slept) + 1


def test_waits_obey_the_server_and_otherwise_grow_with_jitter(server):
    server.script = [(429, {"Retry-After": "7"}), 429, 500, (503, {"Retry-After": "99999"}), 500]
    clock = Clock()
    assert client(server, sleep=clock, retries=9, backoff_s=1.0).chat(user("hi")) == "HI"
    assert clock.slept[0] == 7 and clock.slept[3] == 60
    for attempt in (1, 2, 4):
        assert 2**attempt / 2 <= clock.slept[attempt] <= 2**attempt
    waits = {client(server, backoff_s=1.0)._wait(3, None) for _ in range(20)}
    assert len(waits) > 10 and client(server, backoff_s=1.0)._wait(30, None) <= 60


def testretry_after():
    assert retry_after("12") == 12.0 and retry_after("soon") is None and retry_after(None) is None
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0 and retry_after("\u00b2") is None
    assert retry_after("Wed, 21 Oct 2099 07:28:00 GMT") > 1e9


def test_gives_up_with_a_plain_error(server):
    server.script = [500] * 9
    with pytest.raises(EndpointError, match=r"HTTP 500.*gave up after 3 tries") as error:
        client(server).chat(user("hi"))
    assert (error.value.status, error.value.kind, len(server.seen)) == (500, "http 500", 3)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "http 400"), (401, "configuration"), (404, "configuration"), (302, "configuration")],
)
def test_hopeless_requests_are_not_retried(server, status, kind):
    server.script = [(status, {"Location": "/elsewhere"})]
    with pytest.raises(EndpointError, match=f"HTTP {status}") as error:
        client(server).chat(user("hi"))
    assert error.value.kind == kind and len(server.seen) == 1


@pytest.mark.parametrize(
    ("act", "kind", "words", "sent"),
    [
        (
            {"error": {"message": "Rate limit exceeded: add credits", "code": 429}},
            "error 429",
            "Rate limit exceeded: add credits",
            1,
        ),
        ({"error": "model is asleep"}, "error", "model is asleep", 1),
        ({"object": "error", "message": "too long", "choices": None}, "error", "too long", 1),
        ({"error": {"message": "overloaded", "code": 503}}, "error 503", "overloaded", 3),
        ({"error": {"message": f"bad key {KEY}"}}, "error", r"bad key \*\*\*", 1),
        (("end", "", "content_filter"), "filtered", "a filter took the answer away", 1),
        (("end", "Half of it", "content_filter"), "filtered", "a filter took the answer away", 1),
        (("refuse", "I will not."), "refused", "the model refused: I will not.", 1),
        (("end", None, "length"), "no text", "cut off at its most tokens", 1),
        ({"choices": []}, "not a chat completion", "IndexError", 3),
        ({"choices": [{"message": "hi"}]}, "not a chat completion", "TypeError", 3),
    ],
)
def test_a_reply_without_an_answer_says_why(server, act, kind, words, sent):
    """In the server's words, and asked again only where that may help."""
    server.script = [act] * 9
    with pytest.raises(EndpointError, match=words) as error:
        client(server).chat(user("hi"))
    assert (error.value.kind, error.value.status, len(server.seen)) == (kind, 200, sent)


@pytest.mark.parametrize("finish", ["length", "max_tokens", "stop", None])
def test_an_answer_knows_whether_it_was_cut_off(server, tmp_path, finish):
    """From the endpoint, and from the journal."""
    server.script = [("end", "Half of", finish)]
    for _ in range(2):
        answer = client(server, tmp_path / "answers.jsonl").chat(user("hi"))
        assert answer == "Half of" and answer.cut == (finish in ("length", "max_tokens"))
    assert len(server.seen) == 1


def test_an_answer_without_text_is_an_error(server):
    server.script = ["null"]
    with pytest.raises(EndpointError, match="no text"):
        client(server).chat(user("hi"))


def test_nobody_listens():
    config = EndpointConfig("http://127.0.0.1:9/v1", "m", retries=1, timeout_s=2)
    with pytest.raises(EndpointError, match="is the server up") as error:
        EndpointClient(config, sleep=Clock()).chat(user("hi"))
    assert error.value.kind == "connection"


# Bounds -----------------------------------------------------------------------------------------


def test_silence_is_a_timeout(server):
    server.script = ["slow"]
    assert client(server, timeout_s=0.2).chat(user("hi")) == "HI"
    assert len(server.seen) == 2


@pytest.mark.parametrize("act", ["drip", "drip_headers"])
def test_a_server_that_drips_holds_nobody(server, act):
    server.script = [act, act]
    with pytest.raises(
        EndpointError, match=r"no whole answer within 0.3 s \(gave up after 2 tries"
    ) as error:
        client(server, retries=1, deadline_s=0.3).chat(user("hi"))
    assert error.value.kind == "timeout"
    assert client(server).chat(user("hi")) == "HI"  # the same thread, a new connection


def test_a_huge_answer_is_not_read_to_its_end(server):
    server.script = ["huge"]
    with pytest.raises(EndpointError, match="larger than 10,000 bytes") as error:
        client(server, max_answer_bytes=10_000).chat(user("hi"))
    assert error.value.kind == "too large" and len(server.seen) == 1


# Many -------------------------------------------------------------------------------------------


def test_many_in_order_with_errors_in_place(server):
    server.rules = [("b", 400)]
    assert kinds(client(server, concurrency=1).chat_many([user(t) for t in "abc"])) == [
        "A",
        "http 400",
        "C",
    ]
    server.rules = []
    assert client(server, concurrency=8).chat_many([user(f"q{i}") for i in range(40)]) == [
        f"Q{i}" for i in range(40)
    ]


def test_concurrency_is_reached_and_not_exceeded(server):
    server.barrier = threading.Barrier(8)  # breaks unless 8 requests are there at once
    client(server, concurrency=8).chat_many([user(f"q{i}") for i in range(32)])
    assert server.most_in_flight == 8 and not server.barrier.broken


def test_equal_conversations_are_asked_once(server):
    assert client(server).chat_many([user(t) for t in "abaab"]) == list("ABAAB")
    assert len(server.seen) == 2


def test_a_wrong_key_ends_the_batch(server, tmp_path):
    client(server, tmp_path / "j").chat(user("known"))
    server.rules = [("", 401)]
    c = client(server, tmp_path / "j", concurrency=1)
    answers = c.chat_many([user(f"q{i}") for i in range(30)] + [user("known")])
    assert kinds(answers) == ["configuration"] * 30 + ["KNOWN"] and len(server.seen) == 2
    with pytest.raises(UserError, match="critic: .*HTTP 401.*OPENAI_API_KEY.*every answer is kept"):
        raise_hopeless(answers, "critic")


def test_a_dead_server_ends_the_batch(server):
    server.rules = [("", 500)]
    answers = client(server, concurrency=2, retries=0).chat_many([user(f"q{i}") for i in range(50)])
    assert 4 <= kinds(answers).count("http 500") == len(server.seen) <= 6 and "not sent" in kinds(
        answers
    )


# Budget -----------------------------------------------------------------------------------------


def test_budget_of_requests(server, tmp_path):
    c = client(server, tmp_path / "j", max_requests=3, concurrency=4)
    answers = c.chat_many([user(f"q{i}") for i in range(20)])
    assert kinds(answers).count("budget spent") == 17 and len(server.seen) == 3 == c.requests_sent
    with pytest.raises(UserError, match="injector: budget spent: 3 requests were sent.*raise it"):
        raise_hopeless(answers, "injector")
    # A new start has the same budget; what is on disk is still served, and a larger budget goes on.
    again = client(server, tmp_path / "j", max_requests=3)
    served = again.chat_many([user(f"q{i}") for i in range(20)])
    assert sum(isinstance(a, str) for a in served) == 3 == len(server.seen)
    more = client(server, tmp_path / "j", max_requests=20).chat_many(
        [user(f"q{i}") for i in range(20)]
    )
    assert more == [f"Q{i}" for i in range(20)] and len(server.seen) == 20


def test_retries_count_against_the_budget_across_starts(server, tmp_path):
    server.script = [500, 500]
    with pytest.raises(EndpointError, match="budget spent"):
        client(server, tmp_path / "j", max_requests=2, retries=9).chat(user("hi"))
    assert client(server, tmp_path / "j").requests_sent == 2 == len(server.seen)


def test_budget_of_tokens(server, tmp_path):
    c = client(
        server, tmp_path / "j", max_total_tokens=20, concurrency=1
    )  # the server says 7 an answer
    answers = c.chat_many([user(f"q{i}") for i in range(9)])
    assert kinds(answers)[:4] == ["Q0", "Q1", "Q2", "budget spent"] and c.tokens_paid == 21
    assert client(server, tmp_path / "j").tokens_paid == 21


# Journal ----------------------------------------------------------------------------------------


def test_journal_answers_equal_requests_only(server, tmp_path):
    path = tmp_path / "deep" / "answers.jsonl"
    c = client(server, path)
    assert c.chat(user("hi"), a=1, b=2) == c.chat(user("hi"), b=2, a=1) == "HI"
    assert len(server.seen) == 1
    c.chat(user("hi"), a=2, b=2)
    client(server, path).chat(user("ho"), a=1, b=2)
    assert len(server.seen) == 3
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["answer"] for r in rows] == ["HI", "HI", "HO"] and len({r["key"] for r in rows}) == 3
    assert (
        rows[0]["request"] == {"model": "tiny", "messages": user("hi"), "a": 1, "b": 2}
        and rows[0]["sent"] == 1
    )


def test_failures_are_asked_again_unless_they_are_kept(server, tmp_path):
    path = tmp_path / "answers.jsonl"
    server.rules = [("hi", 400)]
    c = client(server, path)
    (error,) = c.chat_many([user("hi")])
    with pytest.raises(EndpointError, match="HTTP 400"):
        client(server, path).chat(user("hi"))
    assert len(server.seen) == 2
    c.keep([error])
    server.rules = []
    with pytest.raises(EndpointError, match="HTTP 400") as kept:
        client(server, path).chat(user("hi"))
    assert (kept.value.kind, kept.value.status) == ("http 400", 400) and len(server.seen) == 2
    assert kinds(client(server, path).chat_many([user("hi"), user("ho")])) == ["http 400", "HO"]


def test_what_says_nothing_of_the_conversation_is_never_kept(server, tmp_path):
    server.rules = [("", 401)]
    c = client(server, tmp_path / "j")
    c.keep(c.chat_many([user(t) for t in "ab"]))
    server.rules = []
    assert client(server, tmp_path / "j").chat_many([user(t) for t in "ab"]) == ["A", "B"]


def test_half_a_last_line_is_cut_off(server, tmp_path):
    path = tmp_path / "answers.jsonl"
    client(server, path).chat_many([user(t) for t in "abc"])
    whole = path.read_bytes()
    for cut in (1, 10, len(whole.splitlines(keepends=True)[-1]) - 1):
        path.write_bytes(whole[:-cut])
        server.seen.clear()
        assert client(server, path).chat_many([user(t) for t in "abc"]) == ["A", "B", "C"]
        assert len(server.seen) == 1
        assert all(json.loads(line) for line in path.read_bytes().splitlines())


@pytest.mark.parametrize(
    "damage",
    [b"{", b"[]", b'{"key": "a"}', b'{"key": 1, "answer": "x"}', b"\xff\x00", b"[" * 99999],
)
def test_a_damaged_line_is_named(server, tmp_path, damage):
    path = tmp_path / "answers.jsonl"
    client(server, path).chat_many([user(t) for t in "abc"])
    lines = path.read_bytes().splitlines()
    lines[1] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(
        UserError, match="answers.jsonl, line 2: not a journaled answer.*delete the line"
    ) as error:
        AnswerJournal(path)
    assert "\n" not in str(error.value)
    path.write_bytes(b"\n".join([lines[0], lines[2]]) + b"\n")
    assert len(AnswerJournal(path)) == 2


def test_two_threads_that_ask_the_same_get_the_same(tmp_path):
    journal = AnswerJournal(tmp_path / "j")
    assert [journal.answered("k", {}, answer, 1, 1) for answer in ("first", "second")] == [
        "first",
        "first",
    ]
    assert AnswerJournal(tmp_path / "j").get("k") == "first"


def test_many_threads_write_whole_lines(tmp_path):
    journal = AnswerJournal(tmp_path / "j")

    def write(name):
        for i in range(20):
            journal.answered(f"{name}{i}", {"x": "y" * 200}, "z" * i, 1, 1)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcdefgh"]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    again = AnswerJournal(tmp_path / "j")
    assert len(again) == 160 == again.sent and again.get("h19") == "z" * 19


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    journal = AnswerJournal(tmp_path / "j")
    journal.answered("a", {}, "kept", 1, 1)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="cannot be written.*No space left"):
        journal.answered("b", {}, "lost", 1, 1)
    monkeypatch.undo()
    journal.answered("c", {}, "kept", 1, 1)
    again = AnswerJournal(tmp_path / "j")
    assert (again.get("a"), again.get("b"), again.get("c")) == ("kept", None, "kept")


def test_a_folder_is_no_journal(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        AnswerJournal(tmp_path)


# Secrets and settings ---------------------------------------------------------------------------


def test_the_secret_shows_nowhere(server, tmp_path):
    server.rules = [("hi", "echo"), ("ho", "echo_ok")]
    c = client(server, tmp_path / "j")
    with pytest.raises(EndpointError) as error:
        c.chat(user("hi"))
    c.keep([error.value])
    said = c.chat(user("ho"))
    assert said == "you sent Bearer ***"
    shown = (
        str(error.value) + repr(error.value) + repr(c) + str(vars(c)) + (tmp_path / "j").read_text()
    )
    assert KEY not in shown and KEY[:6] not in shown


@pytest.mark.parametrize("key", ["sk-with\nbreak-1", "sk-schl\u00fcssel-1"])
def test_a_key_that_no_header_takes(server, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(EndpointError, match="OPENAI_API_KEY") as error:
        client(server).chat(user("hi"))
    assert error.value.kind == "configuration" and key not in str(error.value) and not server.seen


def test_a_placeholder_key_is_not_taken_out_of_answers(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "NONE")
    assert client(server).chat(user("none of it")) == "NONE OF IT"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_url": "localhost"}, "http://"),
        ({"base_url": "http:///v1"}, "name a host"),
        ({"base_url": "http://me:secret-word@x/v1"}, "OPENAI_API_KEY"),
        ({"base_url": "http://x/v1?key=secret-word"}, "OPENAI_API_KEY"),
        ({"base_url": "ftp://me:secret-word@x"}, "OPENAI_API_KEY"),
        ({"model": ""}, "model is empty"),
        ({"concurrency": 0}, "concurrency"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"max_requests": -1}, "max_requests"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        EndpointConfig(**{"base_url": "http://x/v1", "model": "m", **settings})
    assert "secret-word" not in str(error.value)


def test_no_endpoint_cannot_be_asked():
    with pytest.raises(ValueError, match="base_url is empty"):
        EndpointClient(EndpointConfig())
