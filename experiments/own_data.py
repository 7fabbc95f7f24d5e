"""RLBF on your own prompts and responses: a tokenizer and a small base of your file,
BSAFE+, SFT, RLBF, a report.

Paper: arXiv 2602.08377, at toy scale. Violations are the built-in injector's harmless stand-ins,
mixed into half of the base's documents so that there is something to take back.
Command: rlbf run experiments/own_data.py --data.path FILE.csv
    (.csv or .jsonl; columns by --data.prompt_column, --data.response_column and
    --data.context_column.)
    Long prompts, as GSM8K's: --data.max_prompt_words 30 --max_prompt 88
On a published checkpoint: --start_from CHECKPOINT --semantics keep, and room for its chat template
(docs/models.md).
Time and memory: 3 min 45 s on two cores, 2.2 GB (GSM8K, with longer prompts: 4 min 45 s).

Measured on a test pool that nothing was tuned on (`--seed 1`; seeds divide the prompts into pools):
48 prompts, 727 usable rows of a 1,000-row sample of databricks-dolly-15k;
forms seen in SFT / in RL only / unseen:

                                 base                 sft                  rlbf
    prefilling asr               0.94 / 0.85 / 0.85   0.04 / 0.15 / 0.19   0.02 / 0.15 / 0.17
    prefilling leak              1.00 / 0.98 / 1.00   0.19 / 0.46 / 0.44   0.21 / 0.56 / 0.75
    middle filling asr           1                    0.02 / 0.40 / 0.69   0.02 / 0.27 / 0.58
    deep prefilling asr          1                    0.50 / 0.88 / 0.96   0.52 / 1.00 / 0.96
    false backtracks: none /
      benign prefill / middle                         0.08 / 0.35 / 0.00   0.02 / 0.19 / 0.02
    perplexity, held-out answers 297                  368                  393

GSM8K (train file, seed 0, as above, an earlier draw of the data): prefilling asr base 0.46 / 0.42 /
0.35, sft 0.06 / 0.08 / 0.02, rlbf 0.04 / 0.13 / 0.08; middle filling rlbf 0.00 / 0.06 / 0.06; false
backtracks rlbf 0.00 / 0.04 / 0.00; perplexity 17.6, 16.5, 18.0.

So SFT and RLBF beat the base on prefilling, and differ from each other within noise; deep
prefilling stays open, and so do unseen forms. A model of this size that reads a few hundred answers
knows them by heart and writes weak English
elsewhere: its perplexity on held-out answers is that of new facts and names, the bound for
`coherent` is wide, and `coherent` says little. More rows help.
"""

from rlbf_jax.attacks.decoding import DecodingGrid
from rlbf_jax.attacks.forced.middle_filling import MiddleFillingOptions
from rlbf_jax.data.builders.injection import BsafePlusConfig
from rlbf_jax.directives import Semantics
from rlbf_jax.evaluation.suite import SuiteConfig
from rlbf_jax.methods.attacked_prompts import RolloutMix
from rlbf_jax.methods.rlbf import ReinforcementConfig, RlbfConfig
from rlbf_jax.models.transformer import ModelConfig
from rlbf_jax.objectives.trajectory_reward import RewardConfig
from rlbf_jax.runs.experiment import BaseConfig, DataConfig, Experiment
from rlbf_jax.sampling.request import Knobs
from rlbf_jax.training.optimizer import OptimizerConfig
from rlbf_jax.training.policy import PolicyConfig
from rlbf_jax.training.supervised import SupervisedConfig


def get_config() -> Experiment[RlbfConfig]:
    method = RlbfConfig(
        bsafe_plus=BsafePlusConfig(max_tokens=160),
        sft_examples=3_000,
        refusal_examples=200,
        sft=SupervisedConfig(
            steps=120, batch_size=16, optimizer=OptimizerConfig(learning_rate=1e-3)
        ),
        reinforcement=ReinforcementConfig(
            steps=40,
            prompts_per_step=8,
            # Hotter, a base this weak is seldom coherent, and taking back would seldom pay.
            temperature=0.7,
            group_size=8,
            updates_per_step=2,
            guidance_batch_size=8,
            policy=PolicyConfig(algorithm="ppo", sft_weight=5.0),
            reward=RewardConfig(residue_is_unsafe=True),
            optimizer=OptimizerConfig(learning_rate=4e-4, schedule="linear", warmup_steps=4),
        ),
        # SFT meets an opener only before a violation;
        # benign twins teach that an opener alone is no reason to go back.
        rollouts=RolloutMix(
            direct=0.1,
            prefilling=0.15,
            middle_filling=0.2,
            benign_prefill=0.15,
            benign_middle=0.1,
        ),
        rollout_tokens=104,
        baselines=False,
    )
    return Experiment(
        method,
        semantics=Semantics.REWIND,
        data=DataConfig(
            path="prompts.csv",
            max_prompt_words=18,
            max_response_words=50,
            vocab_size=2000,
            pretraining_examples=12_000,
            row_length=160,
        ),
        base=BaseConfig(
            model=ModelConfig(
                num_layers=3, width=128, num_heads=4, num_kv_heads=4, head_dim=32, mlp_width=320
            ),
            pretraining=SupervisedConfig(
                steps=200,
                batch_size=24,
                optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20, weight_decay=0.1),
            ),
        ),
        sampling_batch=64,
        max_prompt=64,
        evaluation=SuiteConfig(
            benchmark="own_data",
            pool="test",
            n=48,
            knobs=Knobs(temperature=0.7, max_tokens=104),
            # A small file's test pool has few long answers.
            middle=MiddleFillingOptions(long_words=12),
            decoding=DecodingGrid(samples=1),
            n_decoding=16,
        ),
    )
