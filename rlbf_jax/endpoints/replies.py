"""What a reply says beside its answer: tokens, first-token probabilities, when to come back."""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Mapping
from typing import Any

SHORTEST_SECRET = 8
"""Shorter keys ("none", "EMPTY") are placeholders for servers that want none,
and words that an answer may hold."""


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
