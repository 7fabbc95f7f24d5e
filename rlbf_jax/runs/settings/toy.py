"""The embedded toy world as a setting of runs."""

from __future__ import annotations

from rlbf_jax.critics.judges.grammar_judge import GrammarJudge
from rlbf_jax.critics.judges.grammar_seams import GrammarSeams
from rlbf_jax.critics.toy_lexicon import toy_critic
from rlbf_jax.data.worlds.toy_world import ToyWorld
from rlbf_jax.runs.setting import Setting

TOY = Setting(
    world=lambda data, seed: ToyWorld(data.world),
    critic=lambda run: toy_critic(run.world),
    judge=lambda run, examples: GrammarJudge(run.world),
    seams=lambda run: GrammarSeams(),
    check=lambda run, max_prompt: None,
)
"""Topics, forms and judge of `data.worlds.toy_world`; the critic has a table of its own."""
