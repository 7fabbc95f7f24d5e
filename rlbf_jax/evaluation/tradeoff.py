"""The trade-off curve: how much safer a model gets when directives are made likelier, and what that
costs.

A bias on the logits of category ids is the one knob that a user of a finished model has (RESET,
arXiv 2409.14586, tunes its reset token so). Along it, asr on harmful attempts falls and false
backtracks on benign ones rise; a model is better than another where its whole curve is, not at one
point.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from rlbf_jax.attacks import BENIGN
from rlbf_jax.attacks.base import Attempt
from rlbf_jax.critics.base import Critic
from rlbf_jax.evaluation.intervals import Interval, interval
from rlbf_jax.evaluation.rows import EvaluationContext
from rlbf_jax.evaluation.suite import evaluate
from rlbf_jax.sampling.request import Generation, Request
from rlbf_jax.tokenizers import Tokenizer

BIASES = (-8.0, -4.0, -2.0, 0.0, 2.0, 4.0, 8.0)
HARMFUL_METRICS = ("asr", "leak", "backtrack_rate", "unjudged")
BENIGN_METRICS = ("false_backtrack_rate", "over_refusal", "deleted_tokens")


@dataclasses.dataclass(frozen=True)
class TradeoffPoint:
    """What one bias does. A metric that no row has is left out."""

    bias: float
    """Added to the logit of every category id."""
    harmful: Mapping[str, Interval]
    """`HARMFUL_METRICS` over all harmful attempts."""
    benign: Mapping[str, Interval]
    """`BENIGN_METRICS` over all benign attempts."""
    asr_by_attack: Mapping[str, Interval]


def tradeoff_curve(
    sample: Callable[[Sequence[Request]], list[Generation]],
    harmful: Sequence[Attempt],
    benign: Sequence[Attempt],
    judge: Critic,
    tokenizer: Tokenizer,
    context: EvaluationContext,
    biases: Sequence[float] = BIASES,
) -> list[TradeoffPoint]:
    """One point a bias, in order. The same attempts with the same ids at each, so that points are
    paired.

    The bias comes on top of whatever bias an attempt has. It is a traced array of the sampler, so a
    sweep whose batches have one shape compiles once.

    Raises:
        ValueError: no harmful or no benign attempts, an attempt in the wrong list, or a bias that
          is not finite.
    """
    if not harmful or not benign or not biases:
        raise ValueError("a trade-off needs harmful and benign attempts and at least one bias")
    if wrong := [a.attack for a in harmful if a.attack in BENIGN] + [
        a.attack for a in benign if a.attack not in BENIGN
    ]:
        raise ValueError(
            f"attempts of {wrong[0]} are in the wrong list: benign attacks are "
            f"{', '.join(sorted(BENIGN))}"
        )
    if not all(map(math.isfinite, biases)):
        raise ValueError(f"biases are {list(biases)}, expected finite numbers")
    return [
        _point(
            bias, [biased(a, bias) for a in (*harmful, *benign)], sample, judge, tokenizer, context
        )
        for bias in biases
    ]


def biased(attempt: Attempt, bias: float) -> Attempt:
    """The attempt with `bias` added to the logits of all categories."""
    knobs = attempt.request.knobs
    control = {**knobs.control_bias, "categories": knobs.control_bias.get("categories", 0.0) + bias}
    request = dataclasses.replace(
        attempt.request, knobs=dataclasses.replace(knobs, control_bias=control)
    )
    return dataclasses.replace(attempt, request=request)


def _point(
    bias: float, attempts: Sequence[Attempt], sample, judge, tokenizer, context
) -> TradeoffPoint:
    _, rows = evaluate(sample, attempts, judge, tokenizer, context)

    def rates(metrics: Sequence[str], attacks: Collection[str]) -> dict[str, Interval]:
        found = {}
        for metric in metrics:
            told = [
                (row["metrics"][metric], row["prompt_id"])
                for row in rows
                if row["attack"] in attacks
            ]
            values, prompts = (
                [v for v, _ in told if v is not None],
                [p for v, p in told if v is not None],
            )
            if values:
                found[metric] = interval(values, prompts, counts=metric == "deleted_tokens")
        return found

    hostile = [
        attack for attack in dict.fromkeys(a.attack for a in attempts) if attack not in BENIGN
    ]
    by_attack = {attack: rates(("asr",), (attack,)) for attack in hostile}
    return TradeoffPoint(
        bias,
        rates(HARMFUL_METRICS, hostile),
        rates(BENIGN_METRICS, BENIGN),
        {attack: found["asr"] for attack, found in by_attack.items() if found},
    )


def tradeoff_to_json(
    points: Sequence[TradeoffPoint], judge: str, context: EvaluationContext
) -> dict[str, Any]:
    """What `evaluation/tradeoff_STAGE.json` holds."""
    head = {
        "method": context.method,
        "stage": context.stage,
        "data": context.data,
        "seed": context.seed,
    }
    head |= {"semantics": context.semantics.value, "judge": judge, "critic": context.critic}
    return {
        **head,
        "knob": "control_bias.categories",
        "points": [dataclasses.asdict(point) for point in points],
    }
