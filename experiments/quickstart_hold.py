"""The quickstart with what still beat it in training: late violations, several in one answer, cut
ones, strange prompts, and prices for what the paper's table does not read.

Paper: arXiv 2602.08377 is quickstart.py's; everything that is changed here is ours, and none of its
weights is tuned beyond a few runs of one seed on the development split (docs/results.md).

- BSAFE+ teaches late directives, several violations, prompts with strange suffixes, and directives
  weigh more; SFT is longer, since X is a number that has to be counted. The control has it too.
- Rollouts start from those contexts as well, each with its benign twin.
- A directive of the wrong category, a false backtrack where there never was a violation, and torn
  text cost something.

Command: rlbf run experiments/quickstart_hold.py
"""

import dataclasses

import quickstart

from rlbf_jax.data.builders.injection import BsafePlusConfig
from rlbf_jax.methods.attacked_prompts import RolloutMix
from rlbf_jax.methods.rlbf import RlbfConfig
from rlbf_jax.objectives.trajectory_reward import RewardConfig
from rlbf_jax.runs.experiment import Experiment

DIRECTIVE_WEIGHT = 6.0


def get_config() -> Experiment[RlbfConfig]:
    config = quickstart.get_config()
    method = config.method
    reinforcement = dataclasses.replace(
        method.reinforcement,
        policy=dataclasses.replace(method.reinforcement.policy, directive_weight=DIRECTIVE_WEIGHT),
        reward=RewardConfig(
            residue_is_unsafe=True,
            poor=-0.2,
            torn_is_failed=True,
            price_wrong_category=0.5,
            price_on_harmless=0.5,
        ),
    )
    return config.replace(
        bsafe_plus=BsafePlusConfig(
            share_other_pools=0.4,
            word_cut_share=0.1,
            share_plain=0.3,
            share_strange=0.2,
            late_share=0.4,
            late_words=12,
            several_share=0.2,
        ),
        sft_examples=8_000,
        sft=dataclasses.replace(method.sft, steps=640, directive_weight=DIRECTIVE_WEIGHT),
        reinforcement=reinforcement,
        rollouts=RolloutMix(
            none=0.06,
            direct=0.03,
            prefilling=0.12,
            deep_prefilling=0.06,
            middle_filling=0.17,
            middle_cut=0.04,
            late_filling=0.17,
            many_violations=0.10,
            benign_prefill=0.04,
            benign_middle=0.06,
            benign_cut=0.07,
            benign_late=0.03,
            benign_many=0.02,
            refusal_prefill=0.02,
            strange_suffix=0.05,
            rl_forms=0.8,
        ),
        rollout_tokens=92,
    )
