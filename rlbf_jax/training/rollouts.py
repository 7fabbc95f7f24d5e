"""Rollouts of a reinforcement step: prompts in groups, sampled arrays, rewards, records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from rlbf_jax.critics.judging import Judged
from rlbf_jax.data.schema import Prompt
from rlbf_jax.errors import UserError
from rlbf_jax.sampling.request import Generation, Request


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One prompt of a step, before it is copied into a group."""

    request: Request
    prompt: Prompt
    origin: tuple[int, int] = (0, 0)
    """Step and place in the prompt source, where somebody will ask for it again."""


PromptSource = Callable[[int], Sequence[Rollout]]
"""step -> the step's rollouts, a pure function of the step."""


def in_groups(prompts: Sequence[Rollout], size: int) -> tuple[list[Rollout], np.ndarray]:
    """(rollouts, group of each [B] int32): every prompt `size` times, with request ids 0, 1, ..."""
    rollouts: list[Rollout] = []
    group: list[int] = []
    for number, rollout in enumerate(prompts):
        for _ in range(size):
            request = dataclasses.replace(rollout.request, id=len(rollouts))
            rollouts.append(dataclasses.replace(rollout, request=request))
            group.append(number)
    return rollouts, np.asarray(group, np.int32)


def check_rollouts(prompts: Sequence[Rollout], count: int, most_drawn: int | None) -> None:
    """Raises UserError for knobs that a policy gradient cannot use.

    Raises ValueError for another number of prompts than `count`, and for a prompt that may draw
    more than `most_drawn` ids.
    """
    if len(prompts) != count:
        raise ValueError(f"the prompt source gave {len(prompts)} prompts, not {count}")
    for rollout in prompts:
        knobs = rollout.request.knobs
        if knobs.top_k or knobs.top_p < 1 or knobs.min_p > 0 or knobs.temperature <= 0:
            raise UserError(
                "reinforcement samples with temperature and control bias only; top_k, top_p, min_p "
                "and greedy decoding draw from another distribution than the one that is trained"
            )
        free = knobs.max_tokens - len(rollout.request.forced)
        if most_drawn is not None and free > most_drawn:
            raise ValueError(
                f"a prompt may draw {free} ids, policy.max_drawn is {most_drawn}: "
                "the rest would go unscored"
            )


def bounded(request: Request, drawn: int) -> Request:
    """The request with room for at most `drawn` free ids."""
    room = min(request.knobs.max_tokens, len(request.forced) + drawn)
    knobs = dataclasses.replace(request.knobs, max_tokens=room)
    return dataclasses.replace(request, knobs=knobs)


def recorded_logprobs(generations: Sequence[Generation], length: int) -> np.ndarray:
    """[B, T] float32 log-probabilities as the sampler recorded them, 0 elsewhere."""
    recorded = np.zeros((len(generations), length), np.float32)
    for row, g in enumerate(generations):
        start = len(g.prompt_ids)
        recorded[row, start : start + len(g.trace)] = np.nan_to_num(g.logprobs)
    return recorded


# Judged rollouts ----------------------------------------------------------------------------------


def rewards_of(judged: Sequence[Judged], step: int) -> np.ndarray:
    """[B] float32, NaN where the critic could not judge.
    Raises UserError if a judged response has no finite reward."""
    with np.errstate(over="ignore"):  # what does not fit into float32 is told below
        reward = np.asarray([j.reward for j in judged], np.float32)
    bad = [
        row
        for row, j in enumerate(judged)
        if j.outcome is not None and not np.isfinite(reward[row])
    ]
    if bad:
        raise UserError(
            f"step {step}: rollouts {bad[:5]} have rewards that are not finite; check the values "
            "in "
            "reinforcement.reward. The last good state is the newest checkpoint"
        )
    return reward


def group_spreads(reward: np.ndarray, group: np.ndarray) -> list[float | None]:
    """Largest less smallest judged reward [B] (NaN: not judged) of each group [B], in their order;
    None of a group with fewer than two."""
    found: list[float | None] = []
    for number in np.unique(group):
        judged = reward[(group == number) & np.isfinite(reward)]
        found.append(float(judged.max() - judged.min()) if len(judged) > 1 else None)
    return found


def is_flat(spread: float | None) -> bool:
    """Whether a group of this spread teaches nothing."""
    return spread is None or spread < 1e-6


def reward_metrics(judged: Sequence[Judged], generations: Sequence[Generation]) -> dict[str, float]:
    """Means over a step's rollouts; NaN-free, unjudged ones counted apart."""
    outcomes = [j.outcome for j in judged if j.outcome is not None]
    if not outcomes:
        raise UserError(
            "the critic could not judge a single rollout of this step; see its reasons in "
            "rollouts.jsonl"
        )

    def share(values) -> float:
        return float(np.mean([float(v) for v in values]))

    # Where the reward reads whether texts are torn.
    torn = [o.torn for o in outcomes if o.torn is not None]
    return {
        "reward": share(j.reward for j in judged if j.outcome is not None),
        "safe": share(o.final_safe for o in outcomes),
        "backtrack_rate": share(o.has_directive for o in outcomes),
        "needed": share(o.retracted_bad for o in outcomes if o.has_directive) if any(
            o.has_directive for o in outcomes
        ) else 0.0,
        "coherent": share(o.coherent for o in outcomes),
        "useful": share(o.useful for o in outcomes),
        "extra": share(o.extra for o in outcomes),
        "emitted": share(len(g.trace) - g.num_forced for g in generations),
        "unjudged": share(j.outcome is None for j in judged),
        **({"torn": share(torn)} if torn else {}),
    }  # fmt: skip


def rollout_rows(
    number: int,
    rollouts: Sequence[Rollout],
    generations: Sequence[Generation],
    judged: Sequence[Judged],
) -> list[dict]:
    """What is written down of every rollout."""
    rows = []
    for rollout, g, j in zip(rollouts, generations, judged, strict=True):
        rows.append(
            {
                "step": number,
                "prompt_id": rollout.prompt.id,
                "prompt": rollout.request.prompt,
                "forced": g.num_forced,
                "trace": g.trace.tolist(),
                "visible": g.text,
                "reward": None if np.isnan(j.reward) else j.reward,
                "judged": j.outcome is not None,
                "reason": next(
                    (v.reason for v in (j.final, *j.at_directives) if not v.judged), j.final.reason
                ),
                "spans": [[s.start, s.end, s.category, s.complete] for s in j.final.spans],
                "directives": [
                    {
                        "index": e.index,
                        "category": e.category,
                        "x": e.requested,
                        "removed": len(e.removed),
                        "spans": [[s.start, s.end, s.category, s.complete] for s in verdict.spans],
                    }
                    for e, verdict in zip(g.edits, j.at_directives, strict=True)
                ],
            }
        )
    return rows
