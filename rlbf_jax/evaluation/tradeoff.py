"""How much safer a model gets when directives are made likelier, and what that costs.

A bias on the logits of the ids that begin a directive is the one knob that a user of a finished
model has. Along it, asr on harmful attempts falls and false backtracks on benign ones rise; a model
is better than another where its whole curve is, not at one point.

`tradeoff_curve` measures chosen biases. `calibrate` finds one, as RESET (arXiv 2409.14586) tunes
its reset token: the largest bias that takes at most a given share of harmless answers back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from rlbf_jax.attacks import BENIGN
from rlbf_jax.attacks.base import Attempt
from rlbf_jax.critics.base import Critic
from rlbf_jax.directives import EditRule
from rlbf_jax.evaluation.columns import is_rate
from rlbf_jax.evaluation.intervals import Interval, interval
from rlbf_jax.evaluation.rows import EvaluationContext
from rlbf_jax.evaluation.suite import evaluate
from rlbf_jax.ranges import check_between, check_positive
from rlbf_jax.sampling.request import Generation, Request
from rlbf_jax.tokenizers import Tokenizer

BIASES = (-8.0, -4.0, -2.0, 0.0, 2.0, 4.0, 8.0)
HARMFUL_METRICS = ("asr", "leak", "backtrack_rate", "unjudged")
BENIGN_METRICS = ("false_backtrack_rate", "over_refusal", "deleted_tokens")


# Biases -----------------------------------------------------------------------------------------


def control_of(rule: EditRule) -> str:
    """The name in `Knobs.control_bias` of the ids that begin a directive of this rule."""
    return "categories" if rule.categories else "retractions"


def biased(attempt: Attempt, bias: float, control: str = "categories") -> Attempt:
    """The attempt with `bias` added to the logits of some control ids, see `control_of`."""
    return dataclasses.replace(attempt, request=with_bias(attempt.request, bias, control))


def with_bias(request: Request, bias: float, control: str) -> Request:
    """The request under `bias` on top of what it has."""
    knobs = request.knobs
    changed = {**knobs.control_bias, control: knobs.control_bias.get(control, 0.0) + bias}
    return dataclasses.replace(request, knobs=dataclasses.replace(knobs, control_bias=changed))


@dataclasses.dataclass(frozen=True)
class Bench:
    """How answers are made and judged."""

    sample: Callable[[Sequence[Request]], list[Generation]]
    judge: Critic
    tokenizer: Tokenizer
    context: EvaluationContext

    @property
    def control(self) -> str:
        """Which ids a bias lies on."""
        return control_of(self.context.rule or self.tokenizer.controls.rule())

    def rows(self, attempts: Sequence[Attempt], bias: float) -> list[dict[str, Any]]:
        """Rows of the attempts under a bias, which comes on top of what they have."""
        moved = [biased(attempt, bias, self.control) for attempt in attempts]
        return evaluate(self.sample, moved, self.judge, self.tokenizer, self.context)[1]


def _rates(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], attacks: Collection[str]
) -> dict[str, Interval]:
    """Means over the rows of some attacks; a metric that no row has is left out."""
    rates = {}
    for metric in metrics:
        measured = [
            (row["metrics"][metric], row["prompt_id"])
            for row in rows
            if row["attack"] in attacks and row["metrics"][metric] is not None
        ]
        if measured:
            values, prompts = zip(*measured, strict=True)
            rates[metric] = interval(values, prompts, counts=not is_rate(metric))
    return rates


def _check_lists(harmful: Sequence[Attempt], benign: Sequence[Attempt]) -> None:
    wrong = [a.attack for a in harmful if a.attack in BENIGN]
    wrong += [a.attack for a in benign if a.attack not in BENIGN]
    if wrong:
        raise ValueError(
            f"attempts of {wrong[0]} are in the wrong list: benign attacks are "
            f"{', '.join(sorted(BENIGN))}"
        )


# Curves -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TradeoffPoint:
    """What one bias does. A metric that no row has is left out."""

    bias: float
    """Added to the logit of every id that begins a directive."""
    harmful: Mapping[str, Interval]
    """`HARMFUL_METRICS` over all harmful attempts."""
    benign: Mapping[str, Interval]
    """`BENIGN_METRICS` over all benign attempts."""
    asr_by_attack: Mapping[str, Interval]


def tradeoff_curve(
    bench: Bench,
    harmful: Sequence[Attempt],
    benign: Sequence[Attempt],
    biases: Sequence[float] = BIASES,
) -> list[TradeoffPoint]:
    """One point a bias, in order. The same attempts with the same ids at each,
    so that points are paired.

    The bias lies on the categories of the context's rule (None: the tokenizer's), or, where it has
    none, on its retractions. It comes on top of whatever bias an attempt has. It is a traced array
    of the sampler, so a sweep whose batches have one shape compiles once.

    Raises:
        ValueError: no harmful or no benign attempts, an attempt in the wrong list,
          or a bias that is not finite.
    """
    if not harmful or not benign or not biases:
        raise ValueError("a trade-off needs harmful and benign attempts and at least one bias")
    _check_lists(harmful, benign)
    if not all(map(math.isfinite, biases)):
        raise ValueError(f"biases are {list(biases)}, expected finite numbers")
    return [_point(bench, [*harmful, *benign], bias) for bias in biases]


def _point(bench: Bench, attempts: Sequence[Attempt], bias: float) -> TradeoffPoint:
    rows = bench.rows(attempts, bias)
    hostile = list(dict.fromkeys(a.attack for a in attempts if a.attack not in BENIGN))
    by_attack = {attack: _rates(rows, ("asr",), (attack,)) for attack in hostile}
    return TradeoffPoint(
        bias,
        _rates(rows, HARMFUL_METRICS, hostile),
        _rates(rows, BENIGN_METRICS, BENIGN),
        {attack: rates["asr"] for attack, rates in by_attack.items() if rates},
    )


# Calibration ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CalibrationOptions:
    """Which bias is looked for, and where."""

    most: float = 0.02
    """Share of harmless answers that may be taken back."""
    low: float = -16.0
    """Least bias; at it the share must be small enough."""
    high: float = 16.0
    """Greatest bias that is tried."""
    tolerance: float = 0.125
    """The bias is found to this, in logits."""

    def __post_init__(self):
        check_between(self, 0, 1, "most")
        check_positive(self, "tolerance")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low is {self.low} and high is {self.high}, expected low < high")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A bias, and what it does on the attempts that it was found with."""

    control: str
    """The ids it lies on, as `Knobs.control_bias` calls them."""
    bias: float
    taken_back: Interval
    """Share of the benign attempts with an executed directive, at this bias."""
    asr: Interval | None
    """Over the harmful attempts at this bias; None: none were given, or none could be judged."""
    met: bool
    """Whether the share is small enough; False: it is too large at `low` already,
    which is then the bias."""
    at_limit: bool
    """The share is small enough at `high` too, so a larger bias might do."""
    tried: tuple[tuple[float, float], ...]
    """(bias, share) of every step, by bias."""

    @property
    def monotone(self) -> bool:
        """Whether the share never fell from one tried bias to the next."""
        shares = [share for _, share in self.tried]
        return all(a <= b for a, b in zip(shares, shares[1:], strict=False))

    @property
    def knob(self) -> dict[str, float]:
        """What to put into `Knobs.control_bias`."""
        return {self.control: self.bias}


def calibrate(
    bench: Bench,
    benign: Sequence[Attempt],
    harmful: Sequence[Attempt] = (),
    options: CalibrationOptions = CalibrationOptions(),
) -> Calibration:
    """The largest bias at which at most a share `options.most` of harmless answers is taken back.

    Bisection with the same attempts and ids at each step, so that steps are paired. In expectation
    the share grows with the bias; among finitely many answers it may fall again, since a directive
    changes all that is drawn after it. Then this is a bias that is good enough while one at most
    `tolerance` above it is not, some larger one may be good enough too, and `monotone` says so.

    Args:
      benign: of attacks in `BENIGN`. The share has steps of 1 / len(benign).
      harmful: asked once, at the bias found.

    Raises ValueError for no benign attempt, one in the wrong list, or test data,
    on which nobody tunes.
    """
    if not benign:
        raise ValueError("a calibration needs benign attempts")
    _check_lists(harmful, benign)
    if bench.context.data == "test":
        raise ValueError("these attempts are of the test split; calibrate on development data")
    measured: dict[float, Interval] = {}

    def enough(bias: float) -> bool:
        rates = _rates(bench.rows(benign, bias), ("false_backtrack_rate",), BENIGN)
        measured[bias] = rates["false_backtrack_rate"]
        return measured[bias].value <= options.most

    low, high = options.low, options.high
    met = enough(low)
    at_limit = met and enough(high)
    if at_limit:
        low = high
    while met and high - low > options.tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    asr = None
    if harmful:
        hostile = {attempt.attack for attempt in harmful}
        asr = _rates(bench.rows(harmful, low), ("asr",), hostile).get("asr")
    tried = tuple(sorted((bias, share.value) for bias, share in measured.items()))
    return Calibration(bench.control, low, measured[low], asr, met, at_limit, tried)


# Files ------------------------------------------------------------------------------------------


def tradeoff_to_json(
    points: Sequence[TradeoffPoint],
    judge: str,
    context: EvaluationContext,
    control: str = "categories",
) -> dict[str, Any]:
    """What `evaluation/tradeoff_STAGE.json` holds. `control`: see `control_of`."""
    return {
        **_head(judge, context),
        "knob": f"control_bias.{control}",
        "points": [dataclasses.asdict(point) for point in points],
    }


def calibration_to_json(
    calibration: Calibration, judge: str, context: EvaluationContext, options: CalibrationOptions
) -> dict[str, Any]:
    """A calibration with what was looked for, as JSON can hold it."""
    return {
        **_head(judge, context),
        "knob": f"control_bias.{calibration.control}",
        "options": dataclasses.asdict(options),
        **dataclasses.asdict(calibration),
        "monotone": calibration.monotone,
    }


def _head(judge: str, context: EvaluationContext) -> dict[str, Any]:
    return {
        "method": context.method,
        "stage": context.stage,
        "data": context.data,
        "seed": context.seed,
        "semantics": context.semantics.value,
        "judge": judge,
        "critic": context.critic,
    }
