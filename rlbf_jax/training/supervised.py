"""Next-id training on packed rows: pretraining, SFT, refusal SFT, and the guidance term of RLBF."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from rlbf_jax.directives import EditRule, Semantics, layout
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.lora import split
from rlbf_jax.models.transformer import ModelConfig
from rlbf_jax.objectives.masked import Term, masked_term
from rlbf_jax.objectives.sft import linear_nll, token_nll
from rlbf_jax.ranges import check_at_least
from rlbf_jax.sampling.scoring import in_time_chunks
from rlbf_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlbf_jax.training.stage import StageRun
from rlbf_jax.training.state import TrainState, init_state, make_update, means


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
    """One supervised stage."""

    steps: int = 100
    batch_size: int = 32
    """Rows an update; each row packs several examples."""
    accumulate: int = 1
    """Microbatches an update; divides `batch_size`."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint_every: int = 50

    def __post_init__(self):
        check_at_least(self, 0, "steps")
        check_at_least(self, 1, "batch_size", "accumulate", "checkpoint_every")


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
    config: ModelConfig, params: dict, rule: EditRule, rows: Rows, semantics: Semantics
) -> Term:
    """Summed negative log-likelihood (nats) of the ids in the loss, and their number.

    Rows are read under the same lifetimes as traces are: what a directive retracted is seen, or
    not, as the semantics say. No grammar mask: the grammar is learned here, and enforced where ids
    are drawn.
    """
    where = layout(rule, rows.tokens, rows.segment, rows.in_response, semantics)
    died = where.died if semantics is Semantics.REWIND else None
    hidden, _ = transformer.forward(
        config, params, rows.tokens, Visibility(where.position, rows.segment, died)
    )

    targets, counts = rows.tokens[:, 1:], targets_of(rows)
    if config.final_softcap is None and not config.lora.rank:
        table = transformer.unembedding(config, params)
        total = linear_nll(hidden[:, :-1], table, targets, counts)
        return Term(total, jnp.sum(counts, dtype=jnp.float32))

    def read(hidden: Array, targets: Array) -> Array:
        return token_nll(transformer.unembed(config, params, hidden), targets)

    return masked_term(in_time_chunks(read, (hidden[:, :-1], targets), config.vocab_size), counts)


def targets_of(rows: Rows) -> Array:
    """[B, T - 1] bool: which ids 1..T are in the loss; never the first id of a packed segment."""
    return rows.in_loss[:, 1:] & (rows.segment[:, 1:] == rows.segment[:, :-1])


def count_targets(rows: Rows) -> Array:
    """The denominator of `supervised_nll`."""
    return jnp.sum(targets_of(rows), dtype=jnp.float32)


def train_supervised(
    config: SupervisedConfig,
    model: ModelConfig,
    params: dict,
    rule: EditRule,
    semantics: Semantics,
    batches: Any,
    folder: Path,
    name: str,
    mesh: Mesh,
) -> dict:
    """Trains and returns the decoder's parameters, or where it has adapters those of them alone.

    `batches` is an iterator of row dicts with `get_state` / `set_state`; its state is part of every
    checkpoint.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    trained, frozen = split(params)
    state = init_state(trained, optimizer)

    def terms(params, rows: Rows) -> dict[str, Term]:
        return {"nll": supervised_nll(model, params, rule, rows, semantics)}

    update = make_update(
        terms,
        lambda rows: {"nll": count_targets(rows)},
        {"nll": 1.0},
        optimizer,
        mesh,
        state,
        config.accumulate,
        frozen,
    )
    run = StageRun(folder, name, config.steps, config.checkpoint_every, mesh)
    first, state, extra = run.start(state)
    if "data" in extra:
        batches.set_state(extra["data"])

    def step(state: TrainState, number: int) -> tuple[TrainState, dict[str, float]]:
        state, metrics = update(state, rows_of(next(batches)))
        return state, means(metrics)

    state = run.loop(state, first, step, lambda: {"data": batches.get_state()})
    return jax.tree.map(jnp.asarray, state.params)
