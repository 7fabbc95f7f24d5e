"""The smoke run, smaller still and with checkpoints often: what `test_resume.py` kills and
restarts."""

import dataclasses

from experiments.smoke import get_config as smoke
from rlbf_jax.runs.experiment import ExperimentConfig


def get_config() -> ExperimentConfig:
    config = smoke()
    supervised = dataclasses.replace(config.sft, steps=7, batch_size=2, checkpoint_every=2)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=1),
        pretraining=supervised,
        sft=supervised,
        reinforcement=dataclasses.replace(
            config.reinforcement, steps=5, updates_per_step=1, checkpoint_every=2
        ),
        evaluation=dataclasses.replace(
            config.evaluation, n=2, attacks=("direct", "middle_filling")
        ),
        perplexity_examples=4,
        baselines=False,
    )
