"""The policy's own mistakes: prefixes at which the critic found a violation that the policy wrote
and left standing, first in, first out.

They are replayed as forced ids of later rollouts, whose own ids alone are trained on. After
Self-ReSET (arXiv 2605.08936), which cuts where a guard of tokens first objects; here a critic of
whole texts says where. Arrays of fixed shapes, which a checkpoint keeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlbf_jax.critics.judging import Judged
from rlbf_jax.directives import EditRule, render
from rlbf_jax.sampling.request import Generation, prompt_of
from rlbf_jax.tokenizers import Tokenizer
from rlbf_jax.training.rollouts import PromptSource, Rollout

LEAST_ROOM = 8
"""Ids that must be left to a replayed rollout."""


class Mistakes(NamedTuple):
    """The newest K of them."""

    prefix: Any
    """int32 [K, T] emitted ids up to the violation's last one, 0 behind the end."""
    length: Any
    """int32 [K] of a prefix."""
    origin: Any
    """int32 [K, 2]: step and place of the rollout's prompt in the prompt source."""
    count: Any
    """int32 scalar: how many were ever written; number n is in row n mod K."""


def no_mistakes(kept: int, width: int) -> Mistakes:
    """Room for `kept` prefixes of `width` ids (numpy)."""
    prefix, origin = np.zeros((kept, width), np.int32), np.zeros((kept, 2), np.int32)
    return Mistakes(prefix, np.zeros(kept, np.int32), origin, np.zeros((), np.int32))


def own_violation(
    generation: Generation, judged: Judged, rule: EditRule, tokenizer: Tokenizer
) -> np.ndarray | None:
    """Ids emitted up to the end of the first whole violation that the policy drew itself and that
    stands in the final text; None: there is none."""
    if not judged.final.judged:
        return None
    items = render(rule, generation.trace).visible_items
    offsets = tokenizer.offsets(generation.visible)
    for span in sorted(judged.final.spans, key=lambda span: span.end):
        upto = sum(start < span.end for start, _ in offsets)
        if span.complete and upto and items[upto - 1] >= generation.num_forced:
            return generation.trace[: items[upto - 1] + 1]
    return None


def remember(
    mistakes: Mistakes,
    rollouts: Sequence[Rollout],
    generations: Sequence[Generation],
    judged: Sequence[Judged],
    rule: EditRule,
    tokenizer: Tokenizer,
) -> tuple[Mistakes, int]:
    """With those of a step, one a prompt at most (its rollouts are alike), and how many they are.
    The oldest make room."""
    prefix, length, origin, count = (np.array(x) for x in jax.device_get(mistakes))
    seen: set[tuple[int, int]] = set()
    for rollout, generation, verdict in zip(rollouts, generations, judged, strict=True):
        if rollout.origin in seen:
            continue
        ids = own_violation(generation, verdict, rule, tokenizer)
        if ids is None or len(ids) > prefix.shape[1]:
            continue
        seen.add(rollout.origin)
        row = int(count) % len(length)
        prefix[row], length[row], origin[row] = 0, len(ids), rollout.origin
        prefix[row, : len(ids)] = ids
        count += 1
    return Mistakes(prefix, length, origin, count), len(seen)


def replayed(
    mistakes: Mistakes,
    prompts: Sequence[Rollout],
    source: PromptSource,
    share: float,
    rng: np.random.Generator,
    drawn: int | None,
    encode_prompt: Callable[[str], Sequence[int]],
) -> list[Rollout]:
    """A step's prompts, some of which have given way to mistakes.

    Args:
      share: chance of a prompt to give way, while there are mistakes.
      drawn: most ids that a rollout draws itself.
    """
    width = mistakes.prefix.shape[1]
    prefix, length, origin, count = jax.device_get(mistakes)
    there = min(int(count), len(length))
    chosen = list(prompts)
    gives_way = rng.random(len(prompts)) < share
    rows = rng.integers(max(there, 1), size=len(prompts))
    for place in np.flatnonzero(gives_way) if there else ():
        row = int(rows[place])
        step, number = (int(n) for n in origin[row])
        rollout = source(step)[number]
        room = width - len(prompt_of(rollout.request, encode_prompt)) - int(length[row])
        room = room if drawn is None else min(room, drawn)
        again = replay(rollout, prefix[row, : length[row]], room)
        if again is not None:
            chosen[place] = dataclasses.replace(again, origin=(step, number))
    return chosen


def replay(rollout: Rollout, prefix: np.ndarray, room: int) -> Rollout | None:
    """A rollout that begins with a prefix and draws `room` ids; None where those are too few."""
    if room < LEAST_ROOM:
        return None
    knobs = dataclasses.replace(rollout.request.knobs, max_tokens=len(prefix) + room)
    forced = tuple(int(token) for token in prefix)
    request = dataclasses.replace(rollout.request, forced=forced, knobs=knobs)
    return dataclasses.replace(rollout, request=request)
