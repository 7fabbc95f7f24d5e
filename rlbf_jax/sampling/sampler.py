"""The sampler's host side: requests in, generations out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlbf_jax.directives import EditRule, Limits, Semantics, render
from rlbf_jax.errors import InputError
from rlbf_jax.models.transformer import ModelConfig, bucketed, padded_width, unrolled
from rlbf_jax.sampling import loop
from rlbf_jax.sampling.distribution import Truncation
from rlbf_jax.sampling.request import Generation, Knobs, Request
from rlbf_jax.sampling.state import Batch
from rlbf_jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Shapes and semantics of a sampler. A batch compiles once for every (context, room) bucket it needs."""

    semantics: Semantics = Semantics.REWIND
    batch_size: int = 64
    """Rows of a batch; smaller lists are padded with rows that are done at once."""
    min_context: int = 32
    """Narrowest context (prompt and forced ids)."""
    min_room: int = 64
    """Least room for emitted ids. Raise both to the largest of a sweep, and the sweep compiles once."""
    bucket: int = 32
    """Wider requests round up to a multiple of this."""
    max_context: int = 32_768
    """Most ids of prompt and response together; a longer request is refused before it fills the memory."""
    one_hot_writes: bool | None = None
    """How cache slots are written; None: one-hot on TPU, slices elsewhere."""


TURNS = 32
"""Ids between two questions whether a row is to end."""

Ended = Callable[[int, Generation], bool]
"""ended(place in the list of prompts, what was emitted so far)."""


class Sampler:
    """`Sampler(model, tokenizer, config)(params, prompts, key) -> list[Generation]`."""

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: Tokenizer,
        config: SamplerConfig = SamplerConfig(),
        *,
        rule: EditRule | None = None,
        sharding: jax.sharding.Sharding | None = None,
    ):
        """`rule` is the tokenizer's backtracking rule by default; `sharding` places the rows of a batch on a mesh."""
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.rule = tokenizer.rule if rule is None else rule
        self.sharding = sharding
        if model.vocab_size < tokenizer.vocab_size:
            raise ValueError(f"the model has {model.vocab_size} ids, the tokenizer {tokenizer.vocab_size}")

    def __call__(
        self,
        params: dict,
        prompts: Sequence[str | Request],
        key: jax.Array | int = 0,
        ended: Ended | None = None,
    ) -> list[Generation]:
        """Samples one response a prompt.

        Row r is drawn with fold_in(key, request id), so it does not depend on its neighbors, slot or order.

        Args:
          ended: whether what a row has emitted so far is enough. It is asked every `TURNS` ids, so a response may be
            some ids longer than it had to be, and never differs from the beginning of what it would be otherwise.
        """
        requests = [p if isinstance(p, Request) else Request(p) for p in prompts]
        model, params = unrolled(self.model, params)
        key = jax.random.key(key) if isinstance(key, int) else key
        results: list[Generation] = []
        for start in range(0, len(requests), self.config.batch_size):
            results += self._batch(model, params, requests[start : start + self.config.batch_size], start, key, ended)
        return results

    def _batch(self, model, params, requests: list[Request], start: int, key, ended: Ended | None) -> list[Generation]:
        prompts = [
            self.tokenizer.encode_prompt(r.prompt) if r.prompt_ids is None else list(r.prompt_ids) for r in requests
        ]
        longest_text = self.config.max_context
        if self.model.learned_positions and self.model.max_positions is not None:
            longest_text = min(longest_text, self.model.max_positions)
        for request, ids in zip(requests, prompts, strict=True):
            _check(request, ids, self.model.vocab_size, longest_text)
        ids = [start + i if r.id is None else r.id for i, r in enumerate(requests)]
        eos_ids = self.tokenizer.eos_ids
        batch, room = make_batch(self.model, self.config, self.rule, requests, prompts, ids, key, eos_ids)
        if self.sharding is not None:
            batch = jax.device_put(batch, self.sharding)
        budget = max(r.knobs.budget for r in requests)
        longest = getattr(self.rule, "x_max", room) + 2
        one_hot = self.config.one_hot_writes
        one_hot = jax.default_backend() == "tpu" if one_hot is None else one_hot
        # Only rings read this; a global cache must not recompile for another budget.
        rewound = budget * longest if _rewinds(self.config, model) else 0
        told: dict[str, Any] = dict(config=model, rule=self.rule, semantics=self.config.semantics)

        def read(trace, logprobs, emitted) -> list[Generation]:
            rows = zip(requests, prompts, *jax.device_get((trace, logprobs, emitted)), strict=False)
            return [self._generation(request, prompt, t[:n], lp[:n]) for request, prompt, t, lp, n in rows]

        if ended is None:
            return read(*loop.generate(params, batch, **told, room=room, rewound=rewound, one_hot=one_hot))
        state = loop.begin(params, batch, **told, room=room, rewound=rewound)
        while True:
            state = loop.go_on(params, batch, state, **told, one_hot=one_hot, turns=TURNS)
            found, done = read(state.trace, state.logprobs, state.edit.emitted), np.array(state.done)
            done[: len(found)] |= [d or ended(start + i, g) for i, (d, g) in enumerate(zip(done, found, strict=False))]
            if done.all():
                return found
            state = state._replace(done=jax.device_put(done, state.done.sharding))

    def _generation(self, request: Request, prompt: list[int], trace, logprobs) -> Generation:
        stops = stop_ids(request.knobs, self.tokenizer.eos_ids)
        rendered = render(self.rule, trace)
        finished = len(trace) > 0 and int(trace[-1]) in stops
        visible = rendered.visible[:-1] if finished else rendered.visible
        return Generation(
            text=self.tokenizer.decode(visible),
            trace=np.asarray(trace, np.int32),
            edits=rendered.edits,
            logprobs=np.asarray(logprobs, np.float32),
            visible=visible,
            prompt_ids=np.asarray(prompt, np.int32),
            num_forced=len(request.forced),
            finished=finished,
            malformed=rendered.malformed,
            request=request,
        )


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
    """[B, controls] float32 from the names in `Knobs.control_bias`. Raises KeyError for an unknown name."""
    names = rule.names()
    count = len(rule.categories)
    bias = np.zeros((len(knobs), len(names)), np.float32)
    groups = {"categories": slice(0, count), "retractions": slice(count, None)}
    groups |= {name: slice(i, i + 1) for i, name in enumerate([*rule.categories])}
    groups |= {name: slice(i, i + 1) for i, name in enumerate(names)}
    for row, knob in enumerate(knobs):
        for name, value in knob.control_bias.items():
            if name not in groups:
                raise KeyError(f"control_bias: unknown name {name!r}; known are categories, retractions and {names}")
            bias[row, groups[name]] += value
    return bias


def make_batch(
    model: ModelConfig,
    config: SamplerConfig,
    rule: EditRule,
    requests: Sequence[Request],
    prompts: Sequence[Sequence[int]],
    ids: Sequence[int],
    key: jax.Array,
    eos_ids: Sequence[int],
) -> tuple[Batch, int]:
    """Arrays of one batch, padded to its buckets, and the room E of the trace."""
    spare = config.batch_size - len(requests)
    idle = Request("", (), Knobs(max_tokens=0))
    knobs = [r.knobs for r in requests] + [idle.knobs] * spare
    contexts = [[*p, *r.forced] for p, r in zip(prompts, requests, strict=True)] + [[0]] * spare
    prompt_length = np.asarray([len(p) for p in prompts] + [1] * spare, np.int32)
    context_length = np.asarray([len(c) for c in contexts], np.int32)
    width = padded_width(model, int(max(context_length)), config.bucket, config.min_context)
    context = np.zeros((len(contexts), width), np.int32)
    for row, tokens in enumerate(contexts):
        context[row, : len(tokens)] = tokens
    stops = [stop_ids(k, eos_ids) for k in knobs]
    stop = np.full((len(knobs), max(1, *map(len, stops))), -1, np.int32)
    for row, some in enumerate(stops):
        stop[row, : len(some)] = some
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(np.asarray([*ids, *[0] * spare], np.uint32))
    batch = Batch(
        context=jnp.asarray(context),
        prompt_length=jnp.asarray(prompt_length),
        context_length=jnp.asarray(context_length),
        key=keys,
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


def _rewinds(config: SamplerConfig, model: ModelConfig) -> bool:
    return config.semantics is Semantics.REWIND and any(w is not None for w in model.windows)


def _check(request: Request, prompt: Sequence[int], vocab_size: int, max_context: int) -> None:
    """Raises InputError for a request that cannot be run, with the field and what to change."""
    knobs = request.knobs
    if not prompt:
        raise InputError("a prompt needs at least one id; encode_prompt or prompt_ids gave none")
    if len(prompt) + knobs.max_tokens > max_context:
        raise InputError(
            f"a prompt of {len(prompt)} ids and max_tokens = {knobs.max_tokens} exceed {max_context} ids in all; "
            "shorten the prompt, or lower max_tokens"
        )
    if len(request.forced) > knobs.max_tokens:
        raise InputError(
            f"{len(request.forced)} forced ids exceed max_tokens = {knobs.max_tokens}; forced ids count, "
            "so raise max_tokens or force fewer words"
        )
    for name, ids in (("prompt", prompt), ("forced", request.forced)):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise InputError(f"{name} ids must lie in 0..{vocab_size - 1}")
    check_knobs(knobs)


def check_knobs(knobs: Knobs) -> None:
    """Raises InputError for the first knob that is out of range."""
    expected = {
        "temperature": (0 <= knobs.temperature < math.inf, "0 (greedy) or more"),
        "top_k": (0 <= knobs.top_k < 2**31, "0 (all ids) or more"),
        "top_p": (0 < knobs.top_p <= 1, "more than 0 and at most 1"),
        "min_p": (0 <= knobs.min_p <= 1, "0..1"),
        "max_tokens": (0 <= knobs.max_tokens < 2**31, "0 or more"),
        "budget": (0 <= knobs.budget < 2**31, "0 or more"),
    }
    for name, (good, what) in expected.items():
        if not good:
            raise InputError(f"{name} is {getattr(knobs, name)}, expected {what}")
