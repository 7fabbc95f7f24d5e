"""A policy as other people's harnesses want it: conversations in, visible text out.

What the lm-eval and inspect_ai adapters share. A harness sees only what a reader sees:
edits are applied, control ids never become text, and a stop string ends the answer
at the moment it stands in the visible text.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import inspect
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlbf_jax.errors import InputError, UserError
from rlbf_jax.sampling.checks import check_knobs
from rlbf_jax.sampling.policy import Policy
from rlbf_jax.sampling.request import Generation, Knobs, Request
from rlbf_jax.sampling.sampler import SamplerConfig
from rlbf_jax.tokenizers import Tokenizer


def refuse_unknown(unknown: Mapping[str, Any], model: type, option: str) -> None:
    """Raises UserError for an argument that a model of ours does not have; names the nearest."""
    if not unknown:
        return
    own = inspect.signature(model).parameters.values()
    known = [p.name for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    name = next(iter(unknown))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(f"{option} {name}: no such argument{hint}; expected some of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class Question:
    """One request of a harness, as ids."""

    prompt_ids: tuple[int, ...]
    forced: tuple[int, ...] = ()
    knobs: Knobs = Knobs()
    text: str = ""
    """For display."""
    seed: int = 0
    stops: tuple[str, ...] = ()
    """Decoding ends soon after one of these stands in the visible text; `visible_until` cuts."""


class QuestionSampler:
    """Samples answers to a harness's questions.
    The key of an answer depends on its prompt, its seed and how often that prompt came before,
    not on the order or company in which a harness asks."""

    def __init__(
        self,
        policy: Policy,
        batch_size: int,
        max_length: int,
        seed: int = 0,
        directives: bool = True,
    ):
        """`directives`: whether answers may take anything back."""
        self.policy = policy
        self.directives = directives
        self.max_length = max_length
        self.seed = seed
        self._asked: collections.Counter[tuple[int, ...]] = collections.Counter()
        shapes = SamplerConfig(
            batch_size=batch_size,
            min_context=128,
            min_room=128,
            bucket=128,
            max_context=max_length,
        )
        self._sampler = policy.sampler(shapes)

    def answer(self, questions: Sequence[Question]) -> list[Generation]:
        """One generation a question, in order;
        a prompt that leaves no room for `max_tokens` loses its beginning.

        Raises InputError as `check` does.
        """
        requests = [self._request(question) for question in questions]
        # Neighbors of about one length share a compiled width.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids or ()))
        stops = [questions[i].stops for i in order]

        def ended(place: int, generation: Generation) -> bool:
            return is_settled(generation, self.policy.tokenizer, stops[place])

        generations = self._sampler(
            self.policy.params,
            [requests[i] for i in order],
            self.seed,
            ended if any(stops) else None,
        )
        by_place = dict(zip(order, generations, strict=True))
        return [by_place[i] for i in range(len(requests))]

    def check(self, question: Question) -> None:
        """Raises InputError for knobs out of range, or `max_tokens`
        that leave no room for a prompt."""
        check_knobs(question.knobs)
        if self._room(question) < 1:
            raise InputError(
                f"max_tokens is {question.knobs.max_tokens}, {len(question.forced)} ids are "
                "forced, and the model's "
                f"texts have {self.max_length} ids in all; lower max_tokens"
            )

    def _room(self, question: Question) -> int:
        """Ids left for the prompt."""
        return self.max_length - question.knobs.max_tokens - len(question.forced)

    def _request(self, question: Question) -> Request:
        self.check(question)
        knobs = question.knobs if self.directives else question.knobs.without_directives()
        knobs = dataclasses.replace(knobs, max_tokens=knobs.max_tokens + len(question.forced))
        ids = question.prompt_ids[-self._room(question) :]
        repeat = self._asked[ids]
        self._asked[ids] += 1
        id_ = zlib.crc32(repr((ids, repeat, question.seed)).encode()) & 0x7FFFFFFF
        return Request(question.text, question.forced, knobs, id_, ids)


def visible_until(generation: Generation, tokenizer: Tokenizer, stops: Sequence[str]) -> str:
    """The visible text of a generation up to the first stop string, forced ids left out.

    A reader who stops at a stop string stops when it first stands in the text,
    whatever the model would have taken back later; so the text before each edit is looked
    at in turn, then the final one.
    """
    shown = ""
    for shown in _shown(generation, tokenizer):
        if (at := _first(shown, stops)) is not None:
            return shown[:at]
    return shown


def is_settled(generation: Generation, tokenizer: Tokenizer, stops: Sequence[str]) -> bool:
    """Whether `visible_until` stays what it is, whatever follows."""
    *before, now = _shown(generation, tokenizer)
    if any(_first(shown, stops) is not None for shown in before):
        return True
    at = _first(now, stops)
    # A longer stop string may have begun before this one and not be complete yet.
    return at is not None and len(now) >= at + max(map(len, stops))


def _shown(generation: Generation, tokenizer: Tokenizer) -> Iterator[str]:
    """What a reader saw before each edit and in the end, forced ids left out."""
    forced = [int(token) for token in generation.trace[: generation.num_forced]]
    opening = tokenizer.decode(forced)
    for text in (*(tokenizer.decode(edit.before) for edit in generation.edits), generation.text):
        # What was forced is the harness's own; where (a part of) it was taken back,
        # all that is left is the answer.
        yield text[len(opening) :] if text.startswith(opening) else text


def _first(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins."""
    return min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=None)
