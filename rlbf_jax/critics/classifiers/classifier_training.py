"""Training of text classifiers: logistic regression on TF-IDF rows, by L-BFGS in JAX,
calibrated on held-out folds."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlbf_jax.critics.classifiers.text_classifier import TextClassifier, linear_logits, sigmoid
from rlbf_jax.critics.classifiers.text_features import (
    FeatureConfig,
    SparseRows,
    inverse_document_frequency,
    sparse_rows,
    weighted,
)
from rlbf_jax.errors import InputError
from rlbf_jax.ranges import check_at_least, check_between, check_positive


@dataclasses.dataclass(frozen=True)
class ClassifierTrainingConfig:
    """How a text classifier is trained."""

    features: FeatureConfig = FeatureConfig()
    inverse_l2: float = 10.0
    """C of the objective C x (sum of log losses) + |w|^2 / 2. Larger: less regularized."""
    min_rows: int = 2
    """Features that fewer training texts have are left out."""
    calibration_folds: int = 5
    """Folds whose held-out logits probabilities are calibrated on."""
    max_iterations: int = 100
    tolerance: float = 1e-5
    """Training ends where no component of the mean loss's gradient is larger."""
    seed: int = 0
    """Of the folds."""

    def __post_init__(self):
        check_positive(self, "inverse_l2", "tolerance")
        check_at_least(self, 1, "min_rows", "max_iterations")
        check_at_least(self, 2, "calibration_folds")
        check_between(self, 0, 2**32 - 1, "seed")


def train_classifier(
    texts: Sequence[str],
    labels: np.ndarray,
    categories: Sequence[str],
    config: ClassifierTrainingConfig = ClassifierTrainingConfig(),
) -> TextClassifier:
    """Trains on all texts; probabilities are calibrated on logits of texts
    that a fold's classifier had not seen.

    Args:
        texts: N texts.
        labels: bool [N, C].
        categories: C names.

    Raises:
        InputError: a category has too few texts with, or without, it.
    """
    labels = np.asarray(labels, bool)
    _check(labels, categories, texts, config.calibration_folds)
    return _train(sparse_rows(texts, config.features), labels, texts, tuple(categories), config)


@dataclasses.dataclass(frozen=True)
class Fold:
    """A part of the texts, and a classifier that has seen the others only."""

    held_out: np.ndarray
    """int64 indices of the texts it has not seen."""
    classifier: TextClassifier
    seconds: float
    """Wall-clock time of its training, calibration included."""


def cross_validate(
    texts: Sequence[str],
    labels: np.ndarray,
    categories: Sequence[str],
    config: ClassifierTrainingConfig = ClassifierTrainingConfig(),
    folds: int = 5,
) -> Iterator[Fold]:
    """Trains once a fold on all others, calibration included,
    so that nothing of a classifier has seen its fold.

    Raises InputError as `train_classifier` does, and ValueError for fewer than two folds.
    """
    if folds < 2:
        raise ValueError(f"folds is {folds}, expected at least 2")
    labels = np.asarray(labels, bool)
    # Each training set must still be divisible into calibration folds.
    least = -(-config.calibration_folds * folds // (folds - 1))
    _check(labels, categories, texts, max(folds, least))
    rows = sparse_rows(texts, config.features)
    fold = assign_folds(texts, labels, folds, config.seed)
    for k in range(folds):
        began = time.perf_counter()
        seen, held_out = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        part = [texts[i] for i in seen.tolist()]
        classifier = _train(rows.take(seen), labels[seen], part, tuple(categories), config)
        yield Fold(held_out, classifier, time.perf_counter() - began)


def assign_folds(texts: Sequence[str], labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """int64 [N] fold of each text: equal texts share one, and every combination
    of labels is spread evenly."""
    groups: dict[str, int] = {}
    member = np.array([groups.setdefault(text, len(groups)) for text in texts], np.int64)
    _, first = np.unique(member, return_index=True)
    rng = np.random.default_rng([seed, folds])
    order = rng.permutation(len(groups))
    # Sorted by labels, dealt out like cards.
    keys = labels[first][order]
    dealt = order[np.lexsort(keys.T[::-1])]
    fold = np.empty(len(groups), np.int64)
    fold[dealt] = np.arange(len(groups)) % folds
    return fold[member]


def _check(labels: np.ndarray, categories: Sequence[str], texts: Sequence[str], least: int) -> None:
    if labels.shape != (len(texts), len(categories)) or not len(categories):
        raise ValueError(
            f"labels have shape {labels.shape}, expected ({len(texts)} texts, {len(categories)} "
            ">= 1)"
        )
    for c, name in enumerate(categories):
        groups: list[set[str]] = [set(), set()]
        for text, label in zip(texts, labels[:, c], strict=True):
            groups[int(label)].add(text)
        for word, group in zip(("without", "with"), groups, strict=True):
            if len(group) < least:
                raise InputError(
                    f"category {name!r}: {len(group)} distinct texts {word} it, at least {least} "
                    "are needed; give "
                    "more rows, fewer folds, or another threshold"
                )


def _train(
    rows: SparseRows,
    labels: np.ndarray,
    texts: Sequence[str],
    categories: tuple[str, ...],
    config: ClassifierTrainingConfig,
) -> TextClassifier:
    fold = assign_folds(texts, labels, config.calibration_folds, config.seed)
    held_out = np.zeros(labels.shape)
    for k in range(config.calibration_folds):
        seen, rest = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        idf, weights, bias = _fit(rows.take(seen), labels[seen], config)
        held_out[rest] = linear_logits(
            weighted(rows.take(rest), idf, config.features), weights, bias
        )
    pairs = [platt_scaling(held_out[:, c], labels[:, c]) for c in range(len(categories))]
    idf, weights, bias = _fit(rows, labels, config)
    scale, offset = (np.array(values, np.float64) for values in zip(*pairs, strict=True))
    return TextClassifier(config.features, categories, idf, weights, bias, scale, offset)


def platt_scaling(
    logits: np.ndarray, labels: np.ndarray, iterations: int = 50
) -> tuple[float, float]:
    """(scale, offset) that make sigmoid(scale x logit + offset) a probability, by Newton's method.

    Targets are smoothed as Platt (1999) does, so that separable logits have a finite answer.

    Args:
        logits: [N] of texts that the classifier has not seen.
        labels: bool [N], both values present.
    """
    positive = int(labels.sum())
    target = np.where(labels, (positive + 1) / (positive + 2), 1 / (len(labels) - positive + 2))
    x = np.stack([logits, np.ones_like(logits)], 1)
    theta = np.array([1.0, 0.0])

    def loss(at: np.ndarray) -> float:
        z = x @ at
        return float((np.logaddexp(0, z) - target * z).sum())

    for _ in range(iterations):
        p = sigmoid(x @ theta)
        gradient = x.T @ (p - target)
        if np.abs(gradient).max() < 1e-9 * len(logits):
            break
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + 1e-10 * np.eye(2), gradient)
        size = 1.0
        while loss(theta - size * step) > loss(theta) and size > 1e-8:
            size /= 2
        theta = theta - size * step
    return float(theta[0]), float(theta[1])


# Logistic regression ------------------------------------------------------------------------------


def _fit(
    rows: SparseRows, labels: np.ndarray, config: ClassifierTrainingConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logistic regression on TF-IDF: idf [F], weights float32 [F, C], bias float32 [C]."""
    idf = inverse_document_frequency(rows, config.features, config.min_rows)
    known = np.flatnonzero(idf)
    x = weighted(rows, idf, config.features)
    # Padded shapes, so that one program serves all folds.
    n, nnz, width = (
        _round_up(len(rows), 256),
        _round_up(len(x.ids), 1 << 17),
        _round_up(len(known), 1 << 14),
    )
    owner = _padded(x.owner, nnz, n - 1, np.int32)
    ids = _padded(np.searchsorted(known, x.ids), nnz, 0, np.int32)
    values = _padded(x.values, nnz, 0, np.float32)
    targets = np.zeros((n, labels.shape[1]), np.float32)
    targets[: len(rows)] = labels
    present = _padded(np.ones(len(rows)), n, 0, np.float32)
    penalty = np.float32(1 / (config.inverse_l2 * len(rows)))
    weights, bias = minimize_log_loss(
        owner,
        ids,
        values,
        targets,
        present,
        penalty,
        np.float32(config.tolerance),
        width,
        config.max_iterations,
    )
    full = np.zeros((config.features.size, labels.shape[1]), np.float32)
    full[known] = np.asarray(weights)[: len(known)]
    return idf, full, np.asarray(bias)


@functools.partial(jax.jit, static_argnames=("width", "max_iterations"))
def minimize_log_loss(
    owner, ids, values, targets, present, penalty, tolerance, width, max_iterations
):
    """Mean logistic loss of sparse rows, plus penalty x |w|^2 / 2 (the bias is free),
    minimized by L-BFGS from zero.

    Args:
        owner: int32 [nnz] row of each entry, ascending.
        ids: int32 [nnz] column of each entry, below `width`.
        values: float32 [nnz]; 0 for padding.
        targets: float32 [N, C] in 0..1.
        present: float32 [N], 1 for rows and 0 for padding.
        penalty, tolerance: float32 scalars;
          iteration ends where no gradient component exceeds `tolerance`.

    Returns:
        (weights [width, C], bias [C]), float32.
    """
    n = present.sum()

    def loss(params):
        weights, bias = params
        terms = values[:, None] * weights[ids]
        z = jax.ops.segment_sum(terms, owner, targets.shape[0], indices_are_sorted=True) + bias
        losses = (jax.nn.softplus(z) - targets * z) * present[:, None]
        return losses.sum() / n + 0.5 * penalty * jnp.sum(weights**2)

    solver = optax.lbfgs(memory_size=10)
    value_and_grad = optax.value_and_grad_from_state(loss)
    start = (jnp.zeros((width, targets.shape[1])), jnp.zeros(targets.shape[1]))

    def step(carry):
        params, state, iteration, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        largest = jnp.maximum(jnp.abs(grad[0]).max(), jnp.abs(grad[1]).max())
        return optax.apply_updates(params, updates), state, iteration + 1, largest

    def unfinished(carry):
        return (carry[2] < max_iterations) & (carry[3] > tolerance)

    return jax.lax.while_loop(unfinished, step, (start, solver.init(start), 0, jnp.inf))[0]


def _round_up(n: int, multiple: int) -> int:
    return max(1, -(-n // multiple)) * multiple


def _padded(array: np.ndarray, length: int, value: float, dtype: type) -> np.ndarray:
    padded: np.ndarray = np.full(length, value, dtype)
    padded[: len(array)] = array
    return padded
