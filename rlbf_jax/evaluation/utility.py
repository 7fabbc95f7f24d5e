"""What the defense costs on clean text: perplexity and next-id accuracy on held-out answers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlbf_jax.data.packing import pad_rows
from rlbf_jax.data.schema import Example
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.results import Record
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.transformer import ModelConfig
from rlbf_jax.objectives.sft import token_nll
from rlbf_jax.parallel.placing import fetched


@dataclasses.dataclass(frozen=True)
class TextScores:
    """Per example, over its ids in the loss; float64 arrays [n]."""

    nll: np.ndarray
    """Summed negative log-likelihood, nats."""
    correct: np.ndarray
    """Ids that were the likeliest."""
    count: np.ndarray


def score_texts(
    config: ModelConfig, params: dict, examples: Sequence[Example], batch_size: int
) -> TextScores:
    """Teacher-forced scores of plain examples, without directives, `batch_size` rows at a time.

    Raises UserError for an example whose likelihood is not finite.
    """
    length = transformer.padded_width(config, max(len(e.tokens) for e in examples), 32)
    rows = pad_rows(examples, length)

    columns: list[list[np.ndarray]] = [[], [], []]
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        padded = [*part, *[part[-1]] * (batch_size - len(part))]
        arrays = (
            np.stack([row[name] for row in padded]) for name in ("tokens", "segment", "in_loss")
        )
        for column, values in zip(columns, fetched(_read(config, params, *arrays)), strict=True):
            column.append(np.asarray(values, np.float64)[: len(part)])
    scores = TextScores(*(np.concatenate(column) for column in columns))
    finite = np.isfinite(scores.nll)
    if not finite.all():
        raise UserError(
            f"text {int(np.argmin(finite))}: its likelihood is not finite; look for NaN or inf in "
            "the model's parameters, or compute in float32"
        )
    return scores


def score_rows(scores: TextScores) -> list[dict[str, float]]:
    """One JSON-able row an example, from which `perplexity` and `accuracy` can be counted anew."""
    columns = zip(scores.nll.tolist(), scores.correct.tolist(), scores.count.tolist(), strict=True)
    return [{"nll": nll, "correct": correct, "count": count} for nll, correct, count in columns]


@functools.partial(jax.jit, static_argnums=0)
def _read(
    config: ModelConfig, params: dict, tokens: jax.Array, segment: jax.Array, in_loss: jax.Array
):
    """Per row: summed negative log-likelihood, correct ids, counted ids."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = transformer.forward(config, params, tokens, Visibility(position, segment))
    logits = transformer.unembed(config, params, hidden[:, :-1])
    targets, counts = tokens[:, 1:], in_loss[:, 1:]
    nll = jnp.where(counts, token_nll(logits, targets), 0.0)
    correct = counts & (jnp.argmax(logits, axis=-1) == targets)
    return jnp.sum(nll, axis=1), jnp.sum(correct, axis=1), jnp.sum(counts, axis=1)


def utility_records(
    scores: TextScores, template: Record, seed: int = 0, draws: int = 2000
) -> list[Record]:
    """`perplexity` and `accuracy` with bootstrap intervals over examples;
    `template` gives the other fields."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(scores.count), (draws, len(scores.count)))
    counts = scores.count[picks].sum(axis=1)

    def record(metric: str, total: np.ndarray, transform) -> Record:
        low, high = np.quantile(transform(total[picks].sum(axis=1) / counts), [0.025, 0.975])
        value = float(transform(float(total.sum()) / int(scores.count.sum())))
        return dataclasses.replace(
            template, metric=metric, value=value, n_prompts=len(total), n=int(scores.count.sum()),
            ci_low=float(low), ci_high=float(high), ci_method="bootstrap",
        )  # fmt: skip

    return [
        record("perplexity", scores.nll, np.exp),
        record("accuracy", scores.correct, lambda share: share),
    ]
