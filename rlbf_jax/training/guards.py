"""Guards of online training: what must not happen and would not be seen in the numbers.

Each looks at arrays that a step has on the host anyway, changes none, and says at most one line.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import numpy as np

from rlbf_jax.parallel import hosts
from rlbf_jax.progress import say
from rlbf_jax.ranges import check_at_least, check_between, check_positive
from rlbf_jax.sampling.request import Generation
from rlbf_jax.training.rollouts import group_spreads, is_flat


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Bounds of the guards; every number is ours. A guard stops nothing, it warns once a run."""

    DECIDE_NOTHING: ClassVar[frozenset[str]] = frozenset(
        {"most_gap", "most_gap_bfloat16", "least_chance", "flat_steps"}
    )

    most_gap: float = 0.1
    """Nats by which sampler and scorer may differ about a drawn id, in float32. The law of the
    sampler says 1e-4 at the highest matmul precision; TF32 and the like are worse; scores under the
    wrong semantics, rule or knobs miss by more than 1."""
    most_gap_bfloat16: float = 1.0
    """The same for models that compute in bfloat16."""
    least_chance: float = 1e-9
    """Rows of a group that all drew the same ids are reported where independent draws would come
    out so with less than this chance, by the sampler's own log-probabilities; a model that is sure
    of what it says draws alike with a better one."""
    flat_steps: int = 10
    """Steps in a row in which no group of rollouts got two different rewards."""

    def __post_init__(self):
        check_positive(self, "most_gap", "most_gap_bfloat16")
        check_between(self, 0, 1, "least_chance")
        check_at_least(self, 1, "flat_steps")


@dataclasses.dataclass(frozen=True)
class Look:
    """What the guards see of a step."""

    step: int
    generations: Sequence[Generation]
    """B of them, in rows."""
    group: np.ndarray
    """[B] int32: rows of a group share prompt, forced ids and knobs."""
    reward: np.ndarray
    """[B] float32, NaN where the critic could not judge."""
    recorded: np.ndarray
    """[B, T] float32 log-probabilities of the sampler."""
    scored: jax.Array
    """[B, T] float32, the scorer's; only the shards of this process are read."""
    bfloat16: bool = False
    """Whether the model computes in bfloat16."""


class Guards:
    """Looks at every step, and warns once of each thing, on stderr.

    What it remembers (what was said, flat steps in a row) decides nothing and is not checkpointed:
    a run that goes on after a kill may warn again.
    """

    def __init__(self, config: GuardConfig = GuardConfig()):
        self.config = config
        self._said: set[str] = set()
        self._flat = 0

    def look(self, seen: Look) -> None:
        """Checks one step; see `GuardConfig`."""
        config = self.config
        if chance := [c for c in repeated_groups(seen) if c < config.least_chance]:
            self._warn(
                "repeated",
                f"step {seen.step}: all rollouts of {len(chance)} groups drew the same ids, which "
                f"independent draws do with chance {min(chance):.1g}: rows of a group must have "
                "random keys of their own; give every request an id of its own (Request.id), as "
                "rollouts.in_groups does",
            )
        gap = float(np.max(hosts.gather(largest_gap(seen))))  # keeps a NaN, unlike max
        bound = config.most_gap_bfloat16 if seen.bfloat16 else config.most_gap
        if not gap <= bound:
            self._warn(
                "gap",
                f"step {seen.step}: sampler and scorer differ by {gap:.3g} nats about an id that "
                f"was drawn, expected at most {bound:g}: the update's gradient is not of what was "
                "sampled. Check that both have the same parameters, edit rule, semantics and "
                "knobs; if only the arithmetic is coarse, raise "
                f"--reinforcement.guards.most_gap{'_bfloat16' * seen.bfloat16}",
            )
        flat = all_flat(seen.reward, seen.group)
        if flat is not None:
            self._flat = self._flat + 1 if flat else 0
        if self._flat >= config.flat_steps:
            self._warn(
                "flat",
                f"step {seen.step}: for {self._flat} steps no group of rollouts got two different "
                "rewards, so there is nothing to tell good from bad by. Raise "
                "--reinforcement.temperature or --reinforcement.group_size, give harder prompts a "
                "larger share (--rollouts), or stop here: the critic may be satisfied, or blind",
            )

    def _warn(self, about: str, message: str) -> None:
        if about not in self._said:
            self._said.add(about)
            say(f"warning: {message}")


def repeated_groups(seen: Look) -> list[float]:
    """Of each group of two rows or more that all drew the same ids: the chance, at most 1, that
    independent draws come out so, given the first row's.

    Rows that drew nothing, and groups of another make (other limits in a row), do not count.
    """
    found = []
    for number in np.unique(seen.group):
        rows = [seen.generations[row] for row in np.flatnonzero(seen.group == number).tolist()]
        first = rows[0]
        drawn = first.trace[first.num_forced :]
        if len(rows) < 2 or not len(drawn):
            continue
        if all(np.array_equal(first.trace, row.trace) for row in rows[1:]):
            logprob = float(np.sum(first.logprobs[first.num_forced :], dtype=np.float64))
            found.append(math.exp(min(0.0, logprob) * (len(rows) - 1)))
    return found


def largest_gap(seen: Look) -> float:
    """Largest |sampler - scorer| over ids that the model drew, nats; NaN if a difference is.
    0 where this process has no row."""
    time = np.arange(seen.recorded.shape[1])
    start = [len(g.prompt_ids) + g.num_forced for g in seen.generations]
    stop = [len(g.prompt_ids) + len(g.trace) for g in seen.generations]
    drawn = (time >= np.asarray(start)[:, None]) & (time < np.asarray(stop)[:, None])
    largest = 0.0
    for shard in seen.scored.addressable_shards:
        gap = np.abs(np.asarray(shard.data) - seen.recorded[shard.index])[drawn[shard.index]]
        if gap.size:
            # np.max, unlike max, keeps a NaN.
            largest = float(np.max([largest, gap.max()]))
    return largest


def all_flat(reward: np.ndarray, group: np.ndarray) -> bool | None:
    """Whether in no group two judged members got different rewards; None: no group has two."""
    spread = [s for s in group_spreads(reward, group) if s is not None]
    return None if not spread else is_flat(max(spread))
