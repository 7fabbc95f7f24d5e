"""Whether a BSAFE+ build can succeed, found out in a moment instead of after a build
that came to nothing."""

from __future__ import annotations

import numpy as np

from rlbf_jax.data.builders.bsafe_plus import backtrack_rule, build_bsafe_plus
from rlbf_jax.data.builders.examples import BuildReport, DocumentSource, build_pretraining
from rlbf_jax.data.builders.injection import BsafePlusConfig, build_injection, draw_shape
from rlbf_jax.data.schema import Injection
from rlbf_jax.data.world import World
from rlbf_jax.errors import InputError
from rlbf_jax.tokenizers import Tokenizer

PROBES = 200
"""Injections that are measured."""
MOST_BEYOND = 0.5
"""Share of them that may be rejected as longer than x_max.
With more, few examples would have a directive at all."""


def check_bsafe_plus(world: World, tokenizer: Tokenizer, config: BsafePlusConfig) -> None:
    """Raises InputError where x_max is too small for most violations,
    or nearly every example is too long.

    Draws from a generator of its own, so the build that follows is what it would have been.
    """
    rng = np.random.default_rng(0)
    sizes = []
    for _ in range(PROBES):
        harmful = bool(rng.random() < config.share_harmful)
        made = build_injection(world, rng, config, harmful=harmful, shape=draw_shape(rng, config))
        if isinstance(made, Injection):
            sizes.append(len(tokenizer.encode(made.bridge + made.violation.text + made.tail)))
    x_max = backtrack_rule(tokenizer).x_max
    beyond = sum(size > x_max for size in sizes)
    if (
        config.share_plain < 1
        and config.on_too_long == "refuse"
        and beyond > MOST_BEYOND * len(sizes)
    ):
        raise InputError(
            f"x_max is {x_max}, but {beyond} of {len(sizes)} violations need more (the longest "
            f"{max(sizes)} ids); "
            f"raise x_max to {max(sizes)} or so, or set on_too_long to split"
        )
    try:
        build_bsafe_plus(world, tokenizer, rng, config, 40)
    except ValueError as error:
        raise InputError(f"bsafe_plus: {error}") from error


def check_pretraining(world: DocumentSource, tokenizer: Tokenizer, row_length: int) -> None:
    """Raises InputError where nearly every document is longer than a row."""
    try:
        build_pretraining(world, tokenizer, np.random.default_rng(0), 40, row_length)
    except ValueError as error:
        raise InputError(
            f"row_length is {row_length}, and nearly every document has more ids; raise it"
        ) from error


def left_out(report: BuildReport, kept: int) -> str:
    """What to say of a build that rejected more draws than it kept:
    its mixture is another than asked for. Or empty."""
    total = sum(report.rejected.values())
    if total <= kept:
        return ""
    reasons = ", ".join(
        f"{n} {reason}" for reason, n in sorted(report.rejected.items(), key=lambda item: -item[1])
    )
    return (
        f"{total} of {total + kept} draws were left out ({reasons}), long ones first of all; "
        "raise row_length, "
        "bsafe_plus.max_tokens or x_max"
    )
