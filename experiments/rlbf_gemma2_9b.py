"""RLBF of Gemma 2 9B on your own prompts and responses: BSAFE+, SFT, GRPO with SFT guidance.

Paper: arXiv 2602.08377. The paper's: KEEP semantics, the directives, SFT on BSAFE+, GRPO with the
reward -1 / -0.5 / -0.2 / 1, the guidance term. Ours: every size and rate below (the paper publishes
none), what rollouts start from, and violations: the built-in injector's harmless stand-ins. For
real ones bring an injector and a critic (docs/critics.md).
You fetch: the checkpoint google/gemma-2-9b-it (its license has to be accepted on the hub) into
checkpoints/gemma-2-9b-it, and a file of prompts and responses (.csv or .jsonl), as
databricks-dolly-15k.
Command: rlbf run experiments/rlbf_gemma2_9b.py --data.path FILE
LoRA alone: --model.lora.rank 16; with --model.param_dtype bfloat16 what is frozen takes half, and
    rates ten times as high (--sft.optimizer.learning_rate and the like) are where to begin.
What it takes, before anything is fetched (docs/scaling.md):
    rlbf plan experiments/rlbf_gemma2_9b.py --topology v5e:16x16
It was planned and never run.
"""

import dataclasses

from rlbf_jax.data.builders.injection import BsafePlusConfig
from rlbf_jax.directives import Semantics
from rlbf_jax.evaluation.suite import SuiteConfig
from rlbf_jax.methods.rlbf import ReinforcementConfig, RlbfConfig
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.presets import PRESETS
from rlbf_jax.parallel.mesh import MeshConfig
from rlbf_jax.runs.experiment import BaseConfig, DataConfig, Experiment
from rlbf_jax.sampling.request import Knobs
from rlbf_jax.training.optimizer import OptimizerConfig
from rlbf_jax.training.policy import PolicyConfig
from rlbf_jax.training.supervised import SupervisedConfig

RESPONSE, PROMPT = 512, 256
"""Ids of a response with all that it takes back, and of a prompt with its chat template."""


def get_config() -> Experiment[RlbfConfig]:
    return large(PRESETS["gemma2_9b"], "checkpoints/gemma-2-9b-it", MeshConfig(1, -1, 4))


def large(model: ModelConfig, checkpoint: str, mesh: MeshConfig) -> Experiment[RlbfConfig]:
    """RLBF of a published checkpoint of `model`'s shape: bfloat16 activations, float32 parameters,
    scanned layers that the backward pass computes again."""
    method = RlbfConfig(
        bsafe_plus=BsafePlusConfig(max_tokens=PROMPT + RESPONSE),
        sft_examples=20_000,
        sft=SupervisedConfig(
            steps=1_000,
            batch_size=64,
            optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=50),
            checkpoint_every=250,
        ),
        reinforcement=ReinforcementConfig(
            steps=500,
            prompts_per_step=32,
            group_size=8,
            updates_per_step=1,
            guidance_batch_size=64,
            policy=PolicyConfig(algorithm="grpo"),
            optimizer=OptimizerConfig(learning_rate=1e-6, schedule="linear", warmup_steps=20),
            checkpoint_every=50,
        ),
        rollout_tokens=RESPONSE,
        max_drawn=RESPONSE // 2,
        baselines=False,
    )
    return Experiment(
        method,
        semantics=Semantics.KEEP,
        data=DataConfig(
            path="prompts.csv", max_prompt_words=80, max_response_words=160, row_length=1024
        ),
        base=BaseConfig(
            model=dataclasses.replace(
                model, dtype="bfloat16", param_dtype="float32", scan_layers=True, remat="block"
            ),
            start_from=checkpoint,
        ),
        mesh=mesh,
        max_prompt=PROMPT,
        sampling_batch=256,
        evaluation=SuiteConfig(
            benchmark="own_data", pool="test", n=256, knobs=Knobs(max_tokens=RESPONSE)
        ),
    )
