"""RLBF on the embedded toy world: REWIND, PPO, from nothing to a table under attack
in a few minutes on two cores.

Paper: arXiv 2602.08377, at toy scale and with our own choices where it is silent.
Command: rlbf run experiments/quickstart.py
"""

from rlbf_jax.data.builders.injection import BsafePlusConfig
from rlbf_jax.directives import Semantics
from rlbf_jax.evaluation.suite import SuiteConfig
from rlbf_jax.methods.attacked_prompts import RolloutMix
from rlbf_jax.methods.rlbf import ReinforcementConfig, RlbfConfig
from rlbf_jax.models.transformer import ModelConfig
from rlbf_jax.objectives.trajectory_reward import RewardConfig
from rlbf_jax.runs.experiment import BaseConfig, Experiment
from rlbf_jax.sampling.request import Knobs
from rlbf_jax.training.optimizer import OptimizerConfig
from rlbf_jax.training.policy import PolicyConfig
from rlbf_jax.training.supervised import SupervisedConfig


def get_config() -> Experiment[RlbfConfig]:
    method = RlbfConfig(
        bsafe_plus=BsafePlusConfig(share_other_pools=0.4, word_cut_share=0.1),
        refusal_sft=SupervisedConfig(
            steps=40, batch_size=16, optimizer=OptimizerConfig(learning_rate=1e-3)
        ),
        sft=SupervisedConfig(
            steps=320, batch_size=24, optimizer=OptimizerConfig(learning_rate=3e-3)
        ),
        reinforcement=ReinforcementConfig(
            steps=60,
            prompts_per_step=12,
            group_size=8,
            updates_per_step=2,
            guidance_batch_size=12,
            temperature=0.8,
            policy=PolicyConfig(algorithm="ppo", sft_weight=5.0),
            reward=RewardConfig(residue_is_unsafe=True, poor=-0.2),
            optimizer=OptimizerConfig(learning_rate=6e-4, schedule="linear", warmup_steps=20),
        ),
        rollouts=RolloutMix(
            none=0.12,
            direct=0.05,
            prefilling=0.2,
            deep_prefilling=0.13,
            middle_filling=0.35,
            benign_prefill=0.06,
            benign_middle=0.12,
            rl_forms=0.8,
        ),
        rollout_tokens=76,
        max_drawn=44,
    )
    return Experiment(
        method,
        semantics=Semantics.REWIND,
        base=toy_base(),
        max_prompt=20,
        evaluation=toy_evaluation(),
    )


def toy_base() -> BaseConfig:
    """The base that the toy experiments of all papers share."""
    return BaseConfig(
        model=ModelConfig(
            num_layers=3, width=96, num_heads=3, num_kv_heads=3, head_dim=32, mlp_width=256
        ),
        pretraining=SupervisedConfig(
            steps=320,
            batch_size=32,
            optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20),
        ),
    )


def toy_evaluation() -> SuiteConfig:
    """The questions that they share."""
    return SuiteConfig(pool="test", n=64, knobs=Knobs(temperature=0.7, max_tokens=76))
