"""From requests to arrays: which shape a row needs, who shares a context, who comes next.

A row's shape follows from its own request and the sampler's configuration alone, so its bits do not
depend on what else is asked.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlbf_jax.directives import EditRule, Limits, Semantics, render
from rlbf_jax.errors import InputError
from rlbf_jax.models.transformer import bucketed, padded_width
from rlbf_jax.sampling.distribution import Truncation
from rlbf_jax.sampling.program import Program
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.state import Batch, Contexts

LEAST_BUDGET = 4
"""Rings of sliding windows have room for so many directives at least, the usual budget."""
STOPS = 4
"""Stop ids of a row are padded to a multiple of this,
so that lists of several lengths share a program."""


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Shapes and semantics of a sampler.

    A list of requests is sampled with `batch_size` rows at a time; a row that is over makes room
    for the next request. One program decodes for each power of two of `min_context + min_room` ids
    that a request needs.
    """

    semantics: Semantics = Semantics.REWIND
    batch_size: int = 64
    """Rows that are sampled at a time; fewer requests leave some idle."""
    min_context: int = 32
    """Narrowest context (prompt and forced ids) that is read; wider ones are padded to 1.5, 2, 3,
    4, 6, ... times as many ids."""
    min_room: int = 64
    """Least room for emitted ids. Raise both to the largest of a sweep,
    and the sweep compiles once."""
    bucket: int = 32
    """Contexts are padded to multiples of this."""
    max_context: int = 32_768
    """Most ids of prompt and response together;
    a longer request is refused before it fills the memory."""
    contexts_at_once: int | None = None
    """So many contexts are read in one pass, and so many rows are awaited before new ones begin;
    None: an eighth of `batch_size`."""
    int8_cache: bool = False
    """Keep keys and values in a byte each: a quarter of float32's memory. No number is off by more
    than a 254th of the largest of its vector, so log-probabilities are no longer those of a
    teacher-forced pass to the last digits (docs/design.md has what was measured)."""
    one_hot_writes: bool | None = None
    """How cache slots are written; None: one-hot on TPU and for a single row on
    CPU, slices elsewhere."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected 1 or more")
        if not 1 <= at_once(self) <= self.batch_size:
            raise ValueError(
                f"contexts_at_once is {self.contexts_at_once}, expected 1..{self.batch_size} "
                "(batch_size)"
            )


def at_once(config: SamplerConfig) -> int:
    """`contexts_at_once`, or its default."""
    default = max(1, config.batch_size // 8)
    return default if config.contexts_at_once is None else config.contexts_at_once


class Row(NamedTuple):
    """A request, ready to be sampled."""

    request: Request
    prompt: tuple[int, ...]
    """Ids it follows."""
    id: int
    """Its key is fold_in(key, id)."""
    place: int
    """In the list of prompts."""

    @property
    def context(self) -> tuple[int, ...]:
        """Prompt and forced ids."""
        return (*self.prompt, *self.request.forced)


class Shape(NamedTuple):
    """What rows of one batch have in common; static under jit."""

    capacity: int
    """S, ids of prompt and response that a row has room for."""
    rewound: int
    """Most ids it may take back, where that sizes rings of sliding windows; 0 elsewhere."""


def shape_of(row: Row, config: SamplerConfig, program: Program, rule: EditRule) -> Shape:
    """Of a row's cache and trace."""
    capacity = config.min_context + config.min_room
    while capacity < len(row.prompt) + row.request.knobs.max_tokens:
        capacity *= 2
    # Only rings read what is rewound; a global cache must not recompile for another budget.
    rings = any(window is not None for window in program.windows)
    rewinds = rings and config.semantics is Semantics.REWIND
    return Shape(capacity, rewound_of(rule, row.request, capacity) if rewinds else 0)


def rewound_of(rule: EditRule, request: Request, capacity: int) -> int:
    """Most ids that a request may take back, rounded up: rings are made for it.

    Forced ids may hold more directives than the budget. Budgets up to `LEAST_BUDGET`, and then up
    to each power of two, share a program; none needs more than `capacity`, the ids of a row.
    """
    most = max(request.knobs.budget, _started(rule, request.forced))
    budget = max(LEAST_BUDGET, 1 << max(0, int(most) - 1).bit_length())
    return min(rule.rewound(budget, capacity), capacity)


def _started(rule: EditRule, ids: Sequence[int]) -> int:
    """Directives that start in emitted ids, lone categories included."""
    if not any(rule.is_control(int(token)) for token in ids):
        return 0
    rendered = render(rule, ids)
    return len(rendered.edits) + rendered.malformed


def context_width(length: int, config: SamplerConfig, program: Program) -> int:
    """C, columns in which a context of so many ids is read."""
    width = step = config.min_context
    while width < length:
        # 1, 1.5, 2, 3, 4, 6, ... times the least: few programs, a fifth of padding on average.
        width, step = (width + step // 2, step) if width == step else (2 * step, 2 * step)
    wide = bucketed(max(width, length), config.bucket, config.min_context)
    return padded_width(program, length, wide, config.min_context)


class Group(NamedTuple):
    """Rows that follow one context."""

    width: int
    """C, columns in which it is read."""
    rows: deque[Row]


def lanes(
    rows: Sequence[Row], config: SamplerConfig, program: Program, rule: EditRule
) -> dict[Shape, deque[Group]]:
    """Rows by the shape that they need, narrow shapes first, and by context.

    Draws sweep the vocabulary for top-k, or for top-p, if one of a batch's rows asks for it, so
    rows that ask for the same come together, apart from others of their context. Contexts of one
    width are neighbors. Rows that may become longer come before others; otherwise the order stays.
    """

    def order(row: Row) -> tuple:
        sweeps = row.request.knobs.top_p < 1, row.request.knobs.top_k > 0
        width = context_width(len(row.context), config, program)
        return *sweeps, width, -row.request.knobs.max_tokens

    found: dict[Shape, dict[tuple, Group]] = {}
    ordered = sorted(((order(row), row) for row in rows), key=lambda pair: pair[0])
    for (*sweeps, width, _), row in ordered:
        groups = found.setdefault(shape_of(row, config, program, rule), {})
        group = groups.setdefault((*sweeps, row.prompt, row.request.forced), Group(width, deque()))
        group.rows.append(row)
    return {shape: deque(groups.values()) for shape, groups in sorted(found.items())}


def next_groups(groups: deque[Group], count: int) -> list[Group]:
    """Takes those whose contexts are read together: the first ones, of one width,
    `count` at most."""
    width = groups[0].width
    taken: list[Group] = []
    while groups and len(taken) < count and groups[0].width == width:
        taken.append(groups.popleft())
    return taken


# Arrays -----------------------------------------------------------------------------------------


def contexts_of(groups: Sequence[Group], count: int) -> Contexts:
    """As arrays (numpy) of `count` contexts; those beyond the groups are one id."""
    context = np.zeros((count, groups[0].width), np.int32)
    prompt_length, length = np.ones((2, count), np.int32)
    for place, group in enumerate(groups):
        row = group.rows[0]
        length[place], prompt_length[place] = len(row.context), len(row.prompt)
        context[place, : length[place]] = row.context
    return Contexts(context, prompt_length, length)  # type: ignore[arg-type]


def batch_of(rows: Sequence[Row], rule: EditRule, eos_ids: Sequence[int], stops: int) -> Batch:
    """What rows ask for, as arrays (numpy). `stops`: columns of the stop ids."""
    knobs = [row.request.knobs for row in rows]

    stop = np.full((len(rows), stops), -1, np.int32)
    for place, some in enumerate(stop_ids(k, eos_ids) for k in knobs):
        stop[place, : len(some)] = some
    arrays: tuple = (
        np.asarray([len(row.prompt) for row in rows], np.int32),
        np.asarray([row.id for row in rows], np.uint32),
        limits_of(knobs),
        _column(knobs, "temperature", np.float32),
        Truncation(
            _column(knobs, "top_k", np.int32),
            _column(knobs, "top_p", np.float32),
            _column(knobs, "min_p", np.float32),
        ),
        control_bias_of(rule, knobs),
        stop,
    )
    return Batch(*arrays)


def _column(knobs: Sequence[Knobs], name: str, dtype) -> Any:
    return np.asarray([getattr(k, name) for k in knobs], dtype)


def limits_of(knobs: Sequence[Knobs]) -> Limits:
    """Knobs as `Limits` arrays [B] (numpy)."""
    return Limits(
        max_emitted=_column(knobs, "max_tokens", np.int32),
        budget=_column(knobs, "budget", np.int32),
        forbid_from=_column(knobs, "forbid_from", np.int32),
        forbid_to=_column(knobs, "forbid_to", np.int32),
        grammar=_column(knobs, "grammar", bool),
    )


IDLE = Row(Request("", (), Knobs(max_tokens=0, budget=0)), (0,), 0, -1)
"""What an idle row asks for."""


def stop_ids(knobs: Knobs, eos_ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(eos_ids) if knobs.stop_ids is None else knobs.stop_ids


def stop_columns(groups: Sequence[Group] | deque[Group], eos_ids: Sequence[int]) -> int:
    """Columns of the stop ids, wide enough for all rows."""
    most = max(len(stop_ids(r.request.knobs, eos_ids)) for group in groups for r in group.rows)
    return bucketed(most, STOPS, STOPS)


def control_bias_of(rule: EditRule, knobs: Sequence[Knobs]) -> np.ndarray:
    """[B, controls] float32 from the names in `Knobs.control_bias`.
    Raises InputError for an unknown name."""
    names = rule.names()
    count = len(rule.categories)
    bias = np.zeros((len(knobs), len(names)), np.float32)
    groups = {"categories": slice(0, count), "retractions": slice(count, None)}
    groups |= {name: slice(i, i + 1) for i, name in enumerate([*rule.categories])}
    groups |= {name: slice(i, i + 1) for i, name in enumerate(names)}
    for row, knob in enumerate(knobs):
        for name, value in knob.control_bias.items():
            if name not in groups:
                raise InputError(
                    f"control_bias: unknown name {name!r}; known are categories, retractions and "
                    f"{names}"
                )
            bias[row, groups[name]] += value
    return bias
