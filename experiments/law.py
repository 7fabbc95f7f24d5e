"""The law of the sampler on a run's own weights:
recorded log-probabilities against one teacher-forced pass.

Command: python experiments/law.py runs/quickstart --stage rlbf
Prints one JSON object a semantics: directives sampled, standard deviation of the logits, the
largest difference over all drawn ids, and the control (the same traces read under the other
semantics, after retractions only).

Attacked prompts make a trained model retract; the category bias makes it retract again and again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from rlbf_jax.attacks import ATTACKS
from rlbf_jax.attacks.direct import AttackConfig
from rlbf_jax.directives import Semantics
from rlbf_jax.models import transformer
from rlbf_jax.runs.load import open_run
from rlbf_jax.sampling.request import Knobs
from rlbf_jax.sampling.scoring import hidden_states, pack_traces, score


def measure(workdir: Path, stage: str, semantics: Semantics, n: int) -> dict:
    """One row of the table."""
    opened = open_run(workdir)
    evaluator = opened.evaluator("base" if stage == "random" else stage)
    policy, run = evaluator.policy.replace(semantics=semantics), opened.run
    if stage == "random":
        policy = policy.replace(params=run.initial_params())
    shapes = dataclasses.replace(evaluator.sampler().config, semantics=semantics)
    # Random weights draw a directive about as often as any other ids;
    # a trained model takes less persuading.
    bias = 6.0 if stage == "random" else 3.0
    room = evaluator.suite.knobs.max_tokens
    where = "categories" if policy.rule.categories else "retractions"
    knobs = Knobs(max_tokens=room, control_bias={where: bias})
    config = AttackConfig(pool="development", split="rl", knobs=knobs)
    rng = np.random.default_rng(0)
    attempts = ATTACKS["middle_filling"](run.world, run.tokenizer, rng, n, config)
    requests = [a.request for a in attempts]
    with jax.default_matmul_precision("highest"):
        generations = policy.sampler(shapes)(policy.params, requests, 0)
        traces = pack_traces(generations, policy.rule, opened.experiment.max_prompt + room)
        other = Semantics.KEEP if semantics is Semantics.REWIND else Semantics.REWIND
        right, wrong = (
            np.asarray(
                jax.jit(lambda p, s=s: score(run.model, p, policy.rule, traces, s).logprobs)(
                    policy.params
                )
            )
            for s in (semantics, other)
        )
        hidden, _ = hidden_states(run.model, policy.params, policy.rule, traces, semantics)
        logits = transformer.unembed(run.model, policy.params, hidden)
        logits = np.asarray(logits)[np.asarray(traces.is_action)]
    gap, control = 0.0, 0.0
    for row, g in enumerate(generations):
        start = len(g.prompt_ids)
        drawn = ~np.isnan(g.logprobs)
        columns = slice(start, start + len(g.trace))
        gap = max(gap, np.abs(g.logprobs - right[row, columns])[drawn].max(initial=0))
        if g.edits:
            drawn[: g.edits[0].index + 2] = False
            control = max(control, np.abs(g.logprobs - wrong[row, columns])[drawn].max(initial=0))
    return {
        "stage": stage,
        "semantics": semantics.value,
        "directives": sum(len(g.edits) for g in generations),
        "clamped": sum(e.clamped for g in generations for e in g.edits),
        "logit_std": round(float(logits.std()), 2),
        "max_difference": float(gap),
        "control": float(control),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path, help="folder of a run")
    parser.add_argument(
        "--stage", default="rlbf", help="a finished stage, or `random` for untrained weights"
    )
    parser.add_argument("--n", type=int, default=192, help="attacked prompts")
    args = parser.parse_args()
    for semantics in Semantics:
        print(json.dumps(measure(args.workdir, args.stage, semantics, args.n)), flush=True)


if __name__ == "__main__":
    main()
