"""The arithmetic of GCG (Zou et al., arXiv 2307.15043), without randomness:
losses of suffixes and their gradient.

A prompt is `prefix + suffix + tail`: the suffix is what is searched for,
the tail the rest of the prompt and the answer that is wished for (its *target*),
perhaps with a continuation. Keys and values of the prefix are computed once.
All candidates differ from the current suffix in few places, so those of the ids before a
candidate's first change are those of the current suffix, and only what follows is computed:
candidates are sorted by their first change, and every chunk of them starts as late as it can.

Letters: n ids in the suffix, A in the tail, S candidates, C candidates a chunk;
  others as in `models/attention.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlbf_jax.directives import EditRule, Legal
from rlbf_jax.models import lora, transformer
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.prefixed import Prefix, joined
from rlbf_jax.ranges import check_positive

STARTS = 8
"""Most places of a suffix at which chunks may start. Every one is another program to compile."""


class Behavior(NamedTuple):
    """What one suffix is searched for. Several are stacked along a new first axis, padded to equal
    lengths. Arrays of numpy or JAX."""

    prefix: Any
    """[P] int32: ids before the suffix, then padding."""
    prefix_length: Any
    """int32."""
    tail: Any
    """[A] int32: ids after the suffix, then padding."""
    is_target: Any
    """[A] bool: the answer wished for."""
    is_control: Any
    """[A] bool: where the beginning of a directive counts; the ids there are teacher-forced."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """loss = mean over the target + `control_weight` x mean log-probability
    of a directive's beginning.

    Hashable: a static argument of jitted functions.
    """

    kind: Literal["ce", "mellowmax"] = "ce"
    """Cross-entropy, or mellowmax (logsumexp(alpha x) - ln m) / alpha
    of x = minus the raw logits of the m labels."""
    alpha: float = 1.0
    target_weight: float = 1.0
    control_weight: float = 0.0
    """Above 0 directives are suppressed, below 0 they are provoked."""
    control_floor: float | None = None
    """In nats, below 0: where directives are suppressed, a log-probability below counts as this, so
    that nothing is gained by making a directive rarer where it is rare already. None: no floor."""
    rule: EditRule | None = None
    """Of the directives; only a control weight needs it."""
    first: int = 0
    """Columns of the tail before the first that counts, in every behavior:
    their logits are not computed."""

    def __post_init__(self):
        check_positive(self, "alpha")
        if self.control_weight and self.rule is None:
            raise ValueError(
                "control_weight is set, and there is no rule that says what directives are"
            )
        check_control_floor(self.control_floor)


def check_control_floor(floor: float | None) -> None:
    """Raises ValueError for a floor above which no log-probability is."""
    if floor is not None and not floor < 0:
        raise ValueError(f"control_floor is {floor}, expected a log-probability below 0")


def one_behavior(
    prefix: list[int], tail: list[int], target: tuple[int, int], control: tuple[int, int] = (0, 0)
) -> Behavior:
    """A behavior of plain ids. `target` and `control` are (begin, end) in the tail."""
    column = np.arange(len(tail))
    spans = [(begin <= column) & (column < end) for begin, end in (target, control)]
    return Behavior(
        np.asarray(prefix, np.int32), np.int32(len(prefix)), np.asarray(tail, np.int32), *spans
    )


def stack(behaviors: list[Behavior]) -> Behavior:
    """Behaviors side by side, padded on the right; a prefix has room for one id at least."""
    width = max(1, *(len(b.prefix) for b in behaviors))
    tail = max(len(b.tail) for b in behaviors)

    def padded(x, to: int) -> np.ndarray:
        return np.pad(x, (0, to - len(x)))

    rows = [
        Behavior(
            padded(b.prefix, width),
            b.prefix_length,
            *(padded(x, tail) for x in b[2:]),  # type: ignore[arg-type]
        )
        for b in behaviors
    ]
    return jax.tree.map(lambda *x: np.stack(x), *rows)


def first_column(behaviors: Behavior) -> int:
    """`Objective.first` of stacked behaviors."""
    counts = np.asarray(behaviors.is_target) | np.asarray(behaviors.is_control)
    return int(np.argmax(counts.any(axis=0)))


# Losses -----------------------------------------------------------------------------------------


def losses_of_logits(
    objective: Objective, logits: Array, behavior: Behavior
) -> tuple[Array, Array]:
    """Loss [B] and whether every id of the target has the highest logit [B],
    from float32 logits [B, A - first, V]."""
    ids, is_target, is_control = (
        x[objective.first :] for x in (behavior.tail, behavior.is_target, behavior.is_control)
    )
    label = jnp.take_along_axis(
        logits, jnp.broadcast_to(ids[None, :, None], (*logits.shape[:2], 1)), axis=-1
    )[..., 0]
    total = jax.nn.logsumexp(logits, axis=-1)
    count = jnp.maximum(jnp.sum(is_target), 1)
    if objective.kind == "ce":
        loss = jnp.sum(jnp.where(is_target, total - label, 0.0), axis=-1) / count
    else:
        scaled = jnp.where(is_target, -objective.alpha * label, -jnp.inf)
        loss = (jax.nn.logsumexp(scaled, axis=-1) - jnp.log(count)) / objective.alpha
    loss = objective.target_weight * loss
    if objective.control_weight:
        score = directive_logprobs(objective.rule, logits)
        if objective.control_floor is not None and objective.control_weight > 0:
            score = jnp.maximum(score, objective.control_floor)
        score = jnp.where(is_control, score, 0.0)
        loss = loss + objective.control_weight * jnp.sum(score, axis=-1) / jnp.maximum(
            jnp.sum(is_control), 1
        )
    matches = jnp.all(~is_target | (label >= jnp.max(logits, axis=-1)), axis=-1) & jnp.any(
        is_target
    )
    return loss, matches


def directive_logprobs(rule: EditRule | None, logits: Array) -> Array:
    """[..., V] -> [...]: log-probability that a directive begins here, under the grammar
    (no directive is open).

    A category begins one; under a rule without categories a bare retraction does.
    """
    assert rule is not None
    content, opening = (
        rule.legal_ids(Legal(*(jnp.asarray(x) for x in kinds)), logits.shape[-1])
        for kinds in ((True, False, False), (False, bool(rule.categories), not rule.categories))
    )
    among = jax.nn.logsumexp(jnp.where(content | opening, logits, -jnp.inf), axis=-1)
    return jax.nn.logsumexp(jnp.where(opening, logits, -jnp.inf), axis=-1) - among


def _continued(
    model: ModelConfig,
    params: dict,
    objective: Objective,
    behavior: Behavior,
    prefix: Prefix,
    rows: Array,
) -> tuple[Array, Array, tuple]:
    """Losses [B], matches [B] and keys and values of rows [B, T, D] that follow a prefix and end
    with the tail but for its last id, which predicts nothing."""
    position = _behind(prefix) + jnp.arange(rows.shape[1], dtype=jnp.int32)
    keep = behavior.tail.shape[0] - objective.first
    hidden, pairs = transformer.extend(model, params, rows, position, prefix, keep)
    losses, matches = losses_of_logits(
        objective, transformer.unembed(model, params, hidden), behavior
    )
    return losses, matches, pairs


def _behind(prefix: Prefix) -> Array:
    """The position after a prefix. Its real ids stand at 0, 1, 2, ..."""
    return jnp.sum(prefix.position < prefix.position.shape[0], dtype=jnp.int32)


def _rows(model: ModelConfig, params: dict, ids: Array) -> Array:
    return lora.look_up(model, params["embedding"], params.get("embedding_rows"), ids)


def _by_id(model: ModelConfig, params: dict, gradient: Array) -> Array:
    """[n, D] with respect to rows of the embedding -> float32 [n, V] with respect to one-hot ids.
    Adapters that are not merged add rows of their own to the table's."""
    gradient = gradient.astype(jnp.float32)
    by_id = gradient @ params["embedding"].astype(jnp.float32).T
    if "embedding_rows" not in params:
        return by_id
    first = model.lora.first_row
    own = gradient @ params["embedding_rows"].astype(jnp.float32).T
    return by_id.at[:, first : first + own.shape[1]].add(own)


def prefix_of(model: ModelConfig, params: dict, behavior: Behavior) -> Prefix:
    """Keys and values before the suffix."""
    return transformer.prefix_of(model, params, behavior.prefix, behavior.prefix_length)


def suffix_losses(
    model: ModelConfig,
    params: dict,
    objective: Objective,
    behavior: Behavior,
    prefix: Prefix,
    suffixes: Array,
) -> tuple[Array, Array]:
    """Losses [B] and matches [B] of suffixes [B, n], all in one piece."""
    rows = _with_tail(model, params, behavior, suffixes)
    return _continued(model, params, objective, behavior, prefix, rows)[:2]


def _with_tail(model: ModelConfig, params: dict, behavior: Behavior, ids: Array) -> Array:
    tail = jnp.broadcast_to(behavior.tail[:-1], (ids.shape[0], behavior.tail.shape[0] - 1))
    return _rows(model, params, jnp.concatenate([ids, tail], axis=1))


def suffix_gradient(
    model: ModelConfig,
    params: dict,
    objective: Objective,
    behavior: Behavior,
    prefix: Prefix,
    suffix: Array,
) -> tuple[Array, Array, Prefix]:
    """The gradient with respect to the one-hot ids of a suffix.

    It is that of the embedding rows times the embedding table, so no one-hot matrix is made.

    Args:
      suffix: [n] int32.

    Returns:
      loss (float32), gradient [n, V] float32, and keys and values of the suffix.
    """
    tail = _rows(model, params, behavior.tail[None, :-1])

    def loss_of(rows: Array) -> tuple[Array, tuple]:
        losses, _, pairs = _continued(
            model, params, objective, behavior, prefix, jnp.concatenate([rows[None], tail], axis=1)
        )
        return losses[0], pairs

    (loss, pairs), gradient = jax.value_and_grad(loss_of, has_aux=True)(
        _rows(model, params, suffix)
    )
    count = suffix.shape[0]
    own = Prefix(
        tuple((k[0, :, :count], v[0, :, :count]) for k, v in pairs),
        _behind(prefix) + jnp.arange(count, dtype=jnp.int32),
    )
    return loss, _by_id(model, params, gradient), own


# Candidates -------------------------------------------------------------------------------------


def starts_of(length: int, chunks: int) -> tuple[int, ...]:
    """Where chunks may start in a suffix of `length` ids;
    they are sorted, so more places than chunks are of no use."""
    return tuple(range(0, length, -(-length // min(STARTS, chunks))))


def by_start(first_change: Array, wanted: Array, multiple: int) -> Array:
    """Indices of candidates [S] by how late they can start, unwanted ones last; the last one is
    repeated until their number is a multiple of `multiple`."""
    never = jnp.iinfo(jnp.int32).max
    order = jnp.argsort(jnp.where(wanted, -first_change, never))
    return jnp.concatenate([order, jnp.repeat(order[-1:], -order.shape[0] % multiple)])


def candidate_losses(
    model: ModelConfig,
    params: dict,
    objective: Objective,
    behavior: Behavior,
    prefix: Prefix,
    current: Prefix | None,
    candidates: Array,
    first_change: Array,
    wanted: Array,
    chunk: int,
) -> tuple[Array, Array]:
    """Losses and matches of all candidates, `chunk` at a time.

    Args:
      current: keys and values of the suffix that the candidates were made from;
        None: nothing is reused.
      candidates: [S, n] int32.
      first_change: [S] int32: candidates equal that suffix before here.
      wanted: [S] bool. Others get loss +inf, and chunks without a wanted one cost nothing.
      chunk: C (static).

    Returns:
      losses [S] float32, matches [S] bool.
    """
    count, length = candidates.shape
    if count <= chunk:
        losses, matches = suffix_losses(model, params, objective, behavior, prefix, candidates)
        return jnp.where(wanted, losses, jnp.inf), matches & wanted
    order = by_start(first_change, wanted, chunk).reshape(-1, chunk)
    starts = starts_of(length, order.shape[0]) if current is not None else (0,)

    def from_start(start: int):
        before = prefix if start == 0 or current is None else joined(prefix, current, start)

        def run(ids: Array) -> tuple[Array, Array]:
            rows = _with_tail(model, params, behavior, ids[:, start:])
            return _continued(model, params, objective, behavior, before, rows)[:2]

        return run

    def nothing(ids: Array) -> tuple[Array, Array]:
        return jnp.full(ids.shape[0], jnp.inf), jnp.zeros(ids.shape[0], bool)

    def run_chunk(rows: Array) -> tuple[Array, Array]:
        start = jnp.min(jnp.where(wanted[rows], first_change[rows], length))
        branch = jnp.sum(start >= jnp.asarray(starts)) - 1
        branch = jnp.where(jnp.any(wanted[rows]), branch, len(starts))
        return jax.lax.switch(branch, [*map(from_start, starts), nothing], candidates[rows])

    losses, matches = jax.lax.map(run_chunk, order)
    flat = order.reshape(-1)
    losses = jnp.zeros(count).at[flat].set(losses.reshape(-1))
    matches = jnp.zeros(count, bool).at[flat].set(matches.reshape(-1))
    return jnp.where(wanted, losses, jnp.inf), matches & wanted
