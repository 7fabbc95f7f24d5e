"""One client for every OpenAI-compatible endpoint: concurrency, retries with backoff, an on-disk cache."""

from __future__ import annotations

import dataclasses
import email.utils
import hashlib
import json
import os
import pathlib
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from rlbf_jax.storage import write_whole

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_LONGEST_WAIT_S = 60.0
_local = threading.local()


class EndpointError(RuntimeError):
    """An endpoint did not give an answer; `status` is its last HTTP status, None where there was none."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class _Transient(EndpointError):
    """Worth another try, after `wait_s` seconds where the server asked for a wait."""

    wait_s: float | None = None


@dataclasses.dataclass(frozen=True)
class EndpointClient:
    """A chat model behind `POST {base_url}/chat/completions`.

    The secret is read from the environment when a request is sent; it is in no attribute, message or cache file.
    """

    base_url: str
    """As "http://127.0.0.1:8000/v1"."""
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; unset or empty: no Authorization header is sent."""
    timeout_s: float = 60.0
    """Longest wait to connect and between two pieces of an answer."""
    retries: int = 5
    """Tries after the first, on 408, 409, 425, 429, 5xx, broken answers, connection errors and timeouts."""
    concurrency: int = 8
    """Requests in flight in `chat_many`."""
    cache_dir: str | pathlib.Path | None = None
    """Answers are kept here by the hash of their request; None: no cache."""
    backoff_s: float = 0.5
    """Wait before the first retry; it doubles each time, up to 60 s, times a random factor in 0.5..1."""

    def __post_init__(self):
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, not {self.base_url!r}")
        if self.retries < 0 or self.concurrency < 1 or self.timeout_s <= 0:
            raise ValueError("retries must be >= 0, concurrency >= 1 and timeout_s > 0")

    def chat(self, messages: Sequence[Message], **params: Any) -> str:
        """The model's answer to a conversation.

        Args:
            messages: the conversation so far.
            **params: further fields of the request, as temperature or max_tokens.

        Raises:
            EndpointError: no usable answer after all retries, or one that no retry would mend (400, 401, 404, ...).
        """
        body = {"model": self.model, "messages": [dict(m) for m in messages], **params}
        path = self._cache_path(body)
        if path is not None:
            kept = _read_cache(path)
            if kept is not None:
                return kept
        for attempt in range(self.retries + 1):
            try:
                answer = self._post(body)
                break
            except _Transient as error:
                if attempt == self.retries:
                    raise EndpointError(f"{error} (gave up after {attempt + 1} tries)", error.status) from error
                time.sleep(self._wait(attempt, error.wait_s))
        if path is not None:
            _write_cache(path, {"request": body, "answer": answer})
        return answer

    def chat_many(self, conversations: Sequence[Sequence[Message]], **params: Any) -> list[str | EndpointError]:
        """Answers in order; a failed conversation has its error in its place."""

        def one(messages: Sequence[Message]) -> str | EndpointError:
            try:
                return self.chat(messages, **params)
            except EndpointError as error:
                return error

        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(one, conversations))

    def _post(self, body: Mapping[str, Any]) -> str:
        url = self.base_url.rstrip("/") + "/chat/completions"
        key = os.environ.get(self.api_key_env, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            response = _session().post(url, json=body, headers=headers, timeout=self.timeout_s)
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            raise _Transient(f"{url}: {type(error).__name__}; is the server up?") from error
        except requests.RequestException as error:
            raise EndpointError(f"{url}: {type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise self._refused(url, response, key)
        try:
            answer = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise _Transient(f"{url}: the answer is not a chat completion ({type(error).__name__})", 200) from error
        if not isinstance(answer, str):
            raise EndpointError(f"{url}: the answer has no text (content is {type(answer).__name__})", 200)
        return answer

    def _refused(self, url: str, response: requests.Response, key: str) -> EndpointError:
        text = response.text[:300]
        text = text.replace(key, "***") if key else text
        message = f"{url}: HTTP {response.status_code}: {text}"
        if response.status_code in (401, 403):
            message += f" (the key is read from the environment variable {self.api_key_env})"
        if response.status_code not in _RETRIED:
            return EndpointError(message, response.status_code)
        error = _Transient(message, response.status_code)
        error.wait_s = _retry_after(response.headers.get("Retry-After"))
        return error

    def _wait(self, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, _LONGEST_WAIT_S)
        # The jitter keeps concurrent requests that failed together from coming back together.
        return min(self.backoff_s * 2**attempt, _LONGEST_WAIT_S) * random.uniform(0.5, 1.0)

    def _cache_path(self, body: Mapping[str, Any]) -> pathlib.Path | None:
        if self.cache_dir is None:
            return None
        canonical = json.dumps([self.base_url, body], sort_keys=True, ensure_ascii=True)
        return pathlib.Path(self.cache_dir) / f"{hashlib.sha256(canonical.encode()).hexdigest()}.json"


def _session() -> requests.Session:
    """A session a thread: sessions keep connections alive and are not safe to share."""
    if not hasattr(_local, "session"):
        _local.session = requests.Session()
    return _local.session


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (a number or an HTTP date); None where it says nothing usable."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _read_cache(path: pathlib.Path) -> str | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["answer"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise EndpointError(f"{path}: not a cached answer ({error}); delete the file") from error


def _write_cache(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(record))
