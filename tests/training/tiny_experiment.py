"""The smoke run, smaller still and with checkpoints often: what `test_resume.py` kills and
restarts."""

import dataclasses

from experiments.smoke import get_config as smoke
from rlbf_jax.methods.rlbf import RlbfConfig
from rlbf_jax.runs.experiment import Experiment


def get_config() -> Experiment[RlbfConfig]:
    config = smoke()
    method = config.method
    supervised = dataclasses.replace(method.sft, steps=7, batch_size=2, checkpoint_every=2)
    return config.replace(
        model=dataclasses.replace(config.base.model, num_layers=1),
        pretraining=supervised,
        sft=supervised,
        reinforcement=dataclasses.replace(
            method.reinforcement, steps=5, updates_per_step=1, checkpoint_every=2
        ),
        evaluation=dataclasses.replace(
            config.evaluation, n=2, attacks=("direct", "middle_filling")
        ),
        perplexity_examples=4,
        baselines=False,
    )
