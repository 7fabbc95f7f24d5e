"""The two parts of `adaptive_gcg`'s loss, for the suffixes that a run's attack found.

Command: python experiments/adaptive_parts.py RUN --stage sft [--window 8] [--search_seed 0]

after `rlbf attack RUN --stage sft --attack adaptive_gcg --data test --n_prompts 16 ...` with the
same window and seed.
Expected: one line: nats of the target an id, the mean and the largest log-probability of a
directive in the window after it, the chance that a directive comes anywhere in it, and how often
one came in the answers.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from rlbf_jax.attacks.base import AttackConfig, Scene, Victim
from rlbf_jax.attacks.search.gcg_step import directive_logprobs
from rlbf_jax.attacks.search.optimized import goals_of
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.runs.load import open_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("--stage", default="")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--search_seed", type=int, default=0)
    args = parser.parse_args()
    opened = open_run(args.run)
    stage = args.stage or opened.last_stage
    run, evaluator = opened.run, opened.evaluator(stage)
    policy, suite = evaluator.policy, evaluator.suite
    file = args.run / "evaluation" / "attacks" / f"adaptive_gcg_{stage}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    config = AttackConfig(rows[0]["data"], suite.splits[-1], suite.knobs, suite.room)
    rng = np.random.default_rng([suite.seed, args.search_seed, *b"optimized"])
    victim = Victim(run.model, policy.params, evaluator.sampling("goals"))
    scene = Scene(run.world, policy.tokenizer, rng, config, victim)
    _, goals = goals_of("adaptive_gcg", scene, len(rows), args.window)
    texts = [[*policy.tokenizer.encode_prompt(row["search"]["message"])] for row in rows]
    width = max(len(text) + len(goal.answer) for text, goal in zip(texts, goals, strict=True))

    @jax.jit
    def logits_of(ids):
        hidden, _ = transformer.forward(
            run.model, policy.params, ids[None], Visibility(jnp.arange(width)[None])
        )
        return transformer.unembed(run.model, policy.params, hidden[0])

    target, control = [], []
    for row, text, goal in zip(rows, texts, goals, strict=True):
        if goal.prompt != row["prompt"]:
            raise SystemExit(
                f"{file}: another prompt than this command draws; give the attack's window and seed"
            )
        ids = np.zeros(width, np.int32)
        ids[: len(text) + len(goal.answer)] = [*text, *goal.answer]
        # The row that predicts the first id of the answer is the last one of the prompt.
        logits = logits_of(jnp.asarray(ids))[len(text) - 1 :]
        logp = np.asarray(jax.nn.log_softmax(logits))
        target.append(-np.mean([logp[i, goal.answer[i]] for i in range(*goal.target)]))
        control.append(np.asarray(directive_logprobs(policy.rule, logits))[slice(*goal.control)])
    any_of = [1 - np.prod(1 - np.exp(values)) for values in control]
    means, largest = ([f(values) for values in control] for f in (np.mean, np.max))
    print(
        f"{args.stage}: target {np.mean(target):.2f}, log p(directive) mean {np.mean(means):.2f} "
        "largest "
        f"{np.mean(largest):.2f}, chance in the window {np.mean(any_of):.2f}, "
        f"backtrack_rate {np.mean([row['metrics']['backtrack_rate'] for row in rows]):.2f}"
    )


if __name__ == "__main__":
    main()
