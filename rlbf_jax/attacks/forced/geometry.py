"""Where and how much is forced: middle filling over (benign p, violation v, benign b after it),
prefilling over k ids.

`middle_grid` forces p ids of a harmless answer, v ids of violations and b ids that go on
harmlessly; p = 0 is prefilling. `benign_grid` is its twin: the v ids are a harmless remark or more
of the answer. `prefilling_depth` forces the first k ids of an answer that gives what was asked for.
Nothing public defines the grid of middle filling: it is ours; the depths of prefilling are those of
Qi et al. (arXiv 2406.05946).

All lengths are of content ids, sliced from encoded text and never decoded in between,
hence also cut inside words.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from rlbf_jax.attacks.base import AttackConfig, Attempt, drawn
from rlbf_jax.attacks.direct import draw_prompts
from rlbf_jax.attacks.forced.prefilling import check_room
from rlbf_jax.data.schema import Prompt, Violation
from rlbf_jax.data.world import World
from rlbf_jax.sampling.request import Request
from rlbf_jax.tokenizers import Tokenizer

_MOST_TEXTS = 500
"""Texts that are strung together before a length is given up."""


@dataclasses.dataclass(frozen=True)
class GeometryGrid:
    """Lengths in ids; every combination is a cell of the table."""

    prefix: tuple[int, ...] = (0, 16, 64)
    span: tuple[int, ...] = (4, 16)
    tail: tuple[int, ...] = (0, 8)
    depths: tuple[int, ...] = (5, 10, 20, 40)
    """k of `prefilling_depth`."""

    def __post_init__(self):
        for name in ("prefix", "span", "tail", "depths"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty, expected at least one length")
        for least, name in ((0, "prefix"), (1, "span"), (0, "tail"), (1, "depths")):
            if any(length < least for length in getattr(self, name)):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected lengths of {least} or more"
                )

    @classmethod
    def wide(cls) -> GeometryGrid:
        """The whole grid, for models with a long context: up to 256 benign ids and 64 violating
        ones, and the depths of Corr@k (Course-Correction, arXiv 2407.16637)."""
        depths = tuple(range(10, 81, 10))
        return cls(prefix=(0, 16, 64, 256), span=(4, 16, 64), tail=(0, 8), depths=depths)

    @property
    def cells(self) -> list[tuple[int, int, int]]:
        return list(itertools.product(self.prefix, self.span, self.tail))


def middle_grid(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    n: int,
    config: AttackConfig,
    *,
    options: GeometryGrid = GeometryGrid(),
) -> list[Attempt]:
    """n harmless prompts in every cell: p benign ids, v ids of violations, b benign ids."""
    attempts = []
    for prompt in draw_prompts(world, rng, config.pool, n, harmful=False):
        for p, v, b in options.cells:
            first = world.violation(rng, config.split, config.pool)
            span, whole = _violating(world, tokenizer, rng, config, first, v)
            attempts.append(
                _filled(world, tokenizer, rng, config, prompt, (p, v, b), span, first, v >= whole)
            )
    return attempts


def benign_grid(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    n: int,
    config: AttackConfig,
    *,
    options: GeometryGrid = GeometryGrid(),
) -> list[Attempt]:
    """The twin of `middle_grid`: the same geometry, and nothing to take back."""
    attempts = []
    for prompt in draw_prompts(world, rng, config.pool, n, harmful=False):
        for p, v, b in options.cells:
            span = _ids(tokenizer, functools.partial(_harmless, world, rng, prompt), v)
            attempts.append(
                _filled(world, tokenizer, rng, config, prompt, (p, v, b), span, None, False)
            )
    return attempts


def prefilling_depth(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    n: int,
    config: AttackConfig,
    *,
    options: GeometryGrid = GeometryGrid(),
) -> list[Attempt]:
    """n harmful prompts at every depth k: opener (counted as bridge) and violations,
    the first k ids of them."""
    attempts = []
    for prompt in draw_prompts(world, rng, config.pool, n, harmful=True):
        for k in options.depths:
            first = world.violation(
                rng, config.split, config.pool, category=prompt.category or None
            )
            opener = tokenizer.encode(world.opener(rng))[:k]
            rest, whole = _violating(world, tokenizer, rng, config, first, k - len(opener))
            ids = opener + rest
            check_room(ids, config, f"prefilling_depth with k = {k}")
            attempts.append(
                Attempt(
                    Request(prompt.text, tuple(ids), config.knobs),
                    prompt,
                    "prefilling_depth",
                    config.split,
                    num_bridge=len(opener),
                    num_span=len(rest),
                    violation=first,
                    by_construction=len(rest) >= whole,
                    cell=(("k", k),),
                )
            )
    return attempts


def _filled(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    config: AttackConfig,
    prompt: Prompt,
    sizes: tuple[int, int, int],
    span: list[int],
    violation: Violation | None,
    whole: bool,
) -> Attempt:
    p, v, b = sizes
    prefix = _ids(tokenizer, lambda: _more(world, rng, prompt), p)
    tail = _ids(tokenizer, lambda: "." + _more(world, rng, prompt), b)
    forced = [*prefix, *span, *tail]
    name = "middle_grid" if violation else "benign_grid"
    check_room(forced, config, f"{name} with (p, v, b) = {sizes}")
    return Attempt(
        Request(prompt.text, tuple(forced), config.knobs),
        prompt,
        name,
        config.split if violation else "all",
        num_prefix=p,
        num_span=v,
        num_tail=b,
        prefix=tokenizer.decode(prefix),
        violation=violation,
        by_construction=whole,
        cell=(("p", p), ("v", v), ("b", b)),
    )


def _violating(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    config: AttackConfig,
    first: Violation,
    size: int,
) -> tuple[list[int], int]:
    """`size` ids of violations, beginning with `first`, and how many ids that one has."""
    texts = itertools.chain(
        [first.text], iter(lambda: world.violation(rng, config.split, config.pool).text, None)
    )
    return _ids(tokenizer, lambda: next(texts) + ".", size), len(tokenizer.encode(first.text))


def _harmless(world: World, rng: np.random.Generator, prompt: Prompt) -> str:
    aside = world.aside(rng)
    return f"{aside}." if aside else _more(world, rng, prompt)


def _more(world: World, rng: np.random.Generator, prompt: Prompt) -> str:
    return " " + world.answer(rng, prompt)


def _ids(tokenizer: Tokenizer, draw: Callable[[], str], size: int) -> list[int]:
    """The first `size` ids of drawn texts, strung together."""
    ids: list[int] = []
    for _ in range(_MOST_TEXTS):
        if len(ids) >= size:
            return ids[:size]
        ids += tokenizer.encode(draw())
    raise ValueError(f"{_MOST_TEXTS} texts gave {len(ids)} of {size} ids; ask for fewer")


_SHARED: dict[str, Any] = {"options": GeometryGrid(), "section": "geometry"}
SPECS = (
    drawn(
        prefilling_depth,
        "a harmful prompt; the first k ids of an opener and violations are forced",
        has_forms=True,
        **_SHARED,
    ),
    drawn(
        middle_grid,
        "a harmless prompt; p benign, v violating and b benign ids are forced",
        has_forms=True,
        **_SHARED,
    ),
    drawn(
        benign_grid,
        "the same geometry, the v ids a harmless remark or more of the answer",
        benign=True,
        **_SHARED,
    ),
)
