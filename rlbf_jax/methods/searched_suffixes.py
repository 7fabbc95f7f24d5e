"""Suffixes that a short search finds to provoke directives in the model that reinforcement starts
from: a context of rollouts, `RolloutMix.searched_share` of the strange ones.

Ours. What a search finds is stranger to a policy than pieces drawn at random, and it is what an
attacker who wants good text erased would send.
"""

from __future__ import annotations

import dataclasses

import jax

from rlbf_jax.attacks.base import AttackConfig, Scene, Victim
from rlbf_jax.attacks.search.gcg import GcgConfig
from rlbf_jax.attacks.search.optimized import OptimizedConfig, attack_model
from rlbf_jax.directives import Semantics
from rlbf_jax.ranges import check_at_least
from rlbf_jax.runs.files import read_json
from rlbf_jax.runs.run import BASE, TOKENIZER, Run
from rlbf_jax.runs.stage import Stage
from rlbf_jax.sampling.request import Knobs
from rlbf_jax.sampling.sampler import SamplerConfig

NAME = "suffixes"
FILE = "found.json"


@dataclasses.dataclass(frozen=True)
class SuffixSearchConfig:
    """How long suffixes are searched for, and how many. Ours."""

    count: int = 16
    """Suffixes, each for a prompt of the `train` pool."""
    steps: int = 20
    """Of GCG."""
    width: int = 32
    """Candidates a step; also the ids of most negative gradient that a place may take."""
    ids: int = 12
    """About so many ids a suffix has."""

    def __post_init__(self):
        check_at_least(self, 1, "count", "steps", "width", "ids")


@dataclasses.dataclass(frozen=True)
class SuffixStage:
    """Everything that the search depends on beside the model."""

    search: SuffixSearchConfig
    start: str
    """The stage that is searched on."""
    answer_ids: int
    """Most ids of the answers that are to be taken back."""
    max_prompt: int
    sampling_batch: int
    rule: str
    semantics: Semantics


def suffix_stage(settings: SuffixStage) -> Stage:
    """The stage `suffixes`."""
    after = (TOKENIZER, BASE, settings.start)
    return Stage(NAME, search_suffixes, settings, after, files=(FILE,))


def search_suffixes(run: Run, config: SuffixStage) -> None:
    """Writes the suffixes, as text that follows a prompt, to the stage's folder."""
    search, mesh = config.search, run.mesh if run.mesh.size > 1 else None
    policy = run.policy(config.start, config.rule, config.semantics)
    shapes = SamplerConfig(
        config.semantics,
        config.sampling_batch,
        min_context=config.max_prompt,
        min_room=config.answer_ids,
    )
    sampler, key = policy.sampler(shapes, run.mesh), jax.random.key(run.seed)
    victim = Victim(
        run.model,
        policy.params,
        lambda requests: sampler(policy.params, requests, key),
        mesh,
        rule=policy.rule,
    )
    where = AttackConfig("train", "sft", Knobs(max_tokens=config.answer_ids))
    scene = Scene(run.world, run.tokenizer, run.rng(NAME), where, victim)
    gcg = GcgConfig(
        init=" x" * search.ids, steps=search.steps, search_width=search.width, topk=search.width
    )
    made = attack_model("trigger", scene, search.count, OptimizedConfig(gcg))
    texts = [each.found.text[len(each.found.goal.prompt) :] for each in made]
    run.write_json(f"stages/{NAME}/{FILE}", {NAME: texts})


def suffixes_of(run: Run) -> tuple[str, ...]:
    """What the stage has found; nothing before it has run, or where there is none."""
    return tuple(read_json(run.folder / "stages" / NAME / FILE).get(NAME, ()))
