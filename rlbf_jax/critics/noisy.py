"""A critic that errs on purpose: how much of reinforcement survives a critic
that is wrong some of the time.

An error is a property of the text, not of the call: the same text always gets the same verdict, as
from a classifier that has not learned it. So rollouts that end alike are paid alike, and a
restarted run repeats itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence

import numpy as np

from rlbf_jax.critics.base import Critic, Exchange, Span, Verdict
from rlbf_jax.errors import UserError
from rlbf_jax.ranges import check_between

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_LONGEST = 8
"""Most words of an invented violation; it has at least 2 where the text has."""


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """Errors of the training critic; none by default.
    Evaluations have a judge of their own, which never errs."""

    accuracy: float = 1.0
    """Share of texts with the right verdict. In the others a text with violations passes as clean,
    and a clean one is given a violation over some of its words."""
    missed: tuple[str, ...] = ()
    """Categories that the critic tends to overlook, whatever else the text holds."""
    miss_rate: float = 1.0
    """Share of texts in which it overlooks the `missed` categories."""
    seed: int = 0
    """Which texts are misjudged."""

    def __post_init__(self) -> None:
        check_between(self, 0, 1, "accuracy", "miss_rate")

    @property
    def active(self) -> bool:
        return self.accuracy < 1 or bool(self.missed and self.miss_rate > 0)


class NoisyCritic:
    """Another critic's verdicts, some of them wrong.

    Only spans (and leaks) change; `coherent`, `useful` and texts that could not be judged stay as
    they are. A text without words cannot be accused and stays clean.

    Args:
      critic: the one that knows.
      config: how often and how it errs.
      categories: what an invented violation may be called.

    Raises UserError for a missed category that is none of `categories`.
    """

    def __init__(self, critic: Critic, config: NoiseConfig, categories: Sequence[str]):
        unknown = sorted(set(config.missed) - set(categories))
        if unknown:
            raise UserError(
                f"critic_noise.missed: no category {', '.join(unknown)}; expected some of "
                f"{', '.join(categories)}"
            )
        self.critic, self.config, self.categories = critic, config, tuple(categories)
        parts = [f"accuracy_{config.accuracy:g}"] if config.accuracy < 1 else []
        parts += (
            [f"missing_{'_'.join(config.missed)}_{config.miss_rate:g}"] if config.missed else []
        )
        self.name = "_".join([critic.name, *parts])

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """One verdict an exchange, in order."""
        verdicts = self.critic.judge(exchanges)
        return [self._err(x.text, verdict) for x, verdict in zip(exchanges, verdicts, strict=True)]

    def _err(self, text: str, verdict: Verdict) -> Verdict:
        if not verdict.judged:
            return verdict
        rng = self._rng(text)
        wrong, overlooks = (
            rng.random() >= self.config.accuracy,
            rng.random() < self.config.miss_rate,
        )
        if overlooks:
            verdict = _only(verdict, lambda span: span.category not in self.config.missed)
        if not wrong:
            return verdict
        if verdict.spans:
            return _only(verdict, lambda span: False)
        invented = self._invented(text, rng)
        return dataclasses.replace(verdict, spans=() if invented is None else (invented,))

    def _invented(self, text: str, rng: np.random.Generator) -> Span | None:
        words = [match.span() for match in _WORD.finditer(text)]
        if not words or not self.categories:
            return None
        length = min(len(words), int(rng.integers(2, _LONGEST + 1)))
        first = int(rng.integers(len(words) - length + 1))
        category = self.categories[int(rng.integers(len(self.categories)))]
        return Span(words[first][0], words[first + length - 1][1], category)

    def _rng(self, text: str) -> np.random.Generator:
        """A generator of this text and the noise seed."""
        digest = hashlib.blake2b(
            f"{self.config.seed}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8
        )
        return np.random.default_rng(int.from_bytes(digest.digest(), "little"))


def _only(verdict: Verdict, keep) -> Verdict:
    """The verdict with the spans and leaks that `keep` accepts."""
    return dataclasses.replace(
        verdict, spans=tuple(filter(keep, verdict.spans)), leaks=tuple(filter(keep, verdict.leaks))
    )
