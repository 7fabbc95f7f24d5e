"""RESET on the embedded toy world: one token takes the whole answer back, for a fresh start.

Paper: arXiv 2409.14586, its supervised stage, at toy scale: KEEP and one reset a response, as
published. Base, injected violations and questions are the quickstart's.
Command: rlbf run experiments/reset.py
"""

import dataclasses

import quickstart

from rlbf_jax.data.builders.injection import BsafePlusConfig
from rlbf_jax.directives import Semantics
from rlbf_jax.methods.reset import ResetConfig
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.training.optimizer import OptimizerConfig
from rlbf_jax.training.supervised import SupervisedConfig


def get_config() -> Experiment[ResetConfig]:
    method = ResetConfig(
        injection=BsafePlusConfig(share_other_pools=0.4, word_cut_share=0.1),
        reset_sft=SupervisedConfig(
            steps=320, batch_size=24, optimizer=OptimizerConfig(learning_rate=3e-3)
        ),
    )
    suite = quickstart.toy_evaluation()
    return Experiment(
        method,
        semantics=Semantics.KEEP,
        base=quickstart.toy_base(),
        max_prompt=20,
        evaluation=dataclasses.replace(suite, knobs=dataclasses.replace(suite.knobs, budget=1)),
    )
