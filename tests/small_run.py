"""The smallest finished run with a policy of every kind: what `test_docs.py` shows its pages on.

The sizes are those of the experiment in docs/api.md, so that both compile once.
"""

from __future__ import annotations

from experiments.smoke import get_config as smoke
from rlbf_jax.evaluation.suite import SuiteConfig
from rlbf_jax.methods.rlbf import ReinforcementConfig, RlbfConfig
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.runs.experiment import DataConfig, Experiment
from rlbf_jax.sampling.request import Knobs
from rlbf_jax.training.supervised import SupervisedConfig

MODEL = ModelConfig(num_layers=1, width=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=64)
FEW = SupervisedConfig(steps=4, batch_size=4)
DATA = DataConfig(vocab_size=900, pretraining_examples=400)


def get_config() -> Experiment[RlbfConfig]:
    # Evaluations have the room of rollouts, hence their compiled sampler.
    suite = SuiteConfig(
        attacks=("none", "direct"), n=2, knobs=Knobs(temperature=0.7, max_tokens=88)
    )
    little = ReinforcementConfig(
        steps=1, prompts_per_step=2, group_size=2, updates_per_step=1, guidance_batch_size=2
    )
    return smoke().replace(
        data=DATA,
        model=MODEL,
        pretraining=FEW,
        sft=FEW,
        sft_examples=60,
        reinforcement=little,
        baselines=False,
        evaluation=suite,
        sampling_batch=4,
        perplexity_examples=4,
    )
