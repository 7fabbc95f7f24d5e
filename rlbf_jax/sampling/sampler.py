"""The sampler's host side: requests in, generations out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlbf_jax.directives import EditRule, Limits, Semantics, render
from rlbf_jax.errors import InputError
from rlbf_jax.models.transformer import ModelConfig, bucketed, padded_width
from rlbf_jax.sampling import loop
from rlbf_jax.sampling.checks import check_drawn, check_request, check_seed
from rlbf_jax.sampling.distribution import Truncation
from rlbf_jax.sampling.program import Params, Program, as_program
from rlbf_jax.sampling.request import Generation, Knobs, Request
from rlbf_jax.sampling.state import Batch
from rlbf_jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Shapes and semantics of a sampler. A batch compiles once for every
    (context, room) bucket it needs."""

    semantics: Semantics = Semantics.REWIND
    batch_size: int = 64
    """Rows of a batch; smaller lists are padded with rows that are done at once."""
    min_context: int = 32
    """Narrowest context (prompt and forced ids)."""
    min_room: int = 64
    """Least room for emitted ids. Raise both to the largest of a sweep,
    and the sweep compiles once."""
    bucket: int = 32
    """Wider requests round up to a multiple of this."""
    max_context: int = 32_768
    """Most ids of prompt and response together;
    a longer request is refused before it fills the memory."""
    one_hot_writes: bool | None = None
    """How cache slots are written; None: one-hot on TPU, slices elsewhere."""
    rows_per_context: int = 1
    """So many rows of a batch share a context (prompt and forced ids), which is prefilled once for
    them. Raise it where prompts are asked many times: several answers a prompt, a grid of decoding
    parameters. Rows that find no partner leave their group's other rows idle."""

    def __post_init__(self):
        if (
            self.batch_size < 1
            or self.rows_per_context < 1
            or self.batch_size % self.rows_per_context
        ):
            raise ValueError(
                f"batch_size = {self.batch_size} must be a multiple of rows_per_context = "
                f"{self.rows_per_context}"
            )


LEAST_BUDGET = 4
"""Rings of sliding windows have room for so many directives at least, the usual budget."""
STOPS = 4
"""Stop ids of a row are padded to a multiple of this,
so that lists of several lengths share a program."""
TURNS = 32
"""Ids between two questions whether a row is to end."""

Ended = Callable[[int, Generation], bool]
"""ended(place in the list of prompts, what was emitted so far)."""


class Row(NamedTuple):
    """A row of a batch."""

    request: Request
    prompt: tuple[int, ...]
    """Ids it follows."""
    id: int
    """Its key is fold_in(key, id)."""
    place: int | None
    """In the list of prompts; None: an idle row."""


IDLE = Row(Request("", (), Knobs(max_tokens=0, budget=0)), (0,), 0, None)


class Sampler:
    """`Sampler(model, tokenizer, config)(params, prompts, key) -> list[Generation]`."""

    def __init__(
        self,
        model: ModelConfig | Program,
        tokenizer: Tokenizer,
        config: SamplerConfig = SamplerConfig(),
        *,
        rule: EditRule | None = None,
        sharding: jax.sharding.Sharding | None = None,
    ):
        """`rule` is the tokenizer's backtracking rule by default, and rows of the model beyond the
        tokenizer are legal under none; `sharding` places the rows of a batch on a mesh."""
        self.model = model
        self.program = as_program(model)
        self.tokenizer = tokenizer
        self.config = config
        rule = tokenizer.controls.rule() if rule is None else rule
        self.rule = known_rule(rule, self.program, tokenizer)
        self.sharding = sharding
        if model.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"the model has {model.vocab_size} ids, the tokenizer {tokenizer.vocab_size}"
            )

    def __call__(
        self,
        params: Params,
        prompts: Sequence[str | Request],
        key: jax.Array | int = 0,
        ended: Ended | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> list[Generation]:
        """Samples one response a prompt.

        Row r is drawn with fold_in(key, request id), so it does not depend
        on its neighbors, slot or order.

        Args:
          ended: whether what a row has emitted so far is enough. It is asked every `TURNS` ids, so
            a response may be some ids longer than it had to be, and never differs from the
            beginning of what it would be otherwise.
          progress: told after every batch how many responses it finished.

        Raises InputError, before anything is sampled, for a request that cannot be run, and
        UserError for one whose logits are not finite at some id, or leave no id to draw.
        """
        rows = self._rows([p if isinstance(p, Request) else Request(p) for p in prompts])
        model, params = self.program.unrolled(params)
        key = _key(key)
        results: dict[int, Generation] = {}
        for batch in batches_of(rows, self.config):
            finished = self._batch(model, params, batch, key, ended)
            results |= finished
            if progress is not None:
                progress(len(finished))
        return [results[place] for place in range(len(rows))]

    def _rows(self, requests: Sequence[Request]) -> list[Row]:
        longest_text = self.config.max_context
        if self.program.learned_positions and self.program.max_positions is not None:
            longest_text = min(longest_text, self.program.max_positions)
        encoded = functools.cache(lambda text: tuple(self.tokenizer.encode_prompt(text)))
        rows = []
        for place, request in enumerate(requests):
            prompt = (
                encoded(request.prompt) if request.prompt_ids is None else tuple(request.prompt_ids)
            )
            check_request(request, prompt, self.tokenizer.vocab_size, longest_text)
            if request.knobs.control_bias:
                control_bias_of(self.rule, [request.knobs])
            rows.append(Row(request, prompt, place if request.id is None else request.id, place))
        return rows

    def _batch(
        self,
        model: Program,
        params: Params,
        rows: Sequence[Row],
        key: jax.Array,
        ended: Ended | None,
    ) -> dict[int, Generation]:
        """Responses by their place in the list of prompts."""
        batch, room = make_batch(
            self.program, self.config, self.rule, rows, key, self.tokenizer.eos_ids
        )
        if self.sharding is not None:
            batch = jax.device_put(batch, self.sharding)
        one_hot = self.config.one_hot_writes
        one_hot = jax.default_backend() == "tpu" if one_hot is None else one_hot
        # Only rings read this; a global cache must not recompile for another budget.
        capacity = batch.context.shape[1] + room
        rings = _rewinds(self.config, model)
        rewound = rewound_of(self.rule, rows, room, capacity) if rings else 0
        told: dict[str, Any] = dict(program=model, rule=self.rule, semantics=self.config.semantics)

        def read(*arrays: jax.Array) -> dict[int, Generation]:
            found = zip(rows, *jax.device_get(arrays), strict=True)
            return {
                row.place: self._generation(row, t[:n], lp[:n])
                for row, t, lp, n in found
                if row.place is not None
            }

        if ended is None:
            return read(
                *loop.generate(params, batch, **told, room=room, rewound=rewound, one_hot=one_hot)
            )
        state = loop.begin(params, batch, **told, room=room, rewound=rewound)
        while True:
            state = loop.go_on(params, batch, state, **told, one_hot=one_hot, turns=TURNS)
            found, done = (
                read(state.trace, state.logprobs, state.edit.emitted),
                np.array(state.done),
            )
            for slot, row in enumerate(rows):
                if row.place is not None and not done[slot]:
                    done[slot] = ended(row.place, found[row.place])
            if done.all():
                return found
            state = state._replace(done=jax.device_put(done, state.done.sharding))

    def _generation(self, row: Row, trace, logprobs) -> Generation:
        request = row.request
        check_drawn(f"request {row.place} (id {row.id})", trace, logprobs, len(request.forced))
        stops = stop_ids(request.knobs, self.tokenizer.eos_ids)
        rendered = render(self.rule, trace)
        finished = len(trace) > 0 and int(trace[-1]) in stops
        # The end is the last visible id, unless it came inside a copy, which nobody sees.
        ended = finished and rendered.kinds[-1] == "content"
        visible = rendered.visible[:-1] if ended else rendered.visible
        return Generation(
            text=self.tokenizer.decode(visible),
            trace=np.asarray(trace, np.int32),
            edits=rendered.edits,
            logprobs=np.asarray(logprobs, np.float32),
            visible=visible,
            prompt_ids=np.asarray(row.prompt, np.int32),
            num_forced=len(request.forced),
            finished=finished,
            malformed=rendered.malformed,
            request=request,
        )


def known_rule(rule: EditRule, program: Program, tokenizer: Tokenizer) -> EditRule:
    """The rule, under which rows of the program that the tokenizer has no id for are illegal."""
    spare = program.vocab_size > tokenizer.vocab_size
    return rule.within(tokenizer.vocab_size) if spare else rule


def stop_ids(knobs: Knobs, eos_ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(eos_ids) if knobs.stop_ids is None else knobs.stop_ids


def limits_of(knobs: Sequence[Knobs]) -> Limits:
    """Knobs as `Limits` arrays [B]."""

    def column(name: str, dtype) -> jax.Array:
        return jnp.asarray(np.asarray([getattr(k, name) for k in knobs], dtype))

    return Limits(
        max_emitted=column("max_tokens", np.int32),
        budget=column("budget", np.int32),
        forbid_from=column("forbid_from", np.int32),
        forbid_to=column("forbid_to", np.int32),
        grammar=column("grammar", bool),
    )


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


def batches_of(rows: Sequence[Row], config: SamplerConfig) -> list[list[Row]]:
    """All rows in batches of `batch_size`, filled up with idle rows.

    Every `rows_per_context` neighbors share a context. A batch sweeps the vocabulary for top-k, or
    for top-p, if one of its rows asks for it, so rows that ask for the same come together;
    otherwise the order stays.
    """
    groups: list[list[Row]] = []
    latest: dict[tuple, list[Row]] = {}
    for row in sorted(rows, key=lambda row: _sweeps([row])):
        context = (row.prompt, row.request.forced)
        if len(latest.get(context, ())) % config.rows_per_context == 0:
            latest[context] = []
            groups.append(latest[context])
        latest[context].append(row)
    groups.sort(key=_sweeps)
    filled = [
        row
        for group in groups
        for row in [*group, *[IDLE] * (config.rows_per_context - len(group))]
    ]
    filled += [IDLE] * (-len(filled) % config.batch_size)
    return [
        filled[start : start + config.batch_size]
        for start in range(0, len(filled), config.batch_size)
    ]


def _sweeps(rows: Sequence[Row]) -> tuple[bool, bool]:
    """What truncation of these rows asks for, beyond what every draw needs."""
    return any(row.request.knobs.top_p < 1 for row in rows), any(
        row.request.knobs.top_k > 0 for row in rows
    )


def sharing(batch_size: int, rows: int) -> int:
    """The `rows_per_context` that suits `rows` requests a context: the fewest idle rows and the
    fewest prefills, a prefill being as dear as a row."""
    divisors = [d for d in range(1, batch_size + 1) if batch_size % d == 0]
    return min(divisors, key=lambda d: -(-rows // d) * (d + 1))


def make_batch(
    model: ModelConfig | Program,
    config: SamplerConfig,
    rule: EditRule,
    rows: Sequence[Row],
    key: jax.Array,
    eos_ids: Sequence[int],
) -> tuple[Batch, int]:
    """Arrays of one batch of `batches_of`, padded to its buckets, and the room E of the trace."""
    knobs = [row.request.knobs for row in rows]
    prompt_length = np.asarray([len(row.prompt) for row in rows], np.int32)
    forced_length = np.asarray([len(row.request.forced) for row in rows], np.int32)
    # A group's first row is idle only if all of it are.
    contexts = [(*row.prompt, *row.request.forced) for row in rows[:: config.rows_per_context]]
    width = padded_width(model, max(map(len, contexts)), config.bucket, config.min_context)
    context = np.zeros((len(contexts), width), np.int32)
    for place, tokens in enumerate(contexts):
        context[place, : len(tokens)] = tokens
    stops = [stop_ids(k, eos_ids) for k in knobs]
    stop = np.full((len(knobs), bucketed(max(map(len, stops)), STOPS, STOPS)), -1, np.int32)
    for place, some in enumerate(stops):
        stop[place, : len(some)] = some
    batch = Batch(
        context=jnp.asarray(context),
        prompt_length=jnp.asarray(prompt_length),
        context_length=jnp.asarray(prompt_length + forced_length),
        key=_keys(key, np.asarray([row.id for row in rows], np.uint32)),
        limits=limits_of(knobs),
        temperature=jnp.asarray([k.temperature for k in knobs], jnp.float32),
        truncation=Truncation(
            jnp.asarray([k.top_k for k in knobs], jnp.int32),
            jnp.asarray([k.top_p for k in knobs], jnp.float32),
            jnp.asarray([k.min_p for k in knobs], jnp.float32),
        ),
        control_bias=jnp.asarray(control_bias_of(rule, knobs)),
        stop_ids=jnp.asarray(stop),
    )
    return batch, bucketed(max(k.max_tokens for k in knobs), config.bucket, config.min_room)


def _key(key: jax.Array | int) -> jax.Array:
    if isinstance(key, jax.Array):
        return key
    check_seed(key)
    return jax.random.key(int(key))


@jax.jit
def _keys(key: jax.Array, ids: jax.Array) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


def rewound_of(rule: EditRule, rows: Sequence[Row], room: int, capacity: int) -> int:
    """Most ids that a row of a batch may take back, rounded up: rings are made for it.

    Forced ids may hold more directives than the budget. Budgets up to `LEAST_BUDGET`, and then up
    to each power of two, share a program; none needs more than `capacity`, the ids of a row.
    """
    most = max(max(row.request.knobs.budget, _started(rule, row.request.forced)) for row in rows)
    budget = max(LEAST_BUDGET, 1 << max(0, int(most) - 1).bit_length())
    return min(rule.rewound(budget, room), capacity)


def _started(rule: EditRule, ids: Sequence[int]) -> int:
    """Directives that start in emitted ids, lone categories included."""
    if not any(rule.is_control(int(token)) for token in ids):
        return 0
    rendered = render(rule, ids)
    return len(rendered.edits) + rendered.malformed


def _rewinds(config: SamplerConfig, model: Program) -> bool:
    return config.semantics is Semantics.REWIND and any(w is not None for w in model.windows)
