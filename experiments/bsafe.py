"""BSAFE on the embedded toy world: flag the violation, repeat it, give its replacement.

Paper: arXiv 2503.08919, at toy scale: KEEP, as published. The vocabulary has BSAFE's own control
ids, so its base is trained here; injected violations and questions are the quickstart's.
Command: rlbf run experiments/bsafe.py
"""

import quickstart

from rlbf_jax.data.builders.injection import BsafePlusConfig
from rlbf_jax.directives import Semantics
from rlbf_jax.methods.bsafe import BsafeConfig
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.training.optimizer import OptimizerConfig
from rlbf_jax.training.supervised import SupervisedConfig


def get_config() -> Experiment[BsafeConfig]:
    method = BsafeConfig(
        injection=BsafePlusConfig(share_other_pools=0.4, word_cut_share=0.1),
        bsafe_sft=SupervisedConfig(
            steps=320, batch_size=24, optimizer=OptimizerConfig(learning_rate=3e-3)
        ),
    )
    return Experiment(
        method,
        semantics=Semantics.KEEP,
        base=quickstart.toy_base(),
        max_prompt=20,
        evaluation=quickstart.toy_evaluation(),
    )
