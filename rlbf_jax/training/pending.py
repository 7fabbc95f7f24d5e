"""Rollouts that wait for their step: as arrays of fixed shapes, which a checkpoint keeps."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np

from rlbf_jax.directives import EditRule
from rlbf_jax.parallel import hosts
from rlbf_jax.sampling.engine import generation_of
from rlbf_jax.sampling.request import Generation, Request, prompt_of
from rlbf_jax.tokenizers import Tokenizer

T = TypeVar("T")


class Pending(NamedTuple):
    """Rollouts of the next step."""

    trace: Any
    """int32 [B, T] emitted ids, 0 behind the end."""
    logprobs: Any
    """float32 [B, T] as the sampler recorded them, NaN for forced ids."""
    length: Any
    """int32 [B] emitted ids."""
    ready: Any
    """bool scalar: false before the first rollouts, and behind the last ones."""


def nothing_pending(rows: int, width: int) -> Pending:
    """Of B rows with room for T ids (numpy)."""
    trace, logprobs = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.float32)
    return Pending(trace, logprobs, np.zeros(rows, np.int32), np.asarray(False))


def pending_of(generations: Sequence[Generation], width: int) -> Pending:
    """Rollouts as arrays (numpy). Raises ValueError for one that has more than `width` ids."""
    made = nothing_pending(len(generations), width)
    for row, g in enumerate(generations):
        count = len(g.trace)
        if count > width:
            raise ValueError(f"a rollout has {count} ids, there is room for {width}")
        made.trace[row, :count], made.logprobs[row, :count] = g.trace, g.logprobs
        made.length[row] = count
    return made._replace(ready=np.asarray(True))


def rollouts_of(
    pending: Pending, requests: Sequence[Request], rule: EditRule, tokenizer: Tokenizer
) -> list[Generation]:
    """The rollouts again, bit for bit, of the requests that they answer."""
    trace, logprobs, length, _ = jax.device_get(pending)
    return [
        generation_of(
            request, prompt_of(request, tokenizer.encode_prompt), trace[row, : length[row]],
            logprobs[row, : length[row]], rule, tokenizer, f"pending rollout {row}",
        )
        for row, request in enumerate(requests)
    ]  # fmt: skip


class Later(Generic[T]):
    """What a function returns, found in a thread meanwhile.

    The thread does not keep a process from ending: what it had begun is asked again.
    """

    def __init__(self, name: str, do: Callable[[], T]):
        self._found: list[T] = []
        self._failed: list[BaseException] = []

        def work() -> None:
            try:
                with hosts.apart(name):
                    self._found.append(do())
            except BaseException as error:
                self._failed.append(error)

        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def result(self) -> T:
        """Waits for it. Raises what the function raised."""
        while self._thread.is_alive():
            self._thread.join(0.5)  # a signal is heard between two waits
        if self._failed:
            raise self._failed[0]
        return self._found[0]
