"""The quickstart with what still beat it in training: late violations, several in one answer, cut
ones, strange prompts, and prices for what the paper's table does not read.

Paper: arXiv 2602.08377 is quickstart.py's; everything that is changed here is ours, tuned on the
development split of one seed, and measured on a test pool that nothing was tuned on
(docs/results.md, python experiments/quickstart_table.py).

- BSAFE+ teaches late directives, several violations, prompts with strange suffixes, and directives
  weigh more; SFT is longer, since X is a number that has to be counted. The control has it too.
- Rollouts start from those contexts as well, each with its benign twin, from suffixes that a short
  search found, and from the policy's own mistakes. Many prompts, two answers each: a value head
  needs no group.
- A directive of the wrong category, a false backtrack where there never was a violation, and torn
  text cost something.
- Every model is asked at the bias at which it takes 2 % of harmless answers back.

Command: rlbf run experiments/quickstart_hold.py     (23 minutes on one core)
"""

import dataclasses

import quickstart

from rlbf_jax.data.builders.injection import BsafePlusConfig
from rlbf_jax.evaluation.suite import SuiteConfig
from rlbf_jax.methods.attacked_prompts import RolloutMix
from rlbf_jax.methods.rlbf import RlbfConfig
from rlbf_jax.objectives.trajectory_reward import RewardConfig
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.sampling.request import Knobs

DIRECTIVE_WEIGHT = 6.0
ATTACKS = (
    "none", "benign_prefill", "benign_middle", "benign_cut", "benign_late", "benign_many",
    "refusal_prefill", "strange_suffix",
    "direct", "prefilling", "deep_prefilling", "middle_filling", "middle_cut", "late_filling",
    "many_violations", "reprogram", "respelled", "critic_note", "decoding",
)  # fmt: skip


def get_config() -> Experiment[RlbfConfig]:
    config = quickstart.get_config()
    method = config.method
    policy = dataclasses.replace(
        method.reinforcement.policy, directive_weight=DIRECTIVE_WEIGHT, sft_weight=6.0
    )
    reinforcement = dataclasses.replace(
        method.reinforcement,
        steps=140,
        prompts_per_step=48,
        group_size=2,
        own_mistakes=0.1,
        policy=policy,
        reward=RewardConfig(
            residue_is_unsafe=True,
            poor=-0.2,
            torn_is_failed=True,
            price_wrong_category=1.0,
            price_on_harmless=0.5,
        ),
    )
    return config.replace(
        bsafe_plus=BsafePlusConfig(
            share_other_pools=0.4,
            word_cut_share=0.1,
            share_plain=0.3,
            share_strange=0.2,
            late_share=0.4,
            late_words=12,
            several_share=0.3,
        ),
        sft_examples=12_000,
        sft=dataclasses.replace(method.sft, steps=960, directive_weight=DIRECTIVE_WEIGHT),
        reinforcement=reinforcement,
        rollouts=contexts(),
        rollout_tokens=118,
        evaluation=evaluation(),
    )


def contexts() -> RolloutMix:
    """What rollouts start from."""
    return RolloutMix(
        none=0.06,
        direct=0.03,
        prefilling=0.10,
        deep_prefilling=0.06,
        middle_filling=0.12,
        middle_cut=0.05,
        late_filling=0.20,
        many_violations=0.19,
        benign_prefill=0.04,
        benign_middle=0.06,
        benign_cut=0.06,
        benign_late=0.04,
        benign_many=0.06,
        refusal_prefill=0.02,
        strange_suffix=0.07,
        searched_share=0.3,
        rl_forms=0.8,
        violations=4,
    )


def evaluation() -> SuiteConfig:
    """Every attack and every benign twin; room for four violations."""
    return SuiteConfig(
        attacks=ATTACKS,
        pool="test",
        n=64,
        splits=("rl", "unseen"),
        knobs=Knobs(temperature=0.7, max_tokens=160),
        calibrate=0.02,
    )
