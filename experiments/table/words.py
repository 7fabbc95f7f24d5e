"""Markdown of the table of results: cells, tables, and sentences that are computed
from the numbers they speak of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from rlbf_jax.evaluation.columns import is_rate
from rlbf_jax.evaluation.comparison import Estimate, Slice
from rlbf_jax.report.words import p_value


@dataclasses.dataclass(frozen=True)
class Compared:
    """One difference with what it is a difference of."""

    metric: str
    where: Slice
    estimate: Estimate

    @property
    def label(self) -> str:
        return f"{self.metric} on {self.where.label}"


def relative_perplexity(ratio: Estimate) -> Compared:
    """A ratio of perplexities as a difference:
    by which share the perplexity of clean answers is higher."""
    seeds = {seed: value - 1 for seed, value in ratio.by_seed.items()}
    test = ratio.test and dataclasses.replace(ratio.test, mde=ratio.test.mde - 1)
    shifted = dataclasses.replace(
        ratio,
        value=ratio.value - 1,
        low=ratio.low - 1,
        high=ratio.high - 1,
        by_seed=seeds,
        test=test,
    )
    return Compared("perplexity (share)", Slice("clean answers"), shifted)


def number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}" if 0 < abs(value) < 0.01 else f"{value:.2f}"


def signed(value: float) -> str:
    """With its sign, a true minus."""
    if math.isnan(value):
        return "–"
    text = number(abs(value))
    return text if float(text) == 0 else ("+" if value > 0 else "−") + text


def mean_cell(found: Estimate | None) -> str:
    """`0.03 [0.01, 0.06]`, with W where the interval is Wilson's and no bootstrap."""
    if found is None or math.isnan(found.value):
        return "–"
    return f"{number(found.value)} [{number(found.low)}, {number(found.high)}]{_wilson(found)}"


def _wilson(estimate: Estimate) -> str:
    return " W" if estimate.method.startswith("wilson") else ""


def _detectable(estimate: Estimate) -> str:
    """` (0.12)`: the minimum detectable effect, where there is one."""
    mde = estimate.test.mde if estimate.test else math.nan
    return "" if math.isnan(mde) else f" ({number(mde)})"


def p_cell(estimate: Estimate) -> str:
    return p_value(estimate.test.p if estimate.test else math.nan)


def difference_cell(found: Estimate | None) -> str:
    """`**−0.12** [−0.20, −0.05] (0.11)`, bold where the interval excludes 0;
    in parentheses the minimum detectable effect."""
    if found is None or math.isnan(found.value):
        return "–"
    value = f"**{signed(found.value)}**" if found.excludes_zero else signed(found.value)
    limits = f"[{signed(found.low)}, {signed(found.high)}]"
    return f"{value} {limits}{_wilson(found)}{_detectable(found)}"


def ratio_cell(found: Estimate | None) -> str:
    if found is None or math.isnan(found.value):
        return "–"
    mde = found.test.mde if found.test else math.nan
    detectable = "" if math.isnan(mde) else f" ({mde:.3f})"
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]{detectable}"


def seeds_cell(found: Estimate | None) -> str:
    """Each seed's difference, in order of the seeds."""
    return (
        "–"
        if found is None or not found.by_seed
        else ", ".join(map(signed, _values(found.by_seed)))
    )


def _values(by_seed: Mapping[int, float]) -> list[float]:
    return [by_seed[seed] for seed in sorted(by_seed)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Raises ValueError for a row of another length than the head."""
    bad = [row for row in rows if len(row) != len(head)]
    if bad:
        raise ValueError(f"a row has {len(bad[0])} cells, the head {len(head)}: {bad[0]}")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


# Sentences --------------------------------------------------------------------------------------


def one_difference(a: str, b: str, found: Compared) -> str:
    """What one comparison says."""
    e, what = found.estimate, f"{found.metric} on {found.where.label}"
    if math.isnan(e.value):
        return f"There is no number for {what}, so {a} and {b} are not compared."
    interval = (
        f"95 % interval {signed(e.low)} to {signed(e.high)}{_tested(e)}; each seed: {seeds_cell(e)}"
    )
    if e.excludes_zero:
        direction = "lower" if e.value < 0 else "higher"
        return (
            f"{a} has {number(abs(e.value))} {direction} {what} than {b} ({interval}), an "
            "interval without 0."
        )
    return (
        f"{a} and {b} cannot be told apart by {what}: {signed(e.value)} ({interval}), an interval "
        "with 0 in it."
    )


def many_differences(a: str, b: str, compared: Sequence[Compared]) -> str:
    """How many comparisons tell a from b, which way they point, and the largest."""
    known = [c for c in compared if not math.isnan(c.estimate.value)]
    told = [c for c in known if c.estimate.excludes_zero]
    if not told:
        return (
            f"None of {len(known)} intervals excludes 0: {a} and {b} are not told apart "
            f"here.{_needed(known)}"
        )
    lower = sum(c.estimate.value < 0 for c in told)
    largest = max(told, key=lambda c: abs(c.estimate.value))
    return (
        f"{len(told)} of {len(known)} intervals exclude 0, {a} being lower than {b} in {lower} of "
        "them and higher in "
        f"{len(told) - lower}; the largest difference is {signed(largest.estimate.value)} "
        f"({largest.label})."
    )


def _tested(estimate: Estimate) -> str:
    """`; p 0.012; detectable from 0.12 on`."""
    p, test = p_cell(estimate), estimate.test
    said = [f"p {p}"] if p != "–" else []
    if test is not None and not math.isnan(test.mde):
        said.append(f"detectable from {number(test.mde)} on")
    return "".join(f"; {words}" for words in said)


def _needed(compared: Sequence[Compared]) -> str:
    """A sentence of what differences would have been found, shares alone."""
    effects = [
        c.estimate.test.mde
        for c in compared
        if c.estimate.test and is_rate(c.metric) and not math.isnan(c.estimate.test.mde)
    ]
    if not effects:
        return ""
    low, high = number(min(effects)), number(max(effects))
    return f" Detectable were differences from {low} to {high} on."


def changes(variants: Sequence[tuple[str, Sequence[Compared]]], most: int = 4) -> str:
    """What each variant changes, in one sentence;
    counts of words and ids are not held against shares."""
    return "; ".join(_changes(name, compared, most) for name, compared in variants) + "."


def _changes(name: str, compared: Sequence[Compared], most: int) -> str:
    known = [c for c in compared if not math.isnan(c.estimate.value)]
    told = [c for c in known if c.estimate.excludes_zero]
    if not told:
        return f"*{name}* changes none of {len(known)} numbers beyond its interval"
    # Shares first, the largest first; then counts.
    told = sorted(told, key=lambda c: (not is_rate(c.metric), -abs(c.estimate.value)))
    named = ", ".join(f"{c.label} {signed(c.estimate.value)}" for c in told[:most])
    more = f", and {len(told) - most} more" if len(told) > most else ""
    return (
        f"*{name}* changes {len(told)} of {len(known)} numbers beyond their intervals "
        f"({named}{more})"
    )
