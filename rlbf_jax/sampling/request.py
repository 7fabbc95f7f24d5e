"""What goes into the sampler and what comes out: `Knobs`, `Request`, `Generation`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rlbf_jax.directives import NEVER, Edit


@dataclasses.dataclass(frozen=True)
class Knobs:
    """Decoding parameters of one row. Every one is a traced array inside the sampler,
    so none recompiles it."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely ids; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of ids whose probability reaches p; 1 keeps all."""
    min_p: float = 0.0
    """Keep ids at least this share as likely as the likeliest; 0 keeps all."""
    control_bias: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of control ids, by name. Keys:
    a control token (`[BACKTRACK_BY_3]`), a category (`insult`), `categories` or `retractions`;
    what several keys say about one id adds up."""
    budget: int = 4
    """Most directives a response may start."""
    forbid_from: int = NEVER
    """No directive may start while `forbid_from <= emitted < forbid_to`.
    (0, NEVER) forbids all of them."""
    forbid_to: int = NEVER
    grammar: bool = True
    """After a category only a retraction (or a copy and then a retraction),
    and a retraction nowhere else."""
    max_tokens: int = 64
    """Most ids emitted, forced and control ids included."""
    stop_ids: tuple[int, ...] | None = None
    """Ids that end the response; None: the tokenizer's end of sequence."""

    def without_directives(self) -> Knobs:
        """The same knobs with directives forbidden everywhere."""
        return dataclasses.replace(self, forbid_from=0, forbid_to=NEVER)


@dataclasses.dataclass(frozen=True)
class Request:
    """One attempt: a prompt, response ids that are forced on the model, and knobs."""

    prompt: str
    forced: tuple[int, ...] = ()
    """Response ids placed before sampling starts. They are part of the response, hence retractable.
    """
    knobs: Knobs = Knobs()
    id: int | None = None
    """The row's key is fold_in(key, id); None: the index in the list of requests."""
    prompt_ids: tuple[int, ...] | None = None
    """What the response follows, from a builder that places template ids by id (a conversation, a
    bare text); None: `encode_prompt(prompt)`. `prompt` then is for display only."""


def prompt_of(request: Request, encode: Callable[[str], Sequence[int]]) -> Sequence[int]:
    """Ids that the response follows; `encode`: the tokenizer's `encode_prompt`."""
    return encode(request.prompt) if request.prompt_ids is None else request.prompt_ids


@dataclasses.dataclass(frozen=True)
class Generation:
    """One finished response."""

    text: str
    """Visible text, end of sequence left out."""
    trace: np.ndarray
    """int32 [E]: every emitted id in order, forced ids first, end of sequence last
    (if it was reached)."""
    edits: tuple[Edit, ...]
    """Executed retractions, in order."""
    logprobs: np.ndarray
    """float32 [E]: log-probability of each id under mask, bias and temperature; NaN for forced ids.
    """
    visible: tuple[int, ...]
    """Visible ids, a final end of sequence left out."""
    prompt_ids: np.ndarray
    """int32 [P]."""
    num_forced: int
    finished: bool
    """Ended with a stop id; false: ran into `max_tokens`."""
    malformed: int
    """Categories that no retraction followed."""
    request: Request
