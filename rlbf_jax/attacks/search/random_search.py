"""Random search for a suffix: the control that GCG has to beat with as many forward
passes (AdversariaLLM's).

A generation makes a few neighbors of the current suffix, each with `radius` ids replaced by random
allowed ones, and moves to the best of them if it is better. No gradient is used.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from jax.sharding import Mesh

from rlbf_jax.attacks.search.gcg import GcgConfig
from rlbf_jax.attacks.search.gcg_search import Search
from rlbf_jax.attacks.search.gcg_step import Objective
from rlbf_jax.attacks.search.suffix import Found, Goal, SuffixConfig
from rlbf_jax.attacks.search.suffix_search import search_suffixes
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.ranges import check_at_least
from rlbf_jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class RandomSearchConfig(SuffixConfig):
    """AdversariaLLM's defaults."""

    generations: int = 100
    neighbors: int = 8
    radius: int = 1
    """Positions in which a neighbor differs."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "generations", "neighbors", "radius")

    @classmethod
    def of_equal_budget(cls, config: GcgConfig, neighbors: int = 8) -> RandomSearchConfig:
        """As many candidates as GCG evaluates (its gradients not counted), on the same terms."""
        shared = {
            field.name: getattr(config, field.name) for field in dataclasses.fields(SuffixConfig)
        }
        return cls(
            **shared,
            generations=-(-config.steps * config.search_width // neighbors),
            neighbors=neighbors,
        )


def random_search(
    model: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    goals: Sequence[Goal],
    config: RandomSearchConfig = RandomSearchConfig(),
    *,
    mesh: Mesh | None = None,
    file: pathlib.Path | None = None,
    save_every: int = 1000,
) -> list[Found]:
    """A suffix for every goal. Arguments, result and errors are those of `gcg`."""
    search = Search(
        model=model,
        objective=Objective(),
        steps=config.generations,
        width=config.neighbors,
        topk=1,
        n_replace=config.radius,
        proposal="random",
        accept="improve",
    )
    return search_suffixes(search, params, tokenizer, goals, config, mesh, file, save_every)
