"""The embedded toy world as a setting of runs."""

from __future__ import annotations

from rlbf_jax.critics.judges.grammar_judge import GrammarJudge
from rlbf_jax.critics.toy_lexicon import toy_critic
from rlbf_jax.data.worlds.toy_world import ToyWorld
from rlbf_jax.runs.workspace import Setting

TOY = Setting(
    world=lambda config: ToyWorld(config.data.world),
    critic=lambda work: toy_critic(work.world),
    judge=lambda work: GrammarJudge(work.world),
    check=lambda work: None,
)
"""Topics, forms and judge of `data.toy_world`; the critic has a table of its own."""
