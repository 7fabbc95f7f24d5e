"""The endpoint client against a local server that misbehaves."""

import http.server
import json
import threading

import pytest

from rlbf_jax.http import EndpointClient, EndpointError, _retry_after

KEY = "sk-very-secret-123"


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = []
        """What the next requests get; "ok" once it has run out."""
        self.seen = []
        self.lock = threading.Lock()
        self.release = threading.Event()

    def handle_error(self, request, client_address):
        """A client that hung up is part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, self.headers.get("Authorization"), body))
            act = self.server.script.pop(0) if self.server.script else "ok"
        said = body["messages"][-1]["content"]
        good = json.dumps({"choices": [{"message": {"content": said.upper()}}]})
        if act == "close":
            self.connection.close()
        elif act == "slow":
            self.server.release.wait(5)
        elif act == "broken":
            self.answer(200, good[:20])
        elif act == "echo":
            self.answer(400, f"you sent {self.headers.get('Authorization')}")
        elif act == "null":
            self.answer(200, json.dumps({"choices": [{"message": {"content": None}}]}))
        elif isinstance(act, int):
            self.answer(act, "no", {"Retry-After": "0"} if act == 429 else {})
        else:
            self.answer(200, good)

    def answer(self, status, text, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def client(server, **changes):
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return EndpointClient(url, "tiny", **{"backoff_s": 0.001, "retries": 2, "timeout_s": 5.0, **changes})


def user(text):
    return [{"role": "user", "content": text}]


def test_request_and_answer(server):
    assert client(server).chat(user("hi"), temperature=0.5) == "HI"
    [(path, authorization, body)] = server.seen
    assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert body == {"model": "tiny", "messages": user("hi"), "temperature": 0.5}


@pytest.mark.parametrize("script", [[429, 500], [503, 502], ["close"], ["broken"], ["broken", "close"]])
def test_transient_failures_are_retried(server, script):
    server.script = list(script)
    assert client(server).chat(user("hi")) == "HI"
    assert len(server.seen) == len(script) + 1


def test_timeouts_are_retried(server):
    server.script = ["slow"]
    assert client(server, timeout_s=0.2).chat(user("hi")) == "HI"
    assert len(server.seen) == 2


def test_gives_up_with_a_plain_error(server):
    server.script = [500] * 9
    with pytest.raises(EndpointError, match=r"HTTP 500.*gave up after 3 tries") as error:
        client(server).chat(user("hi"))
    assert error.value.status == 500 and len(server.seen) == 3


@pytest.mark.parametrize("status", [400, 401, 404])
def test_hopeless_requests_are_not_retried(server, status):
    server.script = [status]
    with pytest.raises(EndpointError, match=f"HTTP {status}"):
        client(server).chat(user("hi"))
    assert len(server.seen) == 1


def test_an_answer_without_text_is_an_error(server):
    server.script = ["null"]
    with pytest.raises(EndpointError, match="no text"):
        client(server).chat(user("hi"))


def test_the_wait_obeys_the_server_and_grows(server):
    c = client(server, backoff_s=1.0)
    assert c._wait(0, 7.0) == 7.0 and c._wait(0, 1e9) == 60.0
    for attempt in range(12):
        assert min(2**attempt, 60) / 2 <= c._wait(attempt, None) <= min(2**attempt, 60)
    assert _retry_after("12") == 12.0 and _retry_after("soon") is None and _retry_after(None) is None
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert _retry_after("Wed, 21 Oct 2099 07:28:00 GMT") > 1e9


def test_many_in_order_with_errors_in_place(server):
    server.script = [400]
    got = client(server, concurrency=1).chat_many([user(t) for t in "abc"])
    assert isinstance(got[0], EndpointError) and got[1:] == ["B", "C"]
    assert client(server, concurrency=8).chat_many([user(f"q{i}") for i in range(40)]) == [f"Q{i}" for i in range(40)]


def test_cache_answers_equal_requests_only(server, tmp_path):
    c = client(server, cache_dir=tmp_path)
    assert c.chat(user("hi"), a=1, b=2) == c.chat(user("hi"), b=2, a=1) == "HI"
    assert len(server.seen) == 1
    c.chat(user("hi"), a=2, b=2)
    client(server, cache_dir=tmp_path).chat(user("ho"), a=1, b=2)
    assert len(server.seen) == 3
    files = list(tmp_path.iterdir())
    assert len(files) == 3 and all(f.suffix == ".json" and KEY not in f.read_text() for f in files)
    files[0].write_text("{")
    with pytest.raises(EndpointError, match="delete the file"):
        c.chat_many([user("hi")], a=1, b=2), [c.chat(user(t), a=n, b=2) for t in ("hi", "ho") for n in (1, 2)]


def test_failures_are_not_cached(server, tmp_path):
    server.script = [400]
    c = client(server, cache_dir=tmp_path)
    with pytest.raises(EndpointError):
        c.chat(user("hi"))
    assert c.chat(user("hi")) == "HI"


def test_the_secret_shows_nowhere(server):
    server.script = ["echo"]
    c = client(server)
    with pytest.raises(EndpointError) as error:
        c.chat(user("hi"))
    assert "***" in str(error.value)
    assert KEY not in str(error.value) + repr(error.value) + repr(c) + str(vars(c))


def test_bad_settings():
    with pytest.raises(ValueError, match="http://"):
        EndpointClient("localhost", "m")
    with pytest.raises(ValueError, match="concurrency"):
        EndpointClient("http://x", "m", concurrency=0)
