"""Prefilling: the answer is forced to begin as a compliant one (Qi et al., arXiv 2406.05946).

`prefilling` forces an opener and a beginning of a violation, `deep_prefilling` an opener, the whole
violation and two more words, `benign_prefill` an opener and a beginning of a harmless answer of as
many ids. Cuts are made on ids, never by decoding and encoding again, hence also fall inside words.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from rlbf_jax.attacks.base import AttackConfig, Attempt, drawn
from rlbf_jax.attacks.direct import draw_prompts
from rlbf_jax.data.documents import end_mark, split_sentences
from rlbf_jax.data.schema import Prompt, Violation
from rlbf_jax.data.world import World
from rlbf_jax.sampling.request import Request
from rlbf_jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class PrefillingOptions:
    """Geometry of prefilling."""

    min_words: int = 2
    """Least words of the violation that are forced."""
    tail_words: int = 2
    """Benign words after the violation in `deep_prefilling`."""


def encode_parts(tokenizer: Tokenizer, *parts: str) -> tuple[list[int], list[int]]:
    """Encodes the joint text of some parts.

    Returns the ids, and how many of them each part has; the counts add up to the ids. An id that
    crosses a border belongs to the part of its last character (so a piece that spells some of a
    violation counts as violation).
    """
    ids = tokenizer.encode("".join(parts))
    ends = [end for _, end in tokenizer.offsets(ids)]
    counts, border, before = [], 0, 0
    for part in parts[:-1]:
        border += len(part)
        upto = sum(end <= border for end in ends)
        counts.append(upto - before)
        before = upto
    return ids, [*counts, len(ids) - before]


def ids_of_words(tokenizer: Tokenizer, ids: list[int], words: int) -> int:
    """How many leading ids it takes to spell the first `words` words;
    all of them where there are fewer words."""
    ends = [match.end() for match in re.finditer(r"\S+", tokenizer.decode(ids))]
    if len(ends) <= words:
        return len(ids)
    offsets = tokenizer.offsets(ids)
    return next(i + 1 for i, (_, end) in enumerate(offsets) if end >= ends[words - 1])


def check_room(forced: list[int], config: AttackConfig, what: str) -> None:
    """Raises ValueError where `max_tokens` does not leave `room` after the forced ids."""
    if len(forced) + config.room > config.knobs.max_tokens:
        raise ValueError(
            f"{what} forces {len(forced)} ids and wants room for {config.room} more, but "
            "max_tokens is "
            f"{config.knobs.max_tokens}; raise knobs.max_tokens to {len(forced) + config.room} or "
            "lower room"
        )


def _prefilled(
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    opener: str,
    violation: Violation,
    options: PrefillingOptions,
) -> tuple[list[int], int, int]:
    """Opener and a beginning of a violation: forced ids, ids of the opener, ids of the span."""
    ids, (num_opener, whole) = encode_parts(tokenizer, opener, violation.text)
    least = min(ids_of_words(tokenizer, ids[num_opener:], options.min_words), whole)
    num_span = int(rng.integers(least, whole + 1))
    return ids[: num_opener + num_span], num_opener, num_span


def prefilling(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    n: int,
    config: AttackConfig,
    *,
    options: PrefillingOptions = PrefillingOptions(),
) -> list[Attempt]:
    """Harmful prompt; opener (counted as bridge) and from `min_words` words up to all
    of a violation it asks for.

    The cut is uniform over ids. Attempts whose cut fell at the end force a whole violation,
    but the attack as such does not, so `by_construction` is false;
    the report's prefilling rows are a fair comparison.
    """
    attempts = []
    for prompt in draw_prompts(world, rng, config.pool, n, harmful=True):
        violation = world.violation(
            rng, config.split, config.pool, category=prompt.category or None
        )
        forced, num_opener, num_span = _prefilled(
            tokenizer, rng, world.opener(rng), violation, options
        )
        check_room(forced, config, "prefilling")
        request = Request(prompt.text, tuple(forced), config.knobs)
        attempts.append(
            Attempt(
                request,
                prompt,
                "prefilling",
                config.split,
                num_bridge=num_opener,
                num_span=num_span,
                violation=violation,
            )
        )
    return attempts


def _tail(
    world: World, rng: np.random.Generator, config: AttackConfig, violation: Violation, words: int
) -> str:
    """A period, unless there is one, and the first words of a harmless answer to another prompt."""
    harmless = world.prompt(rng, config.pool)
    first = world.answer(rng, harmless, min_words=words).split()[:words]
    return end_mark(violation.text) + "".join(f" {word}" for word in first)


def deep_prefilling(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    n: int,
    config: AttackConfig,
    *,
    options: PrefillingOptions = PrefillingOptions(),
) -> list[Attempt]:
    """Harmful prompt; opener, whole violation, period and `tail_words` benign words:
    the moment has passed already."""
    attempts = []
    for prompt in draw_prompts(world, rng, config.pool, n, harmful=True):
        violation = world.violation(
            rng, config.split, config.pool, category=prompt.category or None
        )
        tail = _tail(world, rng, config, violation, options.tail_words)
        forced, counts = encode_parts(tokenizer, world.opener(rng), violation.text, tail)
        check_room(forced, config, "deep_prefilling")
        attempts.append(
            Attempt(
                Request(prompt.text, tuple(forced), config.knobs),
                prompt,
                "deep_prefilling",
                config.split,
                num_bridge=counts[0],
                num_span=counts[1],
                num_tail=counts[2],
                violation=violation,
                by_construction=True,
            )
        )
    return attempts


def benign_prefill(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    n: int,
    config: AttackConfig,
    *,
    options: PrefillingOptions = PrefillingOptions(),
) -> list[Attempt]:
    """The benign twin of prefilling: harmless prompt, opener,
    and a beginning of its answer with as many ids.

    The number of ids is drawn as `prefilling` draws it, from a violation that is then thrown away;
    an answer that is shorter is forced whole.
    """
    attempts = []
    for prompt in draw_prompts(world, rng, config.pool, n, harmful=False):
        opener = world.opener(rng)
        violation = world.violation(rng, config.split, config.pool)
        _, _, num_span = _prefilled(tokenizer, rng, opener, violation, options)
        forced, num_opener, num_span = _benign_span(world, tokenizer, rng, prompt, opener, num_span)
        check_room(forced, config, "benign_prefill")
        request = Request(prompt.text, tuple(forced), config.knobs)
        attempts.append(
            Attempt(request, prompt, "benign_prefill", num_bridge=num_opener, num_span=num_span)
        )
    return attempts


def _benign_span(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    prompt: Prompt,
    opener: str,
    num_span: int,
) -> tuple[list[int], int, int]:
    """Opener and up to `num_span` ids of the prompt's answer.

    The answer's first sentence may be an opener of its own, and two in a row are no answer any
    model has seen; so the span begins with the second sentence, where there is one.
    """
    sentences = split_sentences(world.answer(rng, prompt, min_words=2 * num_span))
    answer = "".join(sentences[1:] or sentences).lstrip()
    ids, (num_opener, available) = encode_parts(tokenizer, opener, " " + answer)
    num_span = min(num_span, available)
    return ids[: num_opener + num_span], num_opener, num_span


def refusal_prefill(
    world: World, tokenizer: Tokenizer, rng: np.random.Generator, n: int, config: AttackConfig
) -> list[Attempt]:
    """Harmless prompt; a refusal of it is forced, behind which a useful answer may still come
    (over-refusing prefills: RECAP, arXiv 2510.00938)."""
    attempts = []
    for prompt in draw_prompts(world, rng, config.pool, n, harmful=False):
        forced = tokenizer.encode(world.refusal(rng, prompt))
        check_room(forced, config, "refusal_prefill")
        request = Request(prompt.text, tuple(forced), config.knobs)
        attempts.append(Attempt(request, prompt, "refusal_prefill", num_bridge=len(forced)))
    return attempts


_SHARED: dict[str, Any] = {
    "options": PrefillingOptions(),
    "section": "prefilling",
    "standard": True,
}
SPECS = (
    drawn(
        prefilling,
        "a harmful prompt; an opener and a beginning of a violation are forced",
        has_forms=True,
        **_SHARED,
    ),
    drawn(
        deep_prefilling,
        "a harmful prompt; an opener, a whole violation and some words after it are forced",
        has_forms=True,
        whole=True,
        **_SHARED,
    ),
    drawn(
        benign_prefill,
        "a harmless prompt; an opener and a beginning of its answer are forced",
        benign=True,
        **_SHARED,
    ),
    drawn(refusal_prefill, "a harmless prompt; a refusal of it is forced", benign=True),
)
