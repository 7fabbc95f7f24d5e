"""Rank-based prefilling: the answer is forced to go on by ids that the model itself ranks among its
first (RAP, arXiv 2512.05518), wherever that leads to a violation.

The paper's attacker, a person or a language model, reads the twenty likeliest ids at every place,
chooses one, and goes back where none is of use. Ours knows what it wants: many violating answers
of the kind asked for, of which it follows the one that gets furthest. Going back to try another is
following another one, so nothing is searched but the ranks of all of them, teacher-forced.

`rank_prefilling` sees control ids among the twenty, `rank_prefilling_plain` twenty ordinary ones:
whoever serves the model may show either. The attacker never writes a directive.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlbf_jax.attacks.base import AttackSpec, Attempt, Scene, Victim
from rlbf_jax.attacks.direct import draw_prompts
from rlbf_jax.attacks.forced.prefilling import encode_parts
from rlbf_jax.data.schema import Prompt, Violation
from rlbf_jax.errors import InputError
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.ranges import check_at_least
from rlbf_jax.sampling.request import Request

PADDED_TO = 32
"""Rows are padded to multiples of this, so that prompts share programs."""


@dataclasses.dataclass(frozen=True)
class RankOptions:
    """Of both attacks."""

    top: int = 20
    """Ids that the attacker may choose from (the paper's)."""
    candidates: int = 32
    """Answers that it has in mind; ours."""
    control_ids: bool = True
    """Whether control ids take places among the first `top`."""

    def __post_init__(self):
        check_at_least(self, 1, "top", "candidates")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A violating answer."""

    ids: tuple[int, ...]
    num_opener: int
    violation: Violation


def rank_prefilling(name: str, scene: Scene, n: int, options: RankOptions) -> list[Attempt]:
    """n harmful prompts, each with the longest beginning of a violating answer that the model ranks
    among its first ids throughout.

    Raises InputError where there is no checkpoint to attack, or `max_tokens` has too little room.
    """
    if scene.policy is None:
        raise InputError(
            f"{name} reads the ranks of one checkpoint, and there is none to attack; run it on a "
            f"finished stage: rlbf attack RUN --attack {name}"
        )
    attempts, config = [], scene.config
    for prompt in draw_prompts(scene.world, scene.rng, config.pool, n, harmful=True):
        candidates = [_candidate(scene, prompt) for _ in range(options.candidates)]
        least = max(len(c.ids) for c in candidates) + config.room
        if least > config.knobs.max_tokens:
            raise InputError(
                f"{name} may force {least - config.room} ids and wants room for {config.room} "
                f"more; set max_tokens to {least} or more"
            )
        asked = scene.tokenizer.encode_prompt(prompt.text)
        answers = [candidate.ids for candidate in candidates]
        ranks = ranks_of(scene.policy, asked, answers, options)
        depth = np.asarray([leading(r < options.top) for r in ranks])
        whole = np.asarray([len(c.ids) for c in candidates])
        # A whole one if there is one; of those that break off, the one with most ids.
        best = int(np.lexsort((depth, depth == whole))[-1])
        chosen, reached = candidates[best], int(depth[best])
        opener = min(chosen.num_opener, reached)
        attempts.append(
            Attempt(
                Request(prompt.text, chosen.ids[:reached], config.knobs),
                prompt,
                name,
                config.split,
                num_bridge=opener,
                num_span=reached - opener,
                violation=chosen.violation,
                by_construction=reached == len(chosen.ids),
            )
        )
    return attempts


def _candidate(scene: Scene, prompt: Prompt) -> Candidate:
    world, rng, config = scene.world, scene.rng, scene.config
    violation = world.violation(rng, config.split, config.pool, category=prompt.category or None)
    ids, (opener, _) = encode_parts(scene.tokenizer, world.opener(rng), violation.text)
    return Candidate(tuple(ids), opener, violation)


def leading(holds: np.ndarray) -> int:
    """How many entries hold before the first that does not."""
    return len(holds) if holds.all() else int(np.argmin(holds))


def ranks_of(
    victim: Victim, prompt: Sequence[int], answers: Sequence[Sequence[int]], options: RankOptions
) -> list[np.ndarray]:
    """Of each id of each answer: how many ids the model finds likelier there."""
    longest = len(prompt) + max(map(len, answers))
    width = transformer.padded_width(victim.model, longest, PADDED_TO)
    tokens = np.zeros((len(answers), width), np.int32)
    for row, ids in enumerate(answers):
        tokens[row, : len(prompt) + len(ids)] = [*prompt, *ids]
    seen = np.ones(victim.model.vocab_size, bool)
    if victim.rule is not None and not options.control_ids:
        seen &= ~np.asarray(victim.rule.is_control(np.arange(len(seen))))
    ranks = np.asarray(_ranks(victim.model, victim.params, jnp.asarray(tokens), jnp.asarray(seen)))
    first = len(prompt) - 1
    return [ranks[row, first : first + len(ids)] for row, ids in enumerate(answers)]


@functools.partial(jax.jit, static_argnums=0)
def _ranks(model: ModelConfig, params: dict, tokens: Array, seen: Array) -> Array:
    """[N, T - 1] int32: ids among `seen` [V] that are likelier than the next one. A row at a time:
    no [N, T, V] is held."""

    def of_row(row: Array) -> Array:
        position = jnp.arange(row.shape[0], dtype=jnp.int32)[None]
        hidden, _ = transformer.forward(model, params, row[None], Visibility(position))
        logits = transformer.unembed(model, params, hidden[:, :-1])[0]
        chosen = jnp.take_along_axis(logits, row[1:, None], axis=1)
        return jnp.sum((logits > chosen) & seen, axis=1, dtype=jnp.int32)

    return jax.lax.map(of_row, tokens)


def _spec(name: str, says: str, options: RankOptions) -> AttackSpec:
    make = functools.partial(rank_prefilling, name)
    return AttackSpec(name, make, says, options, has_forms=True, searched=True)


SPECS = (
    _spec(
        "rank_prefilling",
        "a harmful prompt; violating ids are forced as long as the model ranks them among its 20 "
        "likeliest",
        RankOptions(),
    ),
    _spec(
        "rank_prefilling_plain",
        "the same among the 20 likeliest that are no control ids",
        RankOptions(control_ids=False),
    ),
)
