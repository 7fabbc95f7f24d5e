"""What a reply says: its answer, whether it is whole, what it cost, when to come back."""

from __future__ import annotations

import email.utils
import json
import math
import time
from collections.abc import Mapping
from typing import Any

from rlbf_jax.endpoints.journal import Answer

CUT = frozenset({"length", "max_tokens"})
"""What servers call the end of an answer that had to stop at its most tokens."""
FILTERED = frozenset({"content_filter", "safety", "prohibited_content", "blocklist"})
"""What they call the end of an answer that a filter took away."""
_PASSING = range(500, 600)
SHORTEST_SECRET = 8
"""Shorter keys ("none", "EMPTY") are placeholders for servers that want none,
and words that an answer may hold."""


class NoCompletion(Exception):
    """A reply that holds no answer that could be used. `kind`: a word or two, for counting."""

    def __init__(self, message: str, kind: str, transient: bool = False):
        super().__init__(message)
        self.kind = kind
        self.transient = transient
        """Another try may do better."""


def completion(reply: bytes, content_type: str, secret: str) -> tuple[Answer, Mapping[str, Any]]:
    """The answer of a chat completion, and the whole reply.

    Raises NoCompletion: no chat completion; an error (some servers send one with status 200), in
    the server's own words; an answer that a filter took away or the model refused; no text.
    """
    try:
        content = json.loads(reply)
        if isinstance(content, dict) and not content.get("choices"):
            _raise_error(content, secret)
        choice = content["choices"][0]
        message, finish = choice["message"], str(choice.get("finish_reason")).lower()
        answer = message["content"]
        if isinstance(answer, str):
            answer.encode()  # half a surrogate pair is no text, and no file takes it
        refusal = message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise NoCompletion(
            f"the answer is not a chat completion ({type(error).__name__}, {content_type})",
            "not a chat completion",
            True,
        ) from None
    if finish in FILTERED:
        raise NoCompletion(f"a filter took the answer away ({finish})", "filtered")
    if refusal and not answer:
        raise NoCompletion(f"the model refused: {_words(refusal, secret)}", "refused")
    if not isinstance(answer, str):
        cut = ", cut off at its most tokens" if finish in CUT else ""
        raise NoCompletion(
            f"the answer has no text (content is {type(answer).__name__}{cut})", "no text"
        )
    first = first_token(content, secret)
    return Answer(redacted(answer, secret), first, finish in CUT), content


def _raise_error(content: Mapping[str, Any], secret: str) -> None:
    """Raises NoCompletion where a reply without choices is an error."""
    error = content.get("error") or (content if content.get("object") == "error" else None)
    if not error:
        return
    told = error if isinstance(error, Mapping) else {"message": error}
    code = told.get("code")
    passing = isinstance(code, int) and code in _PASSING
    number = f" {code}" if isinstance(code, int) else ""
    raise NoCompletion(
        f"HTTP 200 with an error: {_words(told.get('message') or told, secret)}",
        f"error{number}",
        passing,
    )


def _words(said: Any, secret: str) -> str:
    # Cut after the secret is out: half of it would no longer be found.
    return " ".join(redacted(str(said), secret)[:300].split())


def redacted(text: str, secret: str) -> str:
    """The text without the secret."""
    return text.replace(secret, "***") if len(secret) >= SHORTEST_SECRET else text


def tokens_paid_for(content: Mapping[str, Any], body: Mapping[str, Any], answer: str) -> int:
    """Tokens of a request and its answer: as the endpoint counts them, or about a third of the
    characters."""
    usage = content.get("usage")
    said = usage.get("total_tokens") if isinstance(usage, Mapping) else None
    if isinstance(said, int) and said >= 0:
        return said
    return (sum(len(str(m.get("content"))) for m in body["messages"]) + len(answer)) // 3 + 1


def first_token(content: Mapping[str, Any], secret: str) -> dict[str, float] | None:
    """Log-probabilities at the first token of an answer that is not blank;
    None where they are not there."""
    try:
        tokens = content["choices"][0]["logprobs"]["content"]
        first = next(token for token in tokens if token["token"].strip())
        told = [
            (str(t["token"]), float(t["logprob"])) for t in [*(first["top_logprobs"] or ()), first]
        ]
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
        return None
    return {redacted(token, secret): value for token, value in told if -math.inf < value <= 1e-3}


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (a number or an HTTP date);
    None where it says nothing usable."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
