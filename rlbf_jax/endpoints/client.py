"""One client for every OpenAI-compatible endpoint: concurrency, retries with backoff,
a budget, answers kept on disk.

Nothing that a server does can hold it up for longer than `EndpointConfig` says,
or make it pay for an answer twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from rlbf_jax.endpoints.journal import Answer, AnswerJournal, Failure, NoAnswer
from rlbf_jax.endpoints.replies import (
    NoCompletion,
    completion,
    redacted,
    retry_after,
    tokens_paid_for,
)
from rlbf_jax.endpoints.transport import Reply, TransportError, post_json
from rlbf_jax.errors import UserError

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_HOPELESS = frozenset({301, 302, 303, 307, 308, 401, 402, 403, 404, 405})
"""What no other conversation would mend either: a wrong address, key or model name."""
_LONGEST_WAIT_S = 60.0

CONFIGURATION, BUDGET_SPENT, NOT_SENT = "configuration", "budget spent", "not sent"
"""Kinds of failure that say nothing of the conversation itself."""


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """A chat model behind `POST {base_url}/chat/completions`,
    and how patiently and at what cost it is asked."""

    base_url: str = ""
    """As http://127.0.0.1:8000/v1. Empty: no endpoint is used."""
    model: str = ""
    """The model's name, as the endpoint knows it."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; unset or empty: no key is sent."""
    timeout_s: float = 60.0
    """Longest wait to connect, and between two pieces of an answer."""
    deadline_s: float = 300.0
    """Longest time for one whole answer, however steadily it trickles in."""
    max_answer_bytes: int = 10_000_000
    """A larger answer is not read to its end."""
    retries: int = 5
    """Tries after the first, on 408, 409, 425, 429, 5xx, broken answers,
    connection errors and timeouts."""
    concurrency: int = 8
    """Requests in flight."""
    backoff_s: float = 0.5
    """Wait before the first retry; it doubles each time, up to 60 s, times a random factor in
    0.5..1. A server's Retry-After goes before it."""
    max_requests: int | None = None
    """Budget: most requests sent, retries and earlier starts included. Answers that are on disk
    cost nothing."""
    max_total_tokens: int | None = None
    """Budget: nothing is sent once answers have cost so many tokens, prompts included. Where the
    endpoint does not say what an answer cost, 3 characters are counted as a token."""

    def __post_init__(self):
        if set("@?#") & set(self.base_url):  # first of all, since other messages quote the address
            raise ValueError(
                "base_url must be an address alone, without a user, password or query; put the "
                "key into the "
                f"environment variable {self.api_key_env}"
            )
        url = urlsplit(self.base_url)
        if self.base_url and (url.scheme not in ("http", "https") or not url.hostname):
            raise ValueError(
                "base_url must begin with http:// or https:// and name a host, not "
                f"{self.base_url!r}"
            )
        if self.base_url and not self.model:
            raise ValueError(
                f"model is empty; give the name by which {self.base_url} knows the model"
            )
        if self.retries < 0 or self.concurrency < 1 or self.backoff_s < 0:
            raise ValueError("retries and backoff_s must be >= 0, concurrency >= 1")
        if min(self.timeout_s, self.deadline_s, self.max_answer_bytes) <= 0:
            raise ValueError("timeout_s, deadline_s and max_answer_bytes must be > 0")
        if min(self.max_requests or 0, self.max_total_tokens or 0) < 0:
            raise ValueError("max_requests and max_total_tokens must be >= 0, or None for no limit")


PATIENCE = frozenset(
    {
        "api_key_env",
        "timeout_s",
        "deadline_s",
        "max_answer_bytes",
        "retries",
        "concurrency",
        "backoff_s",
    }
    | {"max_requests", "max_total_tokens"}
)
"""Fields that change no answer: a run may go on with other values."""


class EndpointError(NoAnswer):
    """An endpoint did not give an answer. Kinds: `timeout`, `connection`, `http 500`, `error 429`
    (under HTTP 200), `not a chat completion`, `filtered`, `refused`, `no text`, `too large`,
    `configuration`, `budget spent`, `not sent`."""

    def __init__(self, message: str, kind: str, status: int | None = None):
        super().__init__(message, kind)
        self.status = status
        """Last HTTP status; None where there was none."""
        self.key = ""
        """Hash of the request."""

    @property
    def hopeless(self) -> bool:
        """No other conversation would get an answer either."""
        return self.kind in (CONFIGURATION, BUDGET_SPENT)


class _Transient(EndpointError):
    """Worth another try, after `wait_s` seconds where the server asked for a wait."""

    wait_s: float | None = None


class EndpointClient:
    """Asks an endpoint. Threads may share a client.

    The key is read from the environment when a request is sent;
    it is in no attribute, message or file.

    Args:
        config: which endpoint.
        journal: where answers are kept, and looked up before anything is sent;
          None: nothing is kept.
        sleep: waits between two tries, in seconds.
    """

    def __init__(
        self,
        config: EndpointConfig,
        journal: AnswerJournal | None = None,
        *,
        sleep: Callable[[float], object] = time.sleep,
    ):
        if not config.base_url:
            raise ValueError("base_url is empty: there is no endpoint to ask")
        self.config = config
        self.journal = journal
        self.requests_sent = 0 if journal is None else journal.sent
        """Retries and earlier starts included."""
        self.tokens_paid = 0 if journal is None else journal.tokens
        self._sleep = sleep
        self._lock = threading.Lock()

    def chat(self, messages: Sequence[Message], **params: Any) -> str:
        """The model's answer to a conversation (an `Answer`); on disk before it is returned.

        Args:
            messages: the conversation so far.
            **params: further fields of the request, as temperature or max_tokens.
                With `logprobs` the answer knows its first token's, where the endpoint tells them.

        Raises:
            EndpointError: no usable answer after all retries, one that no retry would mend,
              or the budget is spent.
            UserError: the journal cannot be written.
        """
        body = self._body(messages, params)
        key = request_key(self.config.base_url, body)
        kept = self._look_up(key)
        return self._ask(key, body) if kept is None else kept

    def chat_many(
        self, conversations: Sequence[Sequence[Message]], **params: Any
    ) -> list[str | EndpointError]:
        """Answers in order, equal conversations asked once;
        a failed one has its error in its place.

        After an error that would meet every conversation (a wrong key, a spent budget),
        or when none of the first requests came to anything, the others are not sent;
        those whose answer is on disk still get it.
        """
        bodies = [self._body(messages, params) for messages in conversations]
        keys = [request_key(self.config.base_url, body) for body in bodies]
        batch = _Batch(patience=2 * self.config.concurrency)

        def one(key: str, body: Mapping[str, Any]) -> str | EndpointError:
            try:
                kept = self._look_up(key)
                if kept is not None:
                    return kept
            except EndpointError as error:
                return error
            try:
                batch.check()
                answer = self._ask(key, body)
                batch.answered = True
                return answer
            except EndpointError as error:
                batch.failed(error)
                return error

        distinct = dict(zip(keys, bodies, strict=True))
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            answers = dict(
                zip(distinct, pool.map(one, distinct.keys(), distinct.values()), strict=True)
            )
        return [answers[key] for key in keys]

    def keep(self, errors: Iterable[EndpointError]) -> None:
        """Keeps failures as if they were answers. A caller that goes on without an answer calls
        this first: then it does the same when it is resumed, even if the endpoint is well again."""
        for error in errors:
            if self.journal is not None and not error.hopeless and error.kind != NOT_SENT:
                self.journal.keep(error.key, Failure(str(error), error.kind, error.status))

    def _body(self, messages: Sequence[Message], params: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.config.model, "messages": [dict(m) for m in messages], **params}

    def _look_up(self, key: str) -> str | None:
        kept = self.journal.get(key) if self.journal is not None else None
        if isinstance(kept, Failure):
            error = EndpointError(kept.error, kept.kind, kept.status)
            error.key = key
            raise error
        return kept

    def _ask(self, key: str, body: Mapping[str, Any]) -> str:
        sent = 0
        try:
            while True:
                self._spend()
                sent += 1
                try:
                    answer, tokens = self._post(body)
                    break
                except _Transient as error:
                    if sent > self.config.retries:
                        message = f"{error} (gave up after {sent} tries)"
                        raise EndpointError(message, error.kind, error.status) from error
                    self._sleep(self._wait(sent - 1, error.wait_s))
        except EndpointError as error:
            error.key = key
            if self.journal is not None and sent:
                self.journal.failed(key, body, Failure(str(error), error.kind, error.status), sent)
            raise
        with self._lock:
            self.tokens_paid += tokens
        return (
            answer
            if self.journal is None
            else self.journal.answered(key, body, answer, sent, tokens)
        )

    def _spend(self) -> None:
        """Counts one request, or raises where the budget has none left."""
        requests, tokens = self.config.max_requests, self.config.max_total_tokens
        with self._lock:
            if requests is not None and self.requests_sent >= requests:
                raise EndpointError(
                    f"budget spent: {requests} requests were sent (max_requests)", BUDGET_SPENT
                )
            if tokens is not None and self.tokens_paid >= tokens:
                raise EndpointError(
                    f"budget spent: answers cost {self.tokens_paid} tokens of {tokens} "
                    "(max_total_tokens)",
                    BUDGET_SPENT,
                )
            self.requests_sent += 1

    def _post(self, body: Mapping[str, Any]) -> tuple[str, int]:
        """(answer, tokens that it cost)."""
        c, url = self.config, self.config.base_url.rstrip("/") + "/chat/completions"
        secret = os.environ.get(c.api_key_env, "").strip()
        if not (secret.isascii() and secret.isprintable()):
            message = (
                f"the key in the environment variable {c.api_key_env} has characters that no key "
                "has"
            )
            raise EndpointError(message, CONFIGURATION)
        try:
            reply = post_json(url, body, secret, c.timeout_s, c.deadline_s, c.max_answer_bytes)
        except TransportError as error:
            known = _Transient if error.transient else EndpointError
            raise known(redacted(f"{url}: {error}", secret), error.kind) from None
        if reply.status != 200:
            raise self._refused(url, reply, secret)
        try:
            answer, content = completion(reply.content, reply.kind, secret)
        except NoCompletion as error:
            known = _Transient if error.transient else EndpointError
            raise known(f"{url}: {error}", error.kind, 200) from None
        if not body.get("logprobs"):
            answer = Answer(answer, None, answer.cut)
        return answer, tokens_paid_for(content, body, answer)

    def _refused(self, url: str, reply: Reply, secret: str) -> EndpointError:
        # Cut after the secret is out: half of it would no longer be found.
        text = redacted(reply.content.decode("utf-8", "replace"), secret)[:300]
        message = f"{url}: HTTP {reply.status}: {' '.join(text.split())}"
        if reply.status in _HOPELESS:
            hint = {401: "key", 402: "account", 403: "key"}.get(reply.status, "base_url and model")
            where = (
                f" (read from the environment variable {self.config.api_key_env})"
                if hint == "key"
                else ""
            )
            return EndpointError(f"{message}; check the {hint}{where}", CONFIGURATION, reply.status)
        if reply.status not in _RETRIED:
            return EndpointError(message, f"http {reply.status}", reply.status)
        error = _Transient(message, f"http {reply.status}", reply.status)
        error.wait_s = retry_after(reply.retry_after)
        return error

    def _wait(self, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, _LONGEST_WAIT_S)
        # The jitter keeps concurrent requests that failed together from coming back together.
        return min(self.config.backoff_s * 2**attempt, _LONGEST_WAIT_S) * random.uniform(0.5, 1.0)


class _Batch:
    """Ends a batch early where going on is in vain."""

    def __init__(self, patience: int):
        self.answered = False
        self._left = patience
        self._stopped_by: EndpointError | None = None
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises where the batch was ended."""
        error = self._stopped_by
        if error is not None:
            raise EndpointError(
                str(error), error.kind if error.hopeless else NOT_SENT, error.status
            )

    def failed(self, error: EndpointError) -> None:
        with self._lock:
            self._left -= 1
            if self._stopped_by is None and (
                error.hopeless or (self._left <= 0 and not self.answered)
            ):
                self._stopped_by = error


def request_key(base_url: str, body: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of what decides an answer: the endpoint and the request."""
    return hashlib.sha256(json.dumps([base_url, body], sort_keys=True).encode()).hexdigest()


def raise_hopeless(answers: Iterable[str | EndpointError], option: str) -> None:
    """Raises UserError if there is an error among answers that only the user can mend;
    `option` names the settings."""
    for error in answers:
        if isinstance(error, EndpointError) and error.hopeless:
            what = "raise it" if error.kind == BUDGET_SPENT else "mend it"
            raise UserError(
                f"{option}: {error}; {what} and start the same command again: every answer is kept"
            )
