"""A critic that is a trained text classifier.
It finds the words of a violation by leaving words out, or by windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from rlbf_jax.critics.base import Critic, Exchange, Span, Verdict
from rlbf_jax.critics.classifiers.text_classifier import TextClassifier, load_classifier, sigmoid
from rlbf_jax.critics.classifiers.text_features import (
    BLOCKS,
    Occurrences,
    occurrences,
    term_frequency,
)
from rlbf_jax.critics.lexicon import Coherence
from rlbf_jax.errors import UserError
from rlbf_jax.plain import PATH
from rlbf_jax.ranges import check_at_least, check_between

OPTION = "critic_classifier"
"""The option of an experiment that holds a `ClassifierCriticConfig`."""

NO_WORDS = "no words"
NO_KNOWN_WORDS = "no words that the classifier knows"

_MOST_VARIANTS = 512
"""Of a text; in longer ones neighboring words are left out together."""
_CHUNK = 4_000_000
"""Most (variant, n-gram) pairs held in memory at once."""


@dataclasses.dataclass(frozen=True)
class VerdictConfig:
    """From probabilities to verdicts."""

    threshold: float = 0.5
    """A text violates every category whose probability is at least this."""
    spans: Literal["occlusion", "window"] = "occlusion"
    """Occlusion: words without which the logit drops most. Window: runs of words that alone reach
    the threshold."""
    share: float = 0.2
    """Occlusion: words belong to a span whose drop is at least this share of the largest one."""
    largest_gap: int = 2
    """Occlusion: so many other words between two of a span's words belong to it."""
    window: int = 4
    """Window: words."""

    def __post_init__(self):
        check_between(self, 0, 1, "threshold", "share")
        check_at_least(self, 0, "largest_gap")
        check_at_least(self, 1, "window")


@dataclasses.dataclass(frozen=True)
class ClassifierCriticConfig(VerdictConfig):
    """A trained classifier as a critic; none where `path` is empty."""

    path: str = dataclasses.field(default="", metadata=PATH)
    """Folder that `rlbf critic` wrote. Its categories must be some of the run's."""


class ClassifierCritic:
    """Judges texts by a text classifier; a `Critic`.

    A text is unsafe if and only if a category's probability reaches the threshold; then there is at
    least one span. Spans are all complete (a classifier does not know what has only begun), do not
    overlap, and where two categories claim the same words the likelier one has them. A text without
    a word, or without one that the classifier knows, could not be judged.

    Args:
      classifier: says how likely each category is.
      config: threshold and spans.
      coherence: says whether a text is coherent and useful, of which the classifier knows nothing;
        None: verdicts leave both open, and rewards then take them for granted.
    """

    def __init__(
        self,
        classifier: TextClassifier,
        config: VerdictConfig = VerdictConfig(),
        coherence: Coherence | None = None,
    ):
        self.classifier, self.config = classifier, config
        self.categories = classifier.categories
        self.name = f"classifier {classifier.digest[:8]}"
        self._coherence = coherence

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """One verdict an exchange, in order. Only `text` is read, never the prompt."""
        probabilities = self.classifier.probabilities([e.text for e in exchanges])
        return [self._judge(e, p) for e, p in zip(exchanges, probabilities, strict=True)]

    def scores(self, exchanges: Sequence[Exchange]) -> np.ndarray:
        """float64 [N, C]: probability of each of `categories`;
        a row of NaN where `judge` could not judge.

        The largest of a row is at least the threshold exactly where the verdict is unsafe.
        """
        return self.classifier.probabilities([e.text for e in exchanges])

    def spans(self, text: str) -> tuple[Span, ...]:
        """Violations of a text from left to right."""
        return self._spans(text, self.classifier.probabilities([text])[0])

    def _judge(self, exchange: Exchange, probabilities: np.ndarray) -> Verdict:
        if np.isnan(probabilities).any():
            words = occurrences(exchange.text, self.classifier.features).spans
            return Verdict(judged=False, reason=NO_KNOWN_WORDS if words else NO_WORDS)
        spans = self._spans(exchange.text, probabilities)
        if self._coherence is None:
            return Verdict(spans)
        return Verdict(spans, *self._coherence(exchange.text, exchange.topic))

    def _spans(self, text: str, probabilities: np.ndarray) -> tuple[Span, ...]:
        found = [
            c
            for c in np.argsort(-probabilities, kind="stable")
            if probabilities[c] >= self.config.threshold
        ]
        if not found:
            return ()
        heard = occurrences(text, self.classifier.features)
        marked = (
            _by_window(self.classifier, heard, self.config)
            if self.config.spans == "window"
            else None
        )
        marked = _by_occlusion(self.classifier, heard, self.config) if marked is None else marked
        spans: list[Span] = []
        for c in found:
            for first, last in _runs(
                marked[c], self.config.largest_gap if self.config.spans == "occlusion" else 0
            ):
                span = Span(
                    heard.spans[first][0], heard.spans[last][1], self.classifier.categories[c]
                )
                if not any(span.start < other.end and other.start < span.end for other in spans):
                    spans.append(span)
        return tuple(sorted(spans, key=lambda span: span.start))


def load_critic(
    path: Path, config: VerdictConfig, coherence: Coherence | None = None
) -> ClassifierCritic:
    """The critic of a folder that `rlbf critic` wrote.
    Raises InputError where there is no whole classifier."""
    return ClassifierCritic(load_classifier(path), config, coherence)


def coherence_of(critic: Critic) -> Coherence:
    """What another critic says of coherent and useful, one text at a time;
    what it leaves open counts as so."""

    def coherence(text: str, topic: str) -> tuple[bool, bool]:
        verdict = critic.judge([Exchange("", text, topic)])[0]
        return verdict.coherent is not False, verdict.useful is not False

    return coherence


def check_categories(critic: ClassifierCritic, categories: Sequence[str]) -> None:
    """Raises UserError where the classifier knows a category that a run does not."""
    unknown = sorted(set(critic.classifier.categories) - set(categories))
    if unknown:
        raise UserError(
            f"{OPTION}.path: the classifier's categories {', '.join(unknown)} are none of the "
            "run's, "
            f"{', '.join(categories)}; train it on columns with these names"
        )


# Words --------------------------------------------------------------------------------------------


def masked_logits(classifier: TextClassifier, heard: Occurrences, kept: np.ndarray) -> np.ndarray:
    """Calibrated logits of a text with some of its words only;
    an n-gram counts if all of its words are kept.

    Args:
        heard: the text's n-grams over its m words.
        kept: bool [V, m], the words of each variant.

    Returns:
        float64 [V, C]; the bias alone where nothing known is left.
    """
    known = classifier.idf[heard.ids] > 0
    unique, owner = np.unique(heard.ids[known], return_inverse=True)
    order = np.argsort(owner, kind="stable")
    first, last = heard.first[known][order], heard.last[known][order]
    starts = np.searchsorted(owner[order], np.arange(len(unique)))
    idf, weights = classifier.idf[unique], classifier.weights[unique].astype(np.float64)
    block = unique >> classifier.features.bits
    logits = np.tile(classifier.bias.astype(np.float64), (len(kept), 1))
    rows = max(1, _CHUNK // max(1, len(order)))
    for start in range(0, len(kept) if len(unique) else 0, rows):
        part = kept[start : start + rows]
        before = np.concatenate([np.zeros((len(part), 1), np.int64), np.cumsum(part, 1)], 1)
        whole = before[:, last + 1] - before[:, first] == last + 1 - first
        values = term_frequency(np.add.reduceat(whole, starts, axis=1, dtype=np.int64)) * idf
        for b in range(BLOCKS):
            mine = values[:, block == b]
            norms = np.sqrt((mine.astype(np.float64) ** 2).sum(1, keepdims=True))
            logits[start : start + rows] += (mine / np.where(norms > 0, norms, 1)) @ weights[
                block == b
            ]
    return logits * classifier.scale + classifier.offset


def _by_occlusion(
    classifier: TextClassifier, heard: Occurrences, config: VerdictConfig
) -> np.ndarray:
    """bool [C, m]: words whose absence lowers the logit by a share of the most
    that any word's absence does."""
    m = len(heard.spans)
    unit = np.arange(m) // -(-m // _MOST_VARIANTS)
    variants = unit[None] != np.arange(unit[-1] + 1)[:, None]
    everything = masked_logits(classifier, heard, np.ones((1, m), bool))
    drops = everything - masked_logits(classifier, heard, variants)
    marked = (drops >= config.share * drops.max(0)) & (drops > 0)
    # A violation that no single word carries is the whole text.
    marked[:, ~marked.any(0)] = True
    return marked[unit].T


def _by_window(classifier: TextClassifier, heard: Occurrences, config: VerdictConfig) -> np.ndarray:
    """bool [C, m]: words of windows that reach the threshold by themselves;
    without one, of the likeliest window."""
    m = len(heard.spans)
    size = min(config.window, m)
    stride = min(size, -(-m // _MOST_VARIANTS))
    starts = np.unique(np.append(np.arange(0, m - size + 1, stride), m - size))
    places = np.arange(m)
    windows = (places >= starts[:, None]) & (places < starts[:, None] + size)
    p = sigmoid(masked_logits(classifier, heard, windows))
    chosen = (p >= config.threshold) | (p == p.max(0)) & (p.max(0) < config.threshold)
    return np.stack([windows[chosen[:, c]].any(0) for c in range(p.shape[1])])


def _runs(marked: np.ndarray, largest_gap: int) -> list[tuple[int, int]]:
    """(first, last) of each run of marked places;
    up to `largest_gap` others inside a run do not end it."""
    places = np.flatnonzero(marked)
    cuts = np.flatnonzero(np.diff(places) > largest_gap + 1)
    return list(
        zip(
            places[np.append(0, cuts + 1)].tolist(),
            places[np.append(cuts, len(places) - 1)].tolist(),
            strict=True,
        )
    )
