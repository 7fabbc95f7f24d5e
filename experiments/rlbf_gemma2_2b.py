"""RLBF of Gemma 2 2B on your own prompts and responses: the recipe of rlbf_gemma2_9b.py.

Paper: arXiv 2602.08377; what is the paper's and what is ours stands in that file.
You fetch: the checkpoint google/gemma-2-2b-it (its license has to be accepted on the
hub) into checkpoints/gemma-2-2b-it, and a file of prompts and responses (.csv or .jsonl).
Command: rlbf run experiments/rlbf_gemma2_2b.py --data.path FILE
LoRA alone: --model.lora.rank 16, as there.
What it takes, before anything is fetched (docs/scaling.md):
    rlbf plan experiments/rlbf_gemma2_2b.py --topology v5e:4x4
It was planned and never run.
"""

import rlbf_gemma2_9b

from rlbf_jax.methods.rlbf import RlbfConfig
from rlbf_jax.models.presets import PRESETS
from rlbf_jax.parallel.mesh import MeshConfig
from rlbf_jax.runs.experiment import Experiment


def get_config() -> Experiment[RlbfConfig]:
    return rlbf_gemma2_9b.large(
        PRESETS["gemma2_2b"], "checkpoints/gemma-2-2b-it", MeshConfig(1, -1, 1)
    )
