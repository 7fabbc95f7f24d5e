"""Next-id training on packed rows: pretraining, SFT, refusal SFT, and the guidance term of RLBF."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

from rlbf_jax.directives import EditRule, Semantics, layout
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.transformer import ModelConfig
from rlbf_jax.objectives.masked import Term, masked_sum
from rlbf_jax.objectives.sft import linear_nll, token_nll
from rlbf_jax.plain import DECIDES_NOTHING
from rlbf_jax.ranges import check_at_least, check_positive
from rlbf_jax.sampling.scoring import in_time_chunks
from rlbf_jax.training.forecast import tell
from rlbf_jax.training.learner import Learner, Objective
from rlbf_jax.training.loop import Loop
from rlbf_jax.training.optimizer import OptimizerConfig
from rlbf_jax.training.state import TrainState, means


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
    """One supervised stage."""

    steps: int = 100
    batch_size: int = 32
    """Rows an update; each row packs several examples."""
    accumulate: int = 1
    """Microbatches an update; divides `batch_size`."""
    directive_weight: float = 1.0
    """Of control ids among the targets; other targets weigh 1. An example has two of them among
    fifty, and they decide what is taken back. Ours."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint_every: int = 50
    keep_checkpoints: int = dataclasses.field(default=1, metadata=DECIDES_NOTHING)
    """So many of the newest stay; more than one for who wants to look back."""

    def __post_init__(self):
        check_at_least(self, 0, "steps")
        check_at_least(self, 1, "batch_size", "accumulate", "checkpoint_every")
        check_at_least(self, 1, "keep_checkpoints")
        check_positive(self, "directive_weight")


class Rows(NamedTuple):
    """A batch of packed rows, [B, T] each: see `data.packing`."""

    tokens: Array
    segment: Array
    in_response: Array
    in_loss: Array


def rows_of(batch: dict) -> Rows:
    """A data iterator's dict as `Rows`."""
    return Rows(**{name: jnp.asarray(batch[name]) for name in Rows._fields})


def supervised_nll(
    config: ModelConfig,
    params: dict,
    rule: EditRule,
    rows: Rows,
    semantics: Semantics,
    directive_weight: float = 1.0,
) -> Term:
    """Weighted sum of the negative log-likelihoods (nats) of the ids in the loss, and the sum of
    their weights: 1, and `directive_weight` of control ids.

    Rows are read under the same lifetimes as traces are:
    what a directive retracted is seen, or not, as the semantics say.
    No grammar mask: the grammar is learned here, and enforced where ids are drawn.
    """
    where = layout(rule, rows.tokens, rows.segment, rows.in_response, semantics)
    died = where.died if semantics is Semantics.REWIND else None
    hidden, _ = transformer.forward(
        config, params, rows.tokens, Visibility(where.position, rows.segment, died)
    )

    targets, weights = rows.tokens[:, 1:], weights_of(rows, rule, directive_weight)
    if config.final_softcap is None and not config.lora.rank:
        table = transformer.unembedding(config, params)
        total = linear_nll(hidden[:, :-1], table, targets, weights)
        return Term(total, jnp.sum(weights, dtype=jnp.float32))

    def read(params: dict, knobs: tuple, hidden: Array, targets: Array) -> Array:
        return token_nll(transformer.unembed(config, params, hidden), targets)

    nll = in_time_chunks(read, params, (), (hidden[:, :-1], targets), config.vocab_size)
    total = masked_sum(nll * weights, weights != 0)
    return Term(total, jnp.sum(weights, dtype=jnp.float32))


def targets_of(rows: Rows) -> Array:
    """[B, T - 1] bool: which ids 1..T are in the loss; never the first id of a packed segment."""
    return rows.in_loss[:, 1:] & (rows.segment[:, 1:] == rows.segment[:, :-1])


def weights_of(rows: Rows, rule: EditRule, directive_weight: float = 1.0) -> Array:
    """[B, T - 1]: `targets_of`, or where control ids weigh something else than 1 the weights of
    all ids as float32."""
    counts = targets_of(rows)
    if directive_weight == 1.0:
        return counts
    weight = jnp.where(rule.is_control(rows.tokens[:, 1:]), directive_weight, 1.0)
    return jnp.where(counts, weight, 0.0)


def total_weight(rows: Rows, rule: EditRule, directive_weight: float = 1.0) -> Array:
    """The denominator of `supervised_nll`."""
    return jnp.sum(weights_of(rows, rule, directive_weight), dtype=jnp.float32)


def supervised_objective(
    config: ModelConfig, rule: EditRule, semantics: Semantics, directive_weight: float = 1.0
) -> Objective:
    """Mean negative log-likelihood of the ids in the loss, over batches of `Rows`."""

    def terms(params: dict, rows: Rows) -> dict[str, Term]:
        return {"nll": supervised_nll(config, params, rule, rows, semantics, directive_weight)}

    def denominators(rows: Rows) -> dict[str, Array]:
        return {"nll": total_weight(rows, rule, directive_weight)}

    return Objective(terms, denominators, {"nll": 1.0})


def train(learner: Learner, batches: Batches, loop: Loop) -> dict:
    """Updates a learner on batches until the loop ends; returns the trained parameters.

    The state of `batches` is part of every checkpoint,
    so a restarted stage repeats itself to the bit.
    """
    first, state, extra = loop.start(learner.shapes, make=learner.begun)
    learner.take(state)
    if "data" in extra:
        batches.set_state(extra["data"])

    def step(state: TrainState, number: int) -> tuple[TrainState, dict[str, float]]:
        learner.take(state)
        with loop.clock.part("data"):
            batch = batches.next_batch()
        with loop.clock.part("update"):
            if number == first:
                tell(learner, batch, loop.name)
            metrics = means(learner.update(batch))
        return learner.state, metrics

    learner.take(loop.run(state, first, step, lambda: {"data": batches.get_state()}))
    return learner.state.params  # no update follows that would use the buffers up


class Batches(Protocol):
    """An endless source of batches that can be set back to where it was."""

    def next_batch(self) -> Any:
        """The next batch, as the learner's objective reads it."""
        ...

    def get_state(self) -> Any:
        """JSON that `set_state` takes."""
        ...

    def set_state(self, state: Any) -> None: ...


class PackedRows:
    """An iterator of packed rows (dicts with `get_state` and `set_state`) as batches of `Rows`."""

    def __init__(self, iterator: Any):
        self._iterator = iterator

    def next_batch(self) -> Rows:
        return rows_of(next(self._iterator))

    def get_state(self) -> Any:
        return self._iterator.get_state()

    def set_state(self, state: Any) -> None:
        self._iterator.set_state(state)
