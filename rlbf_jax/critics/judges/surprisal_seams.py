"""The critic of seams where no grammar knows the text: how surprised a reference model is by what
follows a seam, against how surprised it is by text that nobody has touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from rlbf_jax.critics.seams import Stitched
from rlbf_jax.ranges import check_at_least, check_between, check_positive

Ids = tuple[int, ...]
Surprisals = Callable[[Sequence[tuple[Ids, Ids]]], list[np.ndarray]]
"""(prompt ids, text ids) pairs -> of each text, [n] nats of each of its ids."""


@dataclasses.dataclass(frozen=True)
class SeamConfig:
    """When a seam of real text is torn. Every number is ours; none was tuned on torn text."""

    window: int = 8
    """So many ids behind a seam are read, the end of sequence among them where the response ended
    within: about half a sentence, in which a break that the seam made shows and later slips of the
    model do not."""
    quantile: float = 0.99
    """A seam is torn where the mean surprisal of its window is above this quantile of windows of as
    many ids anywhere in untouched text: so one place in a hundred of untouched text would be called
    torn."""
    factor: float = 1.0
    """Times which that quantile is the bound; above 1 only what is worse is called torn."""

    def __post_init__(self):
        check_at_least(self, 1, "window")
        check_between(self, 0, 1, "quantile")
        check_positive(self, "factor")


def seam_surprisal(surprisal: np.ndarray, index: int, window: int) -> tuple[float, int]:
    """(mean surprisal, how many ids) of the at most `window` ids behind a seam.

    Args:
      surprisal: [n] nats of a text's ids, in order, that of the end last where the response ended.
      index: `Seam.index`, of the first id behind the seam.

    NaN of 0 ids where the text breaks off at the seam without having ended.
    """
    behind = np.asarray(surprisal, np.float64)[index : index + window]
    return (float(behind.mean()), len(behind)) if len(behind) else (float("nan"), 0)


def window_bounds(surprisals: Sequence[np.ndarray], config: SeamConfig) -> np.ndarray:
    """[window] float64: the bound on the mean of a window of 1, 2, ..., `config.window` ids.

    A mean of few ids varies more than one of many, so each length has its own: `factor` times the
    `quantile` of the means of all such windows in the texts. Infinite (nothing is torn) for a
    length that no text has.

    Args:
      surprisals: of untouched texts, [n] nats each.
    """
    bounds = np.full(config.window, np.inf)
    for size in range(1, config.window + 1):
        means = [
            np.convolve(np.asarray(text, np.float64), np.full(size, 1 / size), "valid")
            for text in surprisals
            if len(text) >= size
        ]
        if means:
            bounds[size - 1] = config.factor * np.quantile(np.concatenate(means), config.quantile)
    return bounds


def torn_by_surprisal(surprisal: np.ndarray, index: int, bounds: np.ndarray) -> bool | None:
    """Whether what follows a seam surprises more than the bound of its length allows.

    Args: as `seam_surprisal`; bounds: of `window_bounds`.

    None where nothing follows and the response had not ended, or the model gave no number.
    """
    mean, size = seam_surprisal(surprisal, index, len(bounds))
    return None if np.isnan(mean) else bool(mean > bounds[size - 1])


class SurprisalSeams:
    """A seam is torn where `torn_by_surprisal` says so.

    The reference model reads ids as they were drawn, not text that is encoded anew: over half a
    word that would give ids that nobody drew.

    Args:
      surprisals: of a reference model, best the run's base, which has learned to take nothing back.
      bounds: of `window_bounds`, under the same model.
      name: for reports.
    """

    def __init__(self, surprisals: Surprisals, bounds: np.ndarray, name: str = "surprisal"):
        self.name = name
        self._surprisals, self._bounds = surprisals, bounds

    def torn(self, answers: Sequence[Stitched]) -> list[tuple[bool | None, ...]]:
        """One tuple an answer, see `torn_by_surprisal`."""
        pairs = [_read_ids(answer) for answer in answers]
        full = [number for number, (_, ids) in enumerate(pairs) if ids]
        found = self._surprisals([pairs[number] for number in full]) if full else []
        surprisals = dict(zip(full, found, strict=True))
        return [
            tuple(
                torn_by_surprisal(surprisals.get(number, np.zeros(0)), seam.index, self._bounds)
                for seam in answer.seams
            )
            for number, answer in enumerate(answers)
        ]


def _read_ids(answer: Stitched) -> tuple[Ids, Ids]:
    """What the reader sees as ids: the prompt, and the visible text with its end."""
    generation = answer.generation
    end = (int(generation.trace[-1]),) if generation.finished else ()
    prompt = tuple(int(token) for token in generation.prompt_ids)
    return prompt, (*generation.visible, *end)
