"""GCG (Zou et al., arXiv 2307.15043): a suffix of the prompt that makes a model give a wished-for
answer.

1. `GcgConfig`: nanoGCG's defaults; the variants of other implementations are options.
2. `Goal` (`suffix.py`): a prompt and the answer ids wished for.
3. `gcg`: goals -> `Found` suffixes, resumable; the loop is `suffix_search.py`.

Adaptive GCG is an option of the goal and the configuration:
`Goal.control` says where the beginning of a directive counts, `control_weight` how much
(above 0 the attack keeps the defense quiet, below 0 it sets it off).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal

from jax.sharding import Mesh

from rlbf_jax.attacks.search.gcg_candidates import Positions
from rlbf_jax.attacks.search.gcg_search import Search
from rlbf_jax.attacks.search.gcg_step import Objective
from rlbf_jax.attacks.search.suffix import Found, Goal, SuffixConfig
from rlbf_jax.attacks.search.suffix_search import search_suffixes
from rlbf_jax.directives import EditRule
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.ranges import check_at_least
from rlbf_jax.tokenizers import Tokenizer

__all__ = ["Found", "GcgConfig", "Goal", "gcg"]


@dataclasses.dataclass(frozen=True)
class GcgConfig(SuffixConfig):
    """nanoGCG's defaults, but that the filter reads the whole conversation."""

    steps: int = 250
    search_width: int = 512
    """Candidates a step."""
    topk: int = 256
    """Ids of most negative gradient that a position may take."""
    n_replace: int = 1
    """Positions in which a candidate differs from the current suffix."""
    positions: Positions = "uniform"
    buffer_size: int = 0
    anneal: bool = False
    """Simulated annealing, as llm-attacks has it; not with a buffer."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "steps", "search_width", "topk", "n_replace")
        check_at_least(self, 0, "buffer_size")
        if self.anneal and self.buffer_size:
            raise ValueError(
                f"anneal is set and buffer_size is {self.buffer_size}, expected one of the two"
            )


def gcg(
    model: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    goals: Sequence[Goal],
    config: GcgConfig = GcgConfig(),
    *,
    mesh: Mesh | None = None,
    file: pathlib.Path | None = None,
    save_every: int = 25,
    rule: EditRule | None = None,
) -> list[Found]:
    """Searches a suffix for every goal.

    Args:
      params: of `model`, on the mesh where there is one.
      mesh: its row axes take different goals; of fewer goals than devices,
        several devices divide the candidates.
      file: where the state is kept every `save_every` steps (.npz). A search that finds its own
        goes on from it, bit for bit; one that finds another's raises InputError.
      rule: whose directives `control_weight` suppresses or provokes; None: the first that the
        tokenizer has ids of.

    Raises:
      InputError: the initial suffix does not survive as text, no id is allowed,
        or a loss is not a number.
    """
    accept: Literal["always", "anneal"] = "anneal" if config.anneal else "always"
    search = Search(
        model=model,
        objective=Objective(rule=rule),
        steps=config.steps,
        width=config.search_width,
        topk=config.topk,
        n_replace=config.n_replace,
        positions=config.positions,
        accept=accept,
        buffer_size=config.buffer_size,
    )
    return search_suffixes(search, params, tokenizer, goals, config, mesh, file, save_every)
