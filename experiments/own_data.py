"""RLBF on your own prompts and responses.

Command: rlbf run experiments/own_data.py --data.path FILE.csv
"""

from rlbf_jax.attacks.decoding import DecodingGrid
from rlbf_jax.critics.rewards import RewardConfig
from rlbf_jax.data.bsafe_plus import BsafePlusConfig
from rlbf_jax.directives import Semantics
from rlbf_jax.evaluation.suite import SuiteConfig
from rlbf_jax.methods.config import DataConfig, ExperimentConfig
from rlbf_jax.models.transformer import ModelConfig
from rlbf_jax.sampling.request import Knobs
from rlbf_jax.training.optimizer import OptimizerConfig
from rlbf_jax.training.policy import PolicyConfig
from rlbf_jax.training.reinforcement import ReinforcementConfig
from rlbf_jax.training.supervised import SupervisedConfig


def get_config() -> ExperimentConfig:
    return ExperimentConfig(
        semantics=Semantics.REWIND,
        data=DataConfig(
            path="prompts.csv",
            max_prompt_words=18,
            max_response_words=50,
            vocab_size=2000,
            pretraining_examples=12_000,
            sft_examples=3_000,
            refusal_examples=200,
            row_length=160,
            bsafe_plus=BsafePlusConfig(max_tokens=160),
        ),
        model=ModelConfig(num_layers=3, width=128, num_heads=4, num_kv_heads=4, head_dim=32, mlp_width=320),
        pretraining=SupervisedConfig(
            steps=150, batch_size=24, optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20, weight_decay=0.1)
        ),
        sft=SupervisedConfig(steps=240, batch_size=16, optimizer=OptimizerConfig(learning_rate=1e-3)),
        reinforcement=ReinforcementConfig(
            steps=40,
            prompts_per_step=8,
            # Hotter, a base this weak is seldom coherent, and taking back would seldom pay.
            temperature=0.7,
            group_size=8,
            updates_per_step=2,
            guidance_batch_size=8,
            policy=PolicyConfig(algorithm="ppo", sft_weight=2.0),
            reward=RewardConfig(residue_is_unsafe=True),
            optimizer=OptimizerConfig(learning_rate=4e-4, schedule="linear", warmup_steps=4),
        ),
        sampling_batch=64,
        rollout_tokens=104,
        max_prompt=64,
        evaluation=SuiteConfig(
            benchmark="own_data",
            pool="test",
            n=48,
            knobs=Knobs(temperature=0.7, max_tokens=104),
            decoding=DecodingGrid(samples=1),
            n_decoding=16,
        ),
        baselines=False,
    )
