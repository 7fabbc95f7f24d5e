"""A local OpenAI-compatible endpoint that misbehaves as it is told to.

`script` says what the next requests get, one entry each; "ok" once it has run out. `rules` go
before it: the first pair whose words are in the last message decides. `reply` makes the answer to a
conversation that goes well.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time

KEY = "sk-very-secret-123"


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply or (lambda messages: messages[-1]["content"].upper())
        self.script = []
        self.rules = []
        self.seen = []
        """(path, Authorization header, body) of every request, in order."""
        self.lock = threading.Lock()
        self.release = threading.Event()
        """Ends the waits of "slow" and "drip"."""
        self.barrier = None
        """Requests wait here for each other."""
        self.in_flight = self.most_in_flight = 0
        self.logprobs = None
        """`logprobs` of every answer whose request asks for them."""
        self.delay_s = 0.0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """A client that hung up is part of the tests."""

    def act_for(self, body):
        with self.lock:
            for words, act in self.rules:
                if words in body["messages"][-1]["content"]:
                    return act
            return self.script.pop(0) if self.script else "ok"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms for an acknowledgment

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.seen.append((self.path, self.headers.get("Authorization"), body))
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            if server.barrier is not None:
                server.barrier.wait(5)
            if server.delay_s:
                server.release.wait(server.delay_s)
            self.act(server.act_for(body), body)
        finally:
            with server.lock:
                server.in_flight -= 1

    def act(self, act, body):
        good = b""
        if act in ("ok", "half", "cut", "drip"):
            logprobs = self.server.logprobs if body.get("logprobs") else None
            good = completion(self.server.reply(body["messages"]), logprobs=logprobs)
        if act == "ok":
            self.answer(200, good)
        elif act == "close":
            self.close_connection = True
            self.connection.close()
        elif act == "slow":
            self.server.release.wait(5)
            self.close_connection = True
        elif act == "drip":
            self.drip(good)
        elif act == "drip_headers":
            self.drip_headers()
        elif act == "half":
            self.answer(200, good[: len(good) // 2])
        elif act == "cut":
            self.answer(200, good[: len(good) // 2], length=len(good))
        elif act == "html":
            self.answer(200, b"<html>The service is resting.</html>", kind="text/html")
        elif act == "huge":
            self.answer(200, completion("x" * 50_000))
        elif act == "deep":
            self.answer(200, b"[" * 100_000)
        elif act == "surrogate":
            self.answer(200, b'{"choices": [{"message": {"content": "half a pair \\ud83d"}}]}')
        elif act == "null":
            self.answer(200, completion(None))
        elif act == "echo":
            self.answer(400, b"x" * 295 + f"you sent {self.headers.get('Authorization')}".encode())
        elif act == "echo_ok":
            self.answer(200, completion(f"you sent {self.headers.get('Authorization')}"))
        elif isinstance(act, tuple) and act[0] == "say":
            self.answer(200, completion(act[1]))
        elif isinstance(act, tuple) and act[0] == "end":  # an answer, and how it ended
            self.answer(200, completion(act[1], finish=act[2]))
        elif isinstance(act, tuple) and act[0] == "refuse":
            self.answer(200, completion(None, refusal=act[1]))
        elif isinstance(act, dict):  # a body of any shape
            self.answer(200, json.dumps(act).encode())
        elif isinstance(act, tuple):
            self.answer(act[0], b"no", headers=act[1])
        else:
            self.answer(act, b"no")

    def answer(self, status, content, kind="application/json", headers=None, length=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content)
        if length is not None:
            self.close_connection = True

    def drip(self, content):
        """One byte at a time, faster than any read timeout."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) + 10**6))
        self.end_headers()
        self.pour(content + b" " * 10**6)

    def drip_headers(self):
        self.pour(b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 60_000)

    def pour(self, content):
        self.close_connection = True
        with contextlib.suppress(OSError):
            for byte in content:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                if self.server.release.wait(0.02):
                    return

    def log_message(self, *args):
        """Quiet."""


def completion(content, tokens=7, logprobs=None, finish="stop", **more):
    message = {"role": "assistant", "content": content, **more}
    choice = {"message": message, "finish_reason": finish}
    choice |= {} if logprobs is None else {"logprobs": logprobs}
    body = {"choices": [choice], "usage": {"total_tokens": tokens}}
    return json.dumps(body).encode()


@contextlib.contextmanager
def serving(reply=None):
    """A server that runs in a thread until the block ends."""
    server = Server(reply)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()


def wait_until(true, seconds=20.0):
    """Waits for a condition that another thread or process brings about; fails if it never does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)
