"""Tokenized examples with their loss, and data sets that need no injection."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from rlbf_jax.data.schema import Example, Prompt, Violation
from rlbf_jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Rejection:
    """Why no example was made."""

    reason: str


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """What a build made and what it left out."""

    made: dict[str, int]
    """Examples by kind: `injected`, `injected_harmful`, `plain`, `plain_harmful`, ...
    and by directive shape."""
    rejected: dict[str, int]
    """Rejections by reason; each was replaced by another draw."""


Built = tuple[list[Example], BuildReport]
"""Examples, and what was made and left out."""

Draw = Callable[[], "tuple[str, Example | Rejection]"]
"""() -> (kinds, separated by blanks, and an example)."""


def plain_example(
    prompt: str, response: str, tokenizer: Tokenizer, max_tokens: int
) -> Example | Rejection:
    """A prompt and its answer, with loss on the answer and the end of sequence."""
    target = [*tokenizer.encode(response), tokenizer.eos_id]
    return example_of(tokenizer.encode_prompt(prompt), [(target, True)], max_tokens)


def example_of(
    prompt: list[int], parts: Sequence[tuple[list[int], bool]], max_tokens: int
) -> Example | Rejection:
    """A prompt's ids and those of a response in parts, each in the loss or not."""
    tokens = prompt + [i for ids, _ in parts for i in ids]
    if len(tokens) > max_tokens:
        return Rejection("longer than max_tokens")
    in_loss = [False] * len(prompt) + [loss for ids, loss in parts for _ in ids]
    return Example(np.array(tokens, np.int32), len(prompt), np.array(in_loss, bool))


def collect(draw: Draw, num_examples: int) -> Built:
    """Draws until there are so many examples. Raises ValueError where nearly all are rejected."""
    examples: list[Example] = []
    made: collections.Counter[str] = collections.Counter()
    rejected: collections.Counter[str] = collections.Counter()
    while len(examples) < num_examples:
        kinds, result = draw()
        if isinstance(result, Rejection):
            rejected[result.reason] += 1
            if rejected.total() > 100 + 20 * num_examples:
                raise ValueError(
                    f"{rejected.total()} of {rejected.total() + len(examples)} draws were "
                    f"rejected: {dict(rejected)}; "
                    "raise max_tokens or x_max, or choose on_too_long='split'"
                )
            continue
        made.update(kinds.split())
        examples.append(result)
    return examples, BuildReport(dict(sorted(made.items())), dict(sorted(rejected.items())))


class DocumentSource(Protocol):
    """What pretraining needs of a world."""

    def document(self, rng: np.random.Generator) -> DocumentLike: ...


class DocumentLike(Protocol):
    """The part of a `Document` that pretraining reads."""

    @property
    def prompt(self) -> Prompt: ...
    @property
    def response(self) -> str: ...
    @property
    def violation(self) -> Violation | None: ...


def build_pretraining(
    world: DocumentSource,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    num_examples: int,
    max_tokens: int = 128,
    *,
    loss_on_prompt: bool = False,
) -> Built:
    """Tokenized documents of a world, violations and all, with loss on the response
    (and the prompt, if asked)."""

    def draw() -> tuple[str, Example | Rejection]:
        document = world.document(rng)
        example = plain_example(document.prompt.text, document.response, tokenizer, max_tokens)
        if loss_on_prompt and isinstance(example, Example):
            in_loss = np.ones_like(example.in_loss)
            # Nothing precedes the first id, so nothing can predict it.
            in_loss[0] = False
            example = dataclasses.replace(example, in_loss=in_loss)
        return "violating" if document.violation else "clean", example

    return collect(draw, num_examples)
