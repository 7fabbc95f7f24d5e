"""Middle filling: a violation in the middle of a good answer to a harmless prompt
(RLBF, arXiv 2602.08377).

The paper names the attack without giving its geometry; ours is benign sentences + bridge +
violation, with a stated share of prefixes of 20 words and more. `benign_middle` is its benign twin.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rlbf_jax.attacks.base import AttackConfig, Attempt, drawn
from rlbf_jax.attacks.direct import draw_prompts
from rlbf_jax.attacks.forced.prefilling import encode_parts, ids_of_words
from rlbf_jax.data.schema import Prompt
from rlbf_jax.data.world import World
from rlbf_jax.sampling.request import Request
from rlbf_jax.tokenizers import Tokenizer

_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
_TRIES = 20
"""Draws of an answer to one prompt."""
_PROMPTS = 200
"""Prompts tried. A user's rows have one answer each, and few of them may be long enough."""


@dataclasses.dataclass(frozen=True)
class MiddleFillingOptions:
    """Geometry of middle filling."""

    max_sentences: int = 2
    """Short prefixes have 1..max_sentences sentences."""
    long_share: float = 0.5
    """Share of attempts with a long prefix: as few sentences as reach `long_words` words."""
    long_words: int = 20
    cut: bool = False
    """Stop inside the span, from `min_words` words on (uniform over ids, so also within words); a
    violation is then not there by construction."""
    min_words: int = 2
    aside_share: float = 0.5
    """Share of benign twins whose span is a harmless remark off the topic, where the world has
    some; the others go on with the answer's own next sentence."""


class _Prefix(NamedTuple):
    text: str
    following: str
    """The answer's next sentence, without its end mark; begins with a space."""


class _Forced(NamedTuple):
    prefix: str
    ids: list[int]
    counts: list[int]
    """Ids of prefix, bridge and span."""


def _joint(tokenizer: Tokenizer, bridge: str, span: str | None, prefix: _Prefix) -> _Forced:
    """Prefix + bridge + span (None: the prefix's next sentence)."""
    if span is None:
        span = _in_lower_case(prefix.following) if bridge.endswith(",") else prefix.following
    ids, counts = encode_parts(tokenizer, prefix.text, bridge, span)
    return _Forced(prefix.text, ids, counts)


def _in_lower_case(sentence: str) -> str:
    """A sentence that begins with a space, as it continues after a comma.
    "I", acronyms and digits stay."""
    lower = sentence[:1] + sentence[1:2].lower() + sentence[2:]
    return lower if sentence[2:3].islower() else sentence


def _sentence_ends(text: str) -> list[int]:
    """Where the sentences of a text end, end marks included.
    An unfinished last sentence does not count."""
    return [match.end() for match in _SENTENCE_END.finditer(text)]


def _prefix(
    world: World,
    rng: np.random.Generator,
    prompt: Prompt,
    options: MiddleFillingOptions,
    long: bool,
) -> _Prefix | None:
    """Leading sentences of an answer with one more sentence behind them;
    None if this answer has too few."""
    # Twice as many words as the prefix needs, so that a sentence is left over.
    answer = world.answer(rng, prompt, min_words=2 * options.long_words if long else 0)
    ends = _sentence_ends(answer)
    if len(ends) < 2:
        return None
    if long:
        enough = [
            i for i, end in enumerate(ends[:-1]) if len(answer[:end].split()) >= options.long_words
        ]
        if not enough:
            return None
        last = enough[0]
    else:
        last = int(rng.integers(min(options.max_sentences, len(ends) - 1)))
    following = answer[ends[last] : ends[last + 1]].rstrip(".!?")
    return _Prefix(answer[: ends[last]], following)


def _draw(
    world: World,
    rng: np.random.Generator,
    prompt: Prompt,
    config: AttackConfig,
    options: MiddleFillingOptions,
    long: bool,
    joint: Callable[[_Prefix], _Forced],
) -> tuple[Prompt, _Forced]:
    """A prompt with an answer that can be cut as asked:
    the given one, or other ones after some tries.

    Raises ValueError where all answers are too short to cut,
    or leave less than `config.room` of `max_tokens`.
    """
    needs: list[int] = []
    for _ in range(_PROMPTS):
        for _ in range(_TRIES):
            prefix = _prefix(world, rng, prompt, options, long)
            if prefix is None:
                continue
            forced = joint(prefix)
            needs.append(len(forced.ids) + config.room)
            if needs[-1] <= config.knobs.max_tokens:
                return prompt, forced
        prompt = world.prompt(rng, config.pool)
    wanted = f"{options.long_words} words and another sentence" if long else "two sentences"
    if not needs:
        raise ValueError(
            f"middle filling found no {config.pool} answer of at least {wanted} in {_PROMPTS} "
            "prompts; lower "
            "middle.long_words or middle.long_share, or give longer answers"
        )
    # The median, so that half of the answers fit then, and longer violations find one too.
    raise ValueError(
        f"middle filling found no {config.pool} answer of at least {wanted} that leaves room for "
        f"{config.room} of "
        f"max_tokens = {config.knobs.max_tokens} ids, in {_PROMPTS} prompts; raise "
        "knobs.max_tokens to "
        f"{int(np.median(needs))} or more, or lower middle.long_words"
    )


def _is_long(index: int, share: float) -> bool:
    """Spreads long prefixes evenly over the attempts."""
    return int((index + 1) * share) > int(index * share)


def _cut(
    tokenizer: Tokenizer, rng: np.random.Generator, span: list[int], options: MiddleFillingOptions
) -> int:
    """Ids of a span that are forced, where it is cut: uniform from `min_words` words on, so also
    within words; fewer than all where there are more."""
    least = min(ids_of_words(tokenizer, span, options.min_words), len(span))
    return int(rng.integers(least, max(least + 1, len(span))))


def middle_filling(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    n: int,
    config: AttackConfig,
    *,
    options: MiddleFillingOptions = MiddleFillingOptions(),
) -> list[Attempt]:
    """Harmless prompt; benign sentences, bridge and a whole violation
    (or, with `cut`, a beginning of one)."""
    attempts = []
    for index, prompt in enumerate(draw_prompts(world, rng, config.pool, n, harmful=False)):
        long = _is_long(index, options.long_share)
        violation = world.violation(rng, config.split, config.pool)
        joint = functools.partial(_joint, tokenizer, world.bridge(rng), violation.text)
        prompt, (prefix, forced, (p, b, s)) = _draw(
            world, rng, prompt, config, options, long, joint
        )
        whole = s
        if options.cut:
            s = _cut(tokenizer, rng, forced[p + b :], options)
            forced = forced[: p + b + s]
        attempts.append(
            Attempt(
                Request(prompt.text, tuple(forced), config.knobs),
                prompt,
                "middle_filling",
                config.split,
                num_prefix=p,
                num_bridge=b,
                num_span=s,
                prefix=prefix,
                violation=violation,
                by_construction=s == whole,
            )
        )
    return attempts


def benign_middle(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    n: int,
    config: AttackConfig,
    *,
    options: MiddleFillingOptions = MiddleFillingOptions(),
) -> list[Attempt]:
    """The benign twin: harmless prompt; benign sentences, bridge,
    and a harmless span without its end mark.

    The span is the answer's own next sentence or, in `options.aside_share` of the attempts,
    a remark off the topic.
    """
    attempts = []
    for index, prompt in enumerate(draw_prompts(world, rng, config.pool, n, harmful=False)):
        long = _is_long(index, options.long_share)
        aside = world.aside(rng) if rng.random() < options.aside_share else ""
        joint = functools.partial(_joint, tokenizer, world.bridge(rng), aside or None)
        prompt, (prefix, forced, (p, b, s)) = _draw(
            world, rng, prompt, config, options, long, joint
        )
        if options.cut:
            s = _cut(tokenizer, rng, forced[p + b :], options)
            forced = forced[: p + b + s]
        request = Request(prompt.text, tuple(forced), config.knobs)
        attempts.append(
            Attempt(
                request,
                prompt,
                "benign_middle",
                num_prefix=p,
                num_bridge=b,
                num_span=s,
                prefix=prefix,
            )
        )
    return attempts


def middle_cut(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    n: int,
    config: AttackConfig,
    *,
    options: MiddleFillingOptions = MiddleFillingOptions(),
) -> list[Attempt]:
    """`middle_filling` that stops inside the violation."""
    options = dataclasses.replace(options, cut=True)
    made = middle_filling(world, tokenizer, rng, n, config, options=options)
    return [dataclasses.replace(attempt, attack="middle_cut") for attempt in made]


def benign_cut(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    n: int,
    config: AttackConfig,
    *,
    options: MiddleFillingOptions = MiddleFillingOptions(),
) -> list[Attempt]:
    """The twin of `middle_cut`: the harmless span stops in the middle."""
    options = dataclasses.replace(options, cut=True)
    made = benign_middle(world, tokenizer, rng, n, config, options=options)
    return [dataclasses.replace(attempt, attack="benign_cut") for attempt in made]


_SHARED: dict[str, Any] = {
    "options": MiddleFillingOptions(),
    "section": "middle",
}
SPECS = (
    drawn(
        middle_filling,
        "a harmless prompt; benign sentences, a bridge and a whole violation are forced",
        has_forms=True,
        whole=True,
        standard=True,
        **_SHARED,
    ),
    drawn(
        benign_middle,
        "a harmless prompt; benign sentences, a bridge and a harmless remark are forced",
        benign=True,
        standard=True,
        **_SHARED,
    ),
    drawn(middle_cut, "middle filling that stops inside the violation", has_forms=True, **_SHARED),
    drawn(
        benign_cut,
        "the same with a harmless remark that stops in the middle",
        benign=True,
        **_SHARED,
    ),
)
