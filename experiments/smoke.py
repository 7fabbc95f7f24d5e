"""Every stage of the RLBF recipe in well under a minute: it proves the plumbing, not any result.

The quickstart with a tiny model, a few steps and a few prompts. The figures in its report mean
nothing.
Command: rlbf run experiments/smoke.py --workdir runs/smoke
"""

from rlbf_jax.attacks.decoding import DecodingGrid
from rlbf_jax.data.builders.injection import BsafePlusConfig
from rlbf_jax.directives import Semantics
from rlbf_jax.evaluation.suite import SuiteConfig
from rlbf_jax.methods.rlbf import ReinforcementConfig, RlbfConfig
from rlbf_jax.models.transformer import ModelConfig
from rlbf_jax.runs.experiment import BaseConfig, DataConfig, Experiment
from rlbf_jax.sampling.request import Knobs
from rlbf_jax.training.optimizer import OptimizerConfig
from rlbf_jax.training.policy import PolicyConfig
from rlbf_jax.training.supervised import SupervisedConfig


def get_config() -> Experiment[RlbfConfig]:
    # Reinforcement makes 3 x 2 updates, so that all four supervised stages are one program
    # to the compilation cache.
    optimizer = OptimizerConfig(schedule="linear", warmup_steps=2)
    supervised = SupervisedConfig(steps=6, batch_size=4, optimizer=optimizer, checkpoint_every=3)
    method = RlbfConfig(
        bsafe_plus=BsafePlusConfig(share_other_pools=0.4),
        sft_examples=120,
        refusal_examples=60,
        refusal_sft=supervised,
        sft=supervised,
        reinforcement=ReinforcementConfig(
            steps=3,
            prompts_per_step=3,
            group_size=2,
            updates_per_step=2,
            guidance_batch_size=2,
            policy=PolicyConfig(algorithm="ppo"),
            optimizer=optimizer,
            checkpoint_every=2,
        ),
    )
    return Experiment(
        method,
        semantics=Semantics.REWIND,
        data=DataConfig(vocab_size=900, pretraining_examples=600),
        base=BaseConfig(
            model=ModelConfig(
                num_layers=2, width=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=64
            ),
            pretraining=supervised,
        ),
        evaluation=SuiteConfig(
            pool="test",
            n=4,
            n_decoding=2,
            knobs=Knobs(temperature=0.7, max_tokens=88),
            decoding=DecodingGrid(temperatures=(0.5, 1.0), samples=1),
        ),
        sampling_batch=16,
        perplexity_examples=8,
    )
