"""What the report says of each metric, and of the methods of intervals and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Collection

from rlbf_jax.evaluation import columns, intervals, paired_tests

LONG_PREFIX = "suffix of an attack: only rows with a long benign prefix before the forced span."
MARKS = {
    "wilson": "W",
    "wilson_prompts": "WP",
    "bootstrap": "B",
    "joint_bootstrap": "J",
    "span": "S",
    "connor": "C",
    "bootstrap_se": "SE",
}
"""Method -> what stands after a number that it made."""
PAIRED = (
    "p is of McNemar's exact test (mid-p; pairs of one prompt change sides together). MDE, the "
    "minimum detectable effect, is the smallest true difference that a comparison of this size "
    "finds at 5 % with 80 % power; what is smaller may be there unseen"
)


def definitions() -> dict[str, str]:
    """name -> its definition, in the report's order."""
    return columns.definitions() | {"long_prefix": LONG_PREFIX}


def marked(text: str, method: str) -> str:
    """A number followed by the mark of its method; as it is where the method is not known."""
    return f"{text} {MARKS[method]}" if method in MARKS else text


def p_value(p: float) -> str:
    """With three digits; a dash for NaN."""
    return "–" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def legend(methods: Collection[str] | None = None) -> str:
    """`W: Wilson's ...; B: bootstrap ...`: what the marks of some methods mean,
    those of all intervals for None."""
    known = intervals.METHODS | paired_tests.METHODS
    chosen = intervals.METHODS if methods is None else methods
    return "; ".join(f"{MARKS[name]}: {known[name]}" for name in MARKS if name in chosen)


def of_intervals() -> str:
    """What an interval is, and what the mark after it says."""
    return (
        "95 %, two-sided, followed by its method. "
        f"{legend()}. Half its width is how far this many rows leave a rate open."
    )
