"""What gives logits: one model, or several passes whose logits are mixed.

A program is hashable and static under jit; its parameters are handed in beside it. `Single` is one
decoder; `Contrast` mixes the logits of several (DExperts, SafeAligner); `TwoPrompts` mixes those of
one decoder under two prompts (ROSE). A new one is a frozen dataclass with the methods of `Program`,
and the law of the sampler (`tests/sampling/test_law_programs.py`) is its test.

Shape letters: B rows, T ids of a row, V vocabulary, P ids of a prefix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array

from rlbf_jax.directives import NEVER
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.kv_cache import KVCache, latest_writer, ring_slots
from rlbf_jax.models.transformer import ModelConfig

Params = Any
"""A pytree of arrays, shaped as its program wants it."""
Hidden = Any
"""A pytree of arrays with rows (and time) in front; for `unembed` of the same program."""


@runtime_checkable
class Program(Protocol):
    """What the sampler and the scorer ask of whatever gives logits.

    `hidden`, `pairs` and `cache` are pytrees whose arrays have rows in front; nothing outside a
    program looks into them.
    """

    @property
    def vocab_size(self) -> int:
        """V, ids of the logits."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Attention windows of the layers, None for a global one; they decide on ring caches."""

    @property
    def learned_positions(self) -> bool:
        """Whether `max_positions` is a limit, and not only a remark."""

    @property
    def max_positions(self) -> int | None:
        """Most ids of prompt and response together; None: not known."""

    def unrolled(self, params: Params) -> tuple[Program, Params]:
        """The same program as `step` wants it, without scanned layers."""

    def forward(self, params: Params, tokens: Array, visibility: Visibility) -> tuple[Hidden, Any]:
        """Whole rows at once: tokens [B, T] int32 -> hidden [B, T, ...] and what `cache` reads."""

    def step(
        self, params: Params, token: Array, position: Array, cache: Any, one_hot: bool
    ) -> tuple[Hidden, Any]:
        """Feeds one id a row, `token` and `position` [B] int32 -> hidden [B, ...] and the cache."""

    def unembed(self, params: Params, hidden: Hidden) -> Array:
        """hidden [...] -> float32 logits [..., V]."""

    def cache(self, pairs: Any, position: Array, length: Array, capacity: int, rewound: int) -> Any:
        """The cache as if the ids of a whole pass had been fed one by one.

        Args:
          pairs: what `forward` returned beside the hidden states.
          position: [B, T] int32 positions of the ids.
          length: [B] int32, how many ids of each row are real.
          capacity: most ids of a row, those to come included.
          rewound: most ids a row may take back (sizes sliding-window rings), 0 under KEEP.
        """


class _OneDecoder:
    """What a program of one decoder says of it."""

    config: ModelConfig

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def windows(self) -> tuple[int | None, ...]:
        return self.config.windows

    @property
    def learned_positions(self) -> bool:
        return self.config.learned_positions


@dataclasses.dataclass(frozen=True)
class Single(_OneDecoder):
    """One decoder. Parameters: its dict of arrays."""

    config: ModelConfig

    @property
    def max_positions(self) -> int | None:
        return self.config.max_positions

    def unrolled(self, params: Params) -> tuple[Single, Params]:
        config, params = transformer.unrolled(self.config, params)
        return Single(config), params

    def forward(self, params: Params, tokens: Array, visibility: Visibility) -> tuple[Array, Any]:
        return transformer.forward(self.config, params, tokens, visibility)

    def step(
        self, params: Params, token: Array, position: Array, cache: KVCache, one_hot: bool
    ) -> tuple[Array, KVCache]:
        return transformer.step(self.config, params, token, position, cache, one_hot)

    def unembed(self, params: Params, hidden: Array) -> Array:
        return transformer.unembed(self.config, params, hidden)

    def cache(
        self, pairs: Any, position: Array, length: Array, capacity: int, rewound: int
    ) -> KVCache:
        held = [
            latest_writer(position, length, ring_slots(window, capacity, rewound))
            for window in self.windows
        ]

        def gather(rows: Array, index: Array) -> Array:
            return jnp.take_along_axis(rows, index[:, None, :, None], axis=2)

        keys, values = [], []
        for number, (key, value) in enumerate(pairs):
            index = held[number % len(held)][0]
            keys.append(gather(key, index))
            values.append(gather(value, index))
        return KVCache(tuple(keys), tuple(values), tuple(at for _, at in held))


def as_program(model: ModelConfig | Program) -> Program:
    """A decoder's configuration as a program; a program is returned as it is."""
    return Single(model) if isinstance(model, ModelConfig) else model


# Several models ---------------------------------------------------------------------------------


class Mix(Protocol):
    """How logits become logits: a pure function, hashable, checked against the number of models."""

    def __call__(self, logits: Sequence[Array]) -> Array:
        """[..., V] float32 of every model -> [..., V] float32."""

    def check(self, models: int) -> None:
        """Raises ValueError where it cannot mix so many."""


@dataclasses.dataclass(frozen=True)
class LinearMix:
    """sum_i weights[i] * logits_i.

    `LinearMix((1.0, alpha, -alpha))` over (base, guard, risky) is base + alpha (guard - risky).
    Log-probabilities in place of logits would give the same distribution: the two differ by one
    number a query. A mix of probabilities (SafeAligner's) is not linear here: write another `Mix`.
    """

    weights: tuple[float, ...]

    def __post_init__(self):
        if not self.weights or not all(map(math.isfinite, self.weights)):
            raise ValueError(f"weights is {self.weights}, expected one finite number a model")

    def __call__(self, logits: Sequence[Array]) -> Array:
        parts = [weight * x for weight, x in zip(self.weights, logits, strict=True)]
        return sum(parts[1:], start=parts[0])

    def check(self, models: int) -> None:
        if len(self.weights) != models:
            raise ValueError(f"{len(self.weights)} weights for {models} models")


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Several models (or programs) that read the same ids, and the mix of their logits.

    Parameters: a tuple, one entry a model. Every model keeps a cache of its own.
    Raises ValueError for models of different vocabularies, or a mix of another number of them.
    """

    models: tuple[ModelConfig | Program, ...]
    mix: Mix

    def __post_init__(self):
        if not self.models:
            raise ValueError("models is empty, expected one or more")
        sizes = sorted({part.vocab_size for part in self.parts})
        if len(sizes) > 1:
            raise ValueError(f"models have vocabularies of {sizes} ids; logits of one size mix")
        self.mix.check(len(self.models))
        if not isinstance(self.mix, Hashable):
            raise ValueError(f"mix {self.mix!r} is not hashable; make it a frozen dataclass")

    @property
    def parts(self) -> tuple[Program, ...]:
        return tuple(map(as_program, self.models))

    @property
    def vocab_size(self) -> int:
        return self.parts[0].vocab_size

    @property
    def windows(self) -> tuple[int | None, ...]:
        return tuple(window for part in self.parts for window in part.windows)

    @property
    def learned_positions(self) -> bool:
        return any(part.learned_positions for part in self.parts)

    @property
    def max_positions(self) -> int | None:
        """The least of all models, or of those for which it is a limit."""
        limits = [part for part in self.parts if part.learned_positions] or self.parts
        known = [part.max_positions for part in limits if part.max_positions is not None]
        return min(known, default=None)

    def unrolled(self, params: Params) -> tuple[Contrast, Params]:
        pairs = [part.unrolled(own) for part, own in self._with(params)]
        models = tuple(program for program, _ in pairs)
        return Contrast(models, self.mix), tuple(own for _, own in pairs)

    def forward(self, params: Params, tokens: Array, visibility: Visibility) -> tuple[tuple, tuple]:
        read = [part.forward(own, tokens, visibility) for part, own in self._with(params)]
        return tuple(hidden for hidden, _ in read), tuple(pairs for _, pairs in read)

    def step(
        self, params: Params, token: Array, position: Array, cache: tuple, one_hot: bool
    ) -> tuple[tuple, tuple]:
        fed = [
            part.step(own, token, position, held, one_hot)
            for (part, own), held in zip(self._with(params), cache, strict=True)
        ]
        return tuple(hidden for hidden, _ in fed), tuple(held for _, held in fed)

    def unembed(self, params: Params, hidden: tuple) -> Array:
        return self.mix(
            [
                part.unembed(own, states)
                for (part, own), states in zip(self._with(params), hidden, strict=True)
            ]
        )

    def cache(
        self, pairs: tuple, position: Array, length: Array, capacity: int, rewound: int
    ) -> tuple:
        return tuple(
            part.cache(own, position, length, capacity, rewound)
            for part, own in zip(self.parts, pairs, strict=True)
        )

    def _with(self, params: Params) -> list[tuple[Program, Params]]:
        """Every model with its parameters."""
        if len(params) != len(self.models):
            raise ValueError(f"parameters of {len(params)} models for {len(self.models)}")
        return list(zip(self.parts, params, strict=True))


# One model, two prompts -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TwoPrompts(_OneDecoder):
    """One model under two prompts: logits = own - weight * those of the same ids after `prefix`.

    ROSE (arXiv 2402.11889) puts a reversed system prompt there. The second stream is the same rows
    with `prefix` before everything (an opening such as `bos` included, so that a prefix may bring
    its own), positions and lifetimes moved by its length. Parameters: the model's own.
    Packed rows have several beginnings, so they are refused with ValueError.
    """

    config: ModelConfig
    prefix: tuple[int, ...]
    weight: float

    def __post_init__(self):
        vocab_size = self.config.vocab_size
        if not self.prefix or not 0 <= min(self.prefix) <= max(self.prefix) < vocab_size:
            raise ValueError(f"prefix needs one id or more, all in 0..{vocab_size - 1}")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight is {self.weight}, expected a finite number")
        if self.learned_positions and (self.max_positions or 0) < 1:
            raise ValueError(
                f"a prefix of {len(self.prefix)} ids leaves nothing of the model's "
                f"{self.config.max_positions} positions"
            )

    @property
    def single(self) -> Single:
        return Single(self.config)

    @property
    def max_positions(self) -> int | None:
        """What the prefix leaves."""
        most = self.config.max_positions
        return None if most is None else most - len(self.prefix)

    def unrolled(self, params: Params) -> tuple[TwoPrompts, Params]:
        config, params = transformer.unrolled(self.config, params)
        return dataclasses.replace(self, config=config), params

    def forward(self, params: Params, tokens: Array, visibility: Visibility) -> tuple[tuple, tuple]:
        if visibility.segment is not None:
            raise ValueError(
                "rows are packed (segments), and a second prompt stands before one beginning only; "
                "give TwoPrompts one example a row"
            )
        rows, time = tokens.shape
        prefix = jnp.broadcast_to(jnp.asarray(self.prefix, tokens.dtype), (rows, len(self.prefix)))
        own = self.single.forward(params, tokens, visibility)
        hidden, pairs = self.single.forward(
            params, self._fit(jnp.concatenate([prefix, tokens], axis=1)), self._moved(visibility)
        )
        # Columns that were cut off were padding.
        hidden = hidden[:, len(self.prefix) : len(self.prefix) + time]
        hidden = jnp.pad(hidden, ((0, 0), (0, time - hidden.shape[1]), (0, 0)))
        return (own[0], hidden), (own[1], pairs)

    def step(
        self, params: Params, token: Array, position: Array, cache: tuple, one_hot: bool
    ) -> tuple[tuple, tuple]:
        own = self.single.step(params, token, position, cache[0], one_hot)
        other = self.single.step(params, token, position + len(self.prefix), cache[1], one_hot)
        return (own[0], other[0]), (own[1], other[1])

    def unembed(self, params: Params, hidden: tuple) -> Array:
        own, other = (self.single.unembed(params, states) for states in hidden)
        return own - self.weight * other

    def cache(
        self, pairs: tuple, position: Array, length: Array, capacity: int, rewound: int
    ) -> tuple:
        more = len(self.prefix)
        moved = self._fit(self._positions(position))
        return (
            self.single.cache(pairs[0], position, length, capacity, rewound),
            self.single.cache(pairs[1], moved, length + more, capacity + more, rewound),
        )

    def _moved(self, visibility: Visibility) -> Visibility:
        """Who sees whom in the second stream: the prefix lives on, all else is later by P."""
        died = visibility.died
        if died is not None:
            later = jnp.where(died == NEVER, NEVER, died + len(self.prefix))
            died = self._fit(jnp.pad(later, ((0, 0), (len(self.prefix), 0)), constant_values=NEVER))
        return Visibility(self._fit(self._positions(visibility.position)), None, died)

    def _positions(self, position: Array) -> Array:
        """[B, P + T] from [B, T]."""
        more = jnp.arange(len(self.prefix), dtype=position.dtype)
        before = jnp.broadcast_to(more, (position.shape[0], len(self.prefix)))
        return jnp.concatenate([before, position + len(self.prefix)], axis=1)

    def _fit(self, columns: Array) -> Array:
        """Columns of the second stream, made up with zeros to a width that the model reads.

        Long rows are whole blocks, and a table of learned positions allows only so many; what is
        made up or cut off is padding.
        """
        width = transformer.bucketed(columns.shape[1], 1)
        widest = transformer.widest_row(self.config)
        width = width if widest is None else min(width, widest)
        return jnp.pad(columns[:, :width], ((0, 0), (0, max(0, width - columns.shape[1]))))
