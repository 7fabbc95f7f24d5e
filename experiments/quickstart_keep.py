"""The quickstart as the paper does it: KEEP (erased words stay in the context) and GRPO.

Paper: arXiv 2602.08377, sections 3 and 4, at toy scale. Everything else is as in quickstart.py: the
paper's reward table with our two additions there (a begun violation left in the text is unsafe,
poor clean text has its own value).
Command: rlbf run experiments/quickstart_keep.py
"""

import dataclasses

import quickstart

from rlbf_jax.directives import Semantics
from rlbf_jax.methods.rlbf import RlbfConfig
from rlbf_jax.runs.experiment import Experiment


def get_config() -> Experiment[RlbfConfig]:
    config = quickstart.get_config()
    reinforcement = config.method.reinforcement
    policy = dataclasses.replace(reinforcement.policy, algorithm="grpo")
    return config.replace(
        semantics=Semantics.KEEP,
        reinforcement=dataclasses.replace(reinforcement, policy=policy),
    )
