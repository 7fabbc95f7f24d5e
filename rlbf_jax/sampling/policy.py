"""What answers: a program with its parameters, its tokenizer, its edit rule and its semantics.

rule = tokenizer.controls.rule()
policy = Policy(Single(config), params, tokenizer, rule, Semantics.KEEP, "base")
generations = policy.sample(["tell me"], seed=0)
logprobs = policy.score(generations)        # what was recorded, read in one pass
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rlbf_jax.directives import EditRule, Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.models.transformer import padded_width
from rlbf_jax.parallel.placing import fetched
from rlbf_jax.sampling.batching import SamplerConfig
from rlbf_jax.sampling.program import Params, Program
from rlbf_jax.sampling.request import Generation, Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, known_rule
from rlbf_jax.sampling.scoring import Scores, Traces, pack_traces, score
from rlbf_jax.tokenizers import Tokenizer

ROWS = 64
"""Most rows of a batch where nobody says; short lists take the next power of two."""
_BUCKET = 64
"""Traces that are scored are padded to multiples of this."""


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """What is sampled, scored, evaluated, attacked, exported and asked as a judge."""

    program: Program
    """What gives logits; `Single(config)` for one decoder."""
    params: Params
    """Arrays of the program."""
    tokenizer: Tokenizer
    rule: EditRule
    """What its control ids do; usually `tokenizer.controls.rule()`. Rows of the program beyond the
    tokenizer are never legal."""
    semantics: Semantics
    """Whether a retraction leaves the context or only the reader's view."""
    name: str = ""
    """For reports and messages: a stage, a folder."""

    def __post_init__(self):
        # One rule for what is sampled and what is scored.
        rule = known_rule(self.rule, self.program, self.tokenizer)
        object.__setattr__(self, "rule", rule)

    def replace(self, **changes: Any) -> Policy:
        """The same policy with other fields. Raises TypeError for a field it does not have."""
        return dataclasses.replace(self, **changes)

    def sampler(
        self, shapes: SamplerConfig | None = None, mesh: jax.sharding.Mesh | None = None
    ) -> Sampler:
        """A sampler under this policy's rule and semantics; `shapes.semantics` does not count.

        It is called with parameters: `policy.sampler(shapes)(policy.params, requests, key)`.
        """
        shapes = dataclasses.replace(shapes or SamplerConfig(), semantics=self.semantics)
        return Sampler(self.program, self.tokenizer, shapes, rule=self.rule, mesh=mesh)

    def sample(
        self, prompts: Sequence[str | Request], seed: int = 0, knobs: Knobs | None = None
    ) -> list[Generation]:
        """One response a prompt, in order.

        The batch has as many rows as the list needs (a power of two, `ROWS` at most), and the last
        bits of a log-probability depend on that number: where bits must not, use a `sampler`.

        Args:
          knobs: of prompts that are plain strings; a `Request` has its own.

        Raises InputError, before anything is sampled, for a request that cannot be run.
        """
        knobs = Knobs() if knobs is None else knobs
        requests = [p if isinstance(p, Request) else Request(p, (), knobs) for p in prompts]
        shapes = SamplerConfig(batch_size=_rows(len(requests)))
        return self.sampler(shapes)(self.params, requests, seed)

    def score(self, generations: Sequence[Generation]) -> list[np.ndarray]:
        """Log-probabilities of every emitted id, from one teacher-forced pass.

        float32 [E] a generation, NaN for forced ids: by the law of the sampler what was recorded,
        if this policy drew them. Mask, bias and temperature are those of each request's knobs.

        Raises ValueError for a trace longer than the table of learned positions, UserError where a
        log-probability is not a number.
        """
        logprobs: list[np.ndarray] = []
        size = _rows(len(generations))
        # Neighbors of one batch share its width.
        for start in range(0, len(generations), size):
            part = list(generations[start : start + size])
            ends = [len(g.prompt_ids) + len(g.trace) for g in part]
            width = padded_width(self.program, max(ends), _BUCKET, _BUCKET)
            filled = part + part[-1:] * (size - len(part))
            traces = pack_traces(filled, self.rule, width)
            read = fetched(
                _score(self.program, self.rule, self.semantics, self.params, traces).logprobs
            )
            for row, (g, end) in enumerate(zip(part, ends, strict=True)):
                values = read[row, len(g.prompt_ids) : end].astype(np.float32)
                # An id that is illegal here has -inf, which is an answer.
                if np.isnan(values[g.num_forced :]).any():
                    raise UserError(
                        f"generation {len(logprobs)}: the logits of {self.name or 'this policy'} "
                        "are not finite; look for NaN or inf in its parameters, or compute in "
                        "float32"
                    )
                values[: g.num_forced] = np.nan
                logprobs.append(values)
        return logprobs


def _rows(count: int) -> int:
    """Rows of a batch for so many requests: few numbers, few programs."""
    return min(ROWS, 1 << max(0, count - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score(
    program: Program, rule: EditRule, semantics: Semantics, params: Params, traces: Traces
) -> Scores:
    return score(program, params, rule, traces, semantics)
