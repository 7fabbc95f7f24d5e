"""RLBF on the embedded toy world with adapters: `base` is trained whole,
every later stage trains LoRA alone.

The quickstart with rank 16 in all projections and the control ids' rows of the embedding, and about
three times its learning rates (one pair of rates was tried, on the development split). Ours: the
paper trains whole models.
Command: rlbf run experiments/quickstart_lora.py
"""

import dataclasses

import quickstart

from rlbf_jax.methods.rlbf import RlbfConfig
from rlbf_jax.models.config import LoraConfig
from rlbf_jax.runs.experiment import Experiment


def get_config() -> Experiment[RlbfConfig]:
    config = quickstart.get_config()

    def faster(stage, rate: float):
        return dataclasses.replace(
            stage, optimizer=dataclasses.replace(stage.optimizer, learning_rate=rate)
        )

    return config.replace(
        model=dataclasses.replace(config.base.model, lora=LoraConfig(rank=16, alpha=32.0)),
        sft=faster(config.method.sft, 1e-2),
        reinforcement=faster(config.method.reinforcement, 2e-3),
    )
