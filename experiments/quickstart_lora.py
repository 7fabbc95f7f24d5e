"""RLBF on the embedded toy world with adapters: `base` is trained whole, every later stage trains LoRA alone.

The quickstart with rank 16 in all projections, and the control ids' rows of the embedding. Adapters want larger
learning rates than whole matrices do.
Command: rlbf run experiments/quickstart_lora.py
"""

import dataclasses

import quickstart

from rlbf_jax.methods.config import ExperimentConfig
from rlbf_jax.models.config import LoraConfig


def get_config() -> ExperimentConfig:
    config = quickstart.get_config()
    return dataclasses.replace(config, model=dataclasses.replace(config.model, lora=LoraConfig(rank=16, alpha=32.0)))
