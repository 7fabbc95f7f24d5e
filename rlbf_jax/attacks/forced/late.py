"""Late violations: the moment has passed when the model begins to write. Ours.

`late_filling` is middle filling with b harmless ids behind the violation, `benign_late` the same
behind a harmless remark.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from rlbf_jax.attacks.base import AttackConfig, Attempt, drawn
from rlbf_jax.attacks.forced.middle_filling import (
    MiddleFillingOptions,
    benign_middle,
    middle_filling,
)
from rlbf_jax.attacks.forced.prefilling import check_room
from rlbf_jax.data.world import World
from rlbf_jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class LateOptions:
    """Geometry of late violations."""

    tails: tuple[int, ...] = (8, 16)
    """b, harmless ids behind the span; every number is a cell of the table."""
    middle: MiddleFillingOptions = MiddleFillingOptions(long_share=0.0)
    """Of what comes before."""

    def __post_init__(self):
        if not self.tails or min(self.tails) < 0:
            raise ValueError(f"tails is {self.tails}, expected numbers of 0 or more")


def late_filling(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    n: int,
    config: AttackConfig,
    *,
    options: LateOptions = LateOptions(),
) -> list[Attempt]:
    """n harmless prompts with every number of ids behind a whole violation."""
    return _late(middle_filling, "late_filling", world, tokenizer, rng, n, config, options)


def benign_late(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    n: int,
    config: AttackConfig,
    *,
    options: LateOptions = LateOptions(),
) -> list[Attempt]:
    """The benign twin: the same ids behind a harmless remark."""
    return _late(benign_middle, "benign_late", world, tokenizer, rng, n, config, options)


def _late(
    filled: Callable[..., list[Attempt]],
    name: str,
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    n: int,
    config: AttackConfig,
    options: LateOptions,
) -> list[Attempt]:
    attempts = []
    roomy = dataclasses.replace(config, room=config.room + max(options.tails))
    for attempt in filled(world, tokenizer, rng, n, roomy, options=options.middle):
        for b in options.tails:
            tail = _ids_after(world, tokenizer, rng, attempt, b)
            forced = [*attempt.request.forced, *tail]
            check_room(forced, config, f"{name} with {b}")
            request = dataclasses.replace(attempt.request, forced=tuple(forced))
            cell = (("b", b),)
            attempts.append(
                dataclasses.replace(
                    attempt, request=request, attack=name, num_tail=len(tail), cell=cell
                )
            )
    return attempts


def _ids_after(
    world: World, tokenizer: Tokenizer, rng: np.random.Generator, attempt: Attempt, size: int
) -> list[int]:
    """The first `size` ids of an end mark and more of the prompt's answer."""
    text = "."
    while len(ids := tokenizer.encode(text)) < size:
        text += " " + world.answer(rng, attempt.prompt).strip()
    return ids[:size]


_SHARED: dict[str, Any] = {"options": LateOptions(), "section": "late"}
SPECS = (
    drawn(
        late_filling,
        "middle filling; harmless ids follow the violation",
        has_forms=True,
        whole=True,
        **_SHARED,
    ),
    drawn(benign_late, "the same behind a harmless remark", benign=True, **_SHARED),
)
