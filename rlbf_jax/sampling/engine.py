"""What may answer requests in place of our sampler, and how emitted ids become a `Generation`.

An engine of another project (vLLM, tunix, a server) gives ids and log-probabilities; wrapped as an
`Engine` it collects rollouts and answers evaluations as `Sampler` does:

    class Theirs:
        def __init__(self, engine, tokenizer, rule): ...

        def __call__(self, params, prompts, key=0):
            requests = [p if isinstance(p, Request) else Request(p) for p in prompts]
            answers = self.engine.sample(...)   # ids and log-probabilities, in order
            return [
                generation_of(request, prompt_ids, ids, logprobs, self.rule, self.tokenizer)
                for ...
            ]

What it samples has to be what the scorer reads: KEEP semantics (no other engine rewinds), and log-
probabilities under the requests' knobs. Training warns where the two differ (`training/guards.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from rlbf_jax.directives import EditRule, render
from rlbf_jax.sampling.batching import stop_ids
from rlbf_jax.sampling.checks import check_drawn
from rlbf_jax.sampling.request import Generation, Request
from rlbf_jax.tokenizers import Tokenizer


@runtime_checkable
class Engine(Protocol):
    """Answers requests; `Sampler` is one."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of prompts and answers."""

    @property
    def rule(self) -> EditRule:
        """What control ids do to an answer."""

    def __call__(
        self, params: Any, prompts: Sequence[str | Request], key: jax.Array | int = 0
    ) -> list[Generation]:
        """One response a prompt, in order. `params` are the newest of the policy."""


def generation_of(
    request: Request,
    prompt_ids: Sequence[int],
    trace: np.ndarray,
    logprobs: np.ndarray,
    rule: EditRule,
    tokenizer: Tokenizer,
    where: str = "a request",
) -> Generation:
    """What was emitted, as its reader sees it.

    Args:
      prompt_ids: what the response follows.
      trace: int [E], every emitted id, forced ids first.
      logprobs: float [E], NaN for forced ids and no others.
      where: what names the request in messages.

    Raises UserError where an id or a log-probability is none.
    """
    check_drawn(where, trace, logprobs, len(request.forced))
    stops = stop_ids(request.knobs, tokenizer.eos_ids)
    rendered = render(rule, trace)
    finished = len(trace) > 0 and int(trace[-1]) in stops
    # The end is the last visible id, unless it came inside a copy, which nobody sees.
    ended = finished and rendered.kinds[-1] == "content"
    visible = rendered.visible[:-1] if ended else rendered.visible
    return Generation(
        text=tokenizer.decode(visible),
        trace=np.asarray(trace, np.int32),
        edits=rendered.edits,
        logprobs=np.asarray(logprobs, np.float32),
        visible=visible,
        prompt_ids=np.asarray(prompt_ids, np.int32),
        num_forced=len(request.forced),
        finished=finished,
        malformed=rendered.malformed,
        request=request,
    )
