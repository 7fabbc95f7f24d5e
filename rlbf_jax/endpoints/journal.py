"""Answers of an endpoint on disk: JSON lines that only grow, on disk before anybody acts on them.

A run that is killed and started again finds every answer that it had received, so it asks and pays
for none of them twice, and goes on exactly as it would have.

An answer; one with log-probabilities that was cut off; tried in vain, and asked again; in vain,
and the run went on:

    {"key": ..., "request": ..., "answer": ..., "sent": 1, "tokens": 84}
    {..., "first_token": {"unsafe": -0.1, ...}, "cut": true}
    {"key": ..., "request": ..., "error": ..., "kind": ..., "status": 500, "sent": 6}
    {"key": ..., "error": ..., "kind": ..., "status": 500, "kept": true}
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlbf_jax.errors import UserError


class Answer(str):
    """An answer's text, with what else the model might have begun it with."""

    first_token: Mapping[str, float] | None
    """Log-probabilities of the likeliest first tokens that are not blank, by their text;
    None: not asked, or not told."""

    cut: bool
    """It had to stop at its most tokens, so its end is not the model's."""

    def __new__(
        cls, text: str, first_token: Mapping[str, float] | None = None, cut: bool = False
    ) -> Answer:
        answer = super().__new__(cls, text)
        answer.first_token = first_token
        answer.cut = cut
        return answer


def is_cut(answer: str) -> bool:
    """Whether an answer is known to have been cut off."""
    return isinstance(answer, Answer) and answer.cut


class NoAnswer(RuntimeError):
    """A model did not give an answer; `kind` says why in a word or two, for counting."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Failure:
    """A request that was given up, and whose failure the run has acted on."""

    error: str
    kind: str
    status: int | None


class AnswerJournal:
    """Answers by the hash of their request, in one JSON lines file.
    Threads may share it, processes may not.

    Raises:
        UserError: a line of the file is damaged, or the file cannot be read or written. A last line
            without its line break is what a kill leaves behind: it is cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        self.sent = 0
        """Requests sent so far, by earlier starts of the run as well."""
        self.tokens = 0
        """Tokens paid for so far, prompts included."""
        self._kept: dict[str, str | Failure] = {}
        self._lock = threading.Lock()
        try:
            self._load()
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); expected a journal of answers"
            ) from None

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> str | Failure | None:
        """The answer to a request, or the failure that was kept; None: it must be asked."""
        return self._kept.get(key)

    def answered(
        self, key: str, request: Mapping[str, Any], answer: str, sent: int, tokens: int
    ) -> str:
        """Writes an answer down and returns the one that counts:
        the first, where two threads asked the same."""
        with self._lock:
            self.sent, self.tokens = self.sent + sent, self.tokens + tokens
            first = getattr(answer, "first_token", None)
            told = {} if first is None else {"first_token": first}
            told |= {"cut": True} if is_cut(answer) else {}
            self._append(
                {
                    "key": key,
                    "request": request,
                    "answer": answer,
                    **told,
                    "sent": sent,
                    "tokens": tokens,
                }
            )
            kept = self._kept.get(key)
            if not isinstance(kept, str):
                self._kept[key] = kept = answer
            return kept

    def failed(self, key: str, request: Mapping[str, Any], failure: Failure, sent: int) -> None:
        """Writes down that requests were spent in vain: they count against a budget,
        and `get` still gives None."""
        with self._lock:
            self.sent += sent
            self._append(
                {"key": key, "request": request, **dataclasses.asdict(failure), "sent": sent}
            )

    def keep(self, key: str, failure: Failure) -> None:
        """From now on `get` gives this failure: the run goes on without an answer,
        and does so again when resumed."""
        with self._lock:
            if key not in self._kept:
                self._append({"key": key, **dataclasses.asdict(failure), "kept": True})
                self._kept[key] = failure

    def _append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                try:
                    if file.write(line) != len(line):
                        raise OSError(0, "the line did not fit; is the disk full?")
                    os.fsync(file.fileno())
                except OSError:
                    # Half a line in the middle of the file would make all that follows unreadable.
                    file.truncate(size)
                    raise
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); make room, then start again"
            ) from None

    def _load(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb+") as file:
            start = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    file.truncate(start)
                    return
                start += len(line)
                if line.strip():
                    self._read(number, line)

    def _read(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("key"), str):
                raise ValueError("it has no key")
            answer, error = row.get("answer"), row.get("error")
            if not isinstance(answer, str) and not isinstance(error, str):
                raise ValueError("it has neither answer nor error")
            sent, tokens, first = (
                int(row.get("sent", 0)),
                int(row.get("tokens", 0)),
                row.get("first_token"),
            )
            first = (
                None if first is None else {token: float(value) for token, value in first.items()}
            )
        except (ValueError, TypeError, AttributeError, RecursionError) as damage:
            raise UserError(
                f"{self.path}, line {number}: not a journaled answer "
                f"({' '.join(str(damage).split())}); delete the "
                "line, and its request is asked again"
            ) from None
        self.sent, self.tokens = self.sent + sent, self.tokens + tokens
        if isinstance(answer, str):
            if not isinstance(self._kept.get(row["key"]), str):
                self._kept[row["key"]] = Answer(answer, first, row.get("cut") is True)
        elif row.get("kept"):
            self._kept.setdefault(
                row["key"], Failure(str(error), str(row.get("kind")), row.get("status"))
            )
