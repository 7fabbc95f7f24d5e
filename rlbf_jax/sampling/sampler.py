"""The sampler's host side: requests in, generations out.

Rows are sampled `batch_size` at a time, and never wait for each other: where rows are over, their
responses are taken out and rows of the next requests enter (continuous batching; Yu et al., Orca,
OSDI 2022).
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from rlbf_jax.directives import EditRule
from rlbf_jax.models.transformer import ModelConfig
from rlbf_jax.parallel.axes import LOGICAL, parts_of
from rlbf_jax.parallel.backend import backend
from rlbf_jax.parallel.placing import fetched, placed
from rlbf_jax.sampling import loop
from rlbf_jax.sampling.batching import (
    IDLE,
    Group,
    Row,
    SamplerConfig,
    Shape,
    at_once,
    batch_of,
    contexts_of,
    control_bias_of,
    lanes,
    next_groups,
    stop_columns,
)
from rlbf_jax.sampling.checks import check_request, check_seed
from rlbf_jax.sampling.engine import generation_of
from rlbf_jax.sampling.program import Params, Program, as_program
from rlbf_jax.sampling.request import Generation, Request, prompt_of
from rlbf_jax.sampling.state import Prefilled, SampleState
from rlbf_jax.tokenizers import Tokenizer

TURNS = 32
"""Ids between two questions whether a row is to end."""
_NO_END = 2**31 - 1

Ended = Callable[[int, Generation], bool]
"""ended(place in the list of prompts, what was emitted so far)."""


class Sampler:
    """`Sampler(model, tokenizer, config)(params, prompts, key) -> list[Generation]`."""

    def __init__(
        self,
        model: ModelConfig | Program,
        tokenizer: Tokenizer,
        config: SamplerConfig | None = None,
        *,
        rule: EditRule | None = None,
        mesh: Mesh | None = None,
    ):
        """`rule` is the tokenizer's backtracking rule by default, and rows of the model beyond the
        tokenizer are legal under none; `mesh` divides rows and weights among its devices."""
        self.model = model
        self.program = as_program(model)
        self.tokenizer = tokenizer
        self.config = SamplerConfig() if config is None else config
        rule = tokenizer.controls.rule() if rule is None else rule
        self.rule = known_rule(rule, self.program, tokenizer)
        self.mesh = None if mesh is None or mesh.size == 1 else mesh
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
        every: int = TURNS,
    ) -> list[Generation]:
        """Samples one response a prompt.

        Row r is drawn with fold_in(key, request id), so it does not depend
        on its neighbors, slot or order.

        Args:
          ended: whether what a row has emitted so far is enough. It is asked every `every` ids, so
            a response may be some ids longer than it had to be, and never differs from the
            beginning of what it would be otherwise.
          progress: told after every batch how many responses it finished.

        Raises InputError, before anything is sampled, for a request that cannot be run, and
        UserError for one whose logits are not finite at some id, or leave no id to draw.
        """
        rows = self._rows([p if isinstance(p, Request) else Request(p) for p in prompts])
        program, params = self.program.unrolled(params)
        key = _key(key)
        results: dict[int, Generation] = {}
        for shape, groups in lanes(rows, self.config, program, self.rule).items():
            lane = _Lane(self, program, params, shape, key, groups)
            for finished in lane.run(ended, every):
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
            prompt = tuple(prompt_of(request, encoded))
            check_request(request, prompt, self.tokenizer.vocab_size, longest_text)
            if request.knobs.control_bias:
                control_bias_of(self.rule, [request.knobs])
            rows.append(Row(request, prompt, place if request.id is None else request.id, place))
        return rows


def known_rule(rule: EditRule, program: Program, tokenizer: Tokenizer) -> EditRule:
    """The rule, under which rows of the program that the tokenizer has no id for are illegal."""
    spare = program.vocab_size > tokenizer.vocab_size
    return rule.within(tokenizer.vocab_size) if spare else rule


def contexts_read(config: SamplerConfig, mesh: Mesh | None) -> int:
    """Contexts that are read in one pass. They are divided among devices as rows are."""
    size = config.batch_size
    shards = parts_of("rows", size, mesh)
    return min(size, -(-at_once(config) // shards) * shards)


def writes_one_hot(config: SamplerConfig) -> bool:
    """How cache slots are written: see `SamplerConfig.one_hot_writes`."""
    if config.one_hot_writes is not None:
        return config.one_hot_writes
    # On a CPU, XLA copies a cache of one row to write a slice of it.
    return backend() == "tpu" or (backend() == "cpu" and config.batch_size == 1)


class _Lane:
    """Requests of one shape, and the batch that serves them."""

    def __init__(
        self,
        sampler: Sampler,
        program: Program,
        params: Params,
        shape: Shape,
        key: jax.Array,
        groups: deque[Group],
    ):
        config = sampler.config
        self.sampler, self.params, self.shape, self.key = sampler, params, shape, key
        self.groups = groups
        mesh = None if sampler.mesh is None else sampler.mesh.abstract_mesh
        self.placed = dict(mesh=mesh)
        self.told = dict(program=program, rule=sampler.rule, semantics=config.semantics, mesh=mesh)
        self.one_hot = writes_one_hot(config)
        self.in_place = backend() != "tpu" and sampler.mesh is None
        size = config.batch_size
        self.at_once = contexts_read(config, sampler.mesh)
        self.slots: list[Row | None] = [None] * size
        self.stops = stop_columns(groups, sampler.tokenizer.eos_ids)
        self.asked = batch_of([IDLE] * size, sampler.rule, (), self.stops)
        self.state: SampleState | None = None
        self.read: tuple[Prefilled, deque[tuple[int, Row]]] | None = None

    def run(self, ended: Ended | None, every: int) -> Iterator[dict[int, Generation]]:
        """Finished responses by their place, as they come."""
        turns = _NO_END if ended is None else every
        while True:
            self._fill()
            busy = [slot for slot, row in enumerate(self.slots) if row is not None]
            if not busy:
                return
            awaited = min(self.at_once, len(busy)) if self._waiting else len(busy)
            enough = len(self.slots) - len(busy) + awaited
            self.state = loop.go_on(
                self.params, self.batch, self.state, self.key, np.int32(enough), np.int32(turns),
                one_hot=self.one_hot, **self.told,
            )  # fmt: skip
            if finished := self._harvest(busy, ended):
                yield finished

    @property
    def _waiting(self) -> bool:
        return bool(self.groups) or self.read is not None

    def _fill(self) -> None:
        """Free rows take up requests. A context is read once, however many rows follow it."""
        free = deque(slot for slot, row in enumerate(self.slots) if row is None)
        while free and self._waiting:
            if self.read is None:
                groups = next_groups(self.groups, self.at_once)
                contexts = self._placed(contexts_of(groups, self.at_once))
                prefilled = loop.begin(
                    self.params, contexts, **self.told, **self.shape._asdict(),
                    int8_cache=self.sampler.config.int8_cache,
                )  # fmt: skip
                rows = deque((n, row) for n, group in enumerate(groups) for row in group.rows)
                self.read = prefilled, rows
            prefilled, rows = self.read
            source = np.full(len(self.slots), -1, np.int32)
            entering = {}
            while free and rows:
                slot = free.popleft()
                source[slot], entering[slot] = rows.popleft()
            self._enter(prefilled, source, entering)
            if not rows:
                self.read = None

    def _enter(self, prefilled: Prefilled, source: np.ndarray, entering: dict[int, Row]) -> None:
        sampler = self.sampler
        slots, rows = list(entering), list(entering.values())
        new = batch_of(rows, sampler.rule, sampler.tokenizer.eos_ids, self.stops)

        def changed(old: np.ndarray, some: np.ndarray) -> np.ndarray:
            # Arrays on a CPU may share memory with what was handed over: never written to again.
            old = old.copy()
            old[slots] = some
            return old

        self.asked = jax.tree.map(changed, self.asked, new)
        self.batch = self._placed(self.asked)
        for slot, row in entering.items():
            self.slots[slot] = row
        if self.state is None:
            self.state = loop.idle(prefilled, rows=len(self.slots), **self.placed)
        self.state = loop.enter(
            self.state, prefilled, self._placed(source), self.batch, in_place=self.in_place,
            **self.placed,
        )  # fmt: skip

    def _harvest(self, busy: Sequence[int], ended: Ended | None) -> dict[int, Generation]:
        """Takes out what is over; `ended` may say that of a row."""
        state = self.state
        assert state is not None
        done, emitted = (np.array(x) for x in fetched((state.done, state.edit.emitted)))
        over = done.copy()
        if ended is None and not done[busy].any():
            return {}
        trace, logprobs = fetched((state.trace, state.logprobs))
        finished = {}
        for slot in busy:
            row = self.slots[slot]
            assert row is not None
            if not over[slot] and ended is None:
                continue
            count = emitted[slot]
            found = generation_of(
                row.request,
                row.prompt,
                trace[slot, :count].copy(),
                logprobs[slot, :count].copy(),
                self.sampler.rule,
                self.sampler.tokenizer,
                f"request {row.place} (id {row.id})",
            )
            if not over[slot] and ended is not None:
                over[slot] = ended(row.place, found)
            if over[slot]:
                finished[row.place], self.slots[slot] = found, None
        if (over != done).any():
            self.state = state._replace(done=placed(over, state.done.sharding))
        return finished

    def _placed(self, arrays):
        """On the devices, rows divided among them."""
        mesh = self.sampler.mesh
        if mesh is None:
            return jax.device_put(arrays)

        def place(x: np.ndarray) -> NamedSharding:
            return NamedSharding(mesh, LOGICAL.spec(("rows",), x.shape[:1], mesh))

        return placed(arrays, jax.tree.map(place, arrays))


def _key(key: jax.Array | int) -> jax.Array:
    if isinstance(key, jax.Array):
        return key
    check_seed(key)
    return jax.random.key(int(key))
