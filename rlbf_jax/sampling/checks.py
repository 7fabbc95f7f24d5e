"""What the sampler refuses: requests that cannot be run, and draws that are no ids."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlbf_jax.errors import InputError, UserError
from rlbf_jax.sampling.distribution import NONE_LEGAL
from rlbf_jax.sampling.request import Knobs, Request

LEAST_TEMPERATURE = 1e-6
"""Logits divided by less may leave float32's range. 0 is greedy."""
MOST_BIAS = 1e12
"""Of one entry of `control_bias`, in either direction. A finite number says never, too: logits are
of order 10."""
_INT32 = 2**31 - 1
_UINT32 = 2**32 - 1
_FLOAT32 = float(np.finfo(np.float32).max)


def check_request(
    request: Request, prompt: Sequence[int], vocab_size: int, max_context: int
) -> None:
    """Raises InputError for a request that cannot be run, with the field and what to change.

    Args:
      vocab_size: of the tokenizer; prompt, forced and stop ids lie below it.
      max_context: most ids of prompt and response together.
    """
    knobs = request.knobs
    check_knobs(knobs)
    if not (request.id is None or _is_whole(request.id, 0, _UINT32)):
        raise InputError(f"id is {request.id}, expected a whole number in 0..{_UINT32}, or None")
    if not len(prompt):
        raise InputError("a prompt needs at least one id; encode_prompt or prompt_ids gave none")
    if len(prompt) + knobs.max_tokens > max_context:
        raise InputError(
            f"a prompt of {len(prompt)} ids and max_tokens = {knobs.max_tokens} exceed "
            f"{max_context} ids in all; "
            "shorten the prompt, or lower max_tokens"
        )
    if len(request.forced) > knobs.max_tokens:
        raise InputError(
            f"{len(request.forced)} forced ids exceed max_tokens = {knobs.max_tokens}; forced ids "
            "count, "
            "so raise max_tokens or force fewer words"
        )
    stops = () if knobs.stop_ids is None else knobs.stop_ids
    for name, ids in (("prompt", prompt), ("forced", request.forced), ("stop", stops)):
        _check_ids(name, ids, vocab_size)


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    array = np.asarray(ids)
    if not array.size:
        return
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"{name} ids must be whole numbers in 0..{vocab_size - 1}")
    if not 0 <= array.min() <= array.max() < vocab_size:
        wrong = next(int(i) for i in array if not 0 <= i < vocab_size)
        raise InputError(f"{name} ids must lie in 0..{vocab_size - 1}; {wrong} does not")


def check_knobs(knobs: Knobs) -> None:
    """Raises InputError for the first knob that is out of range."""
    temperature = knobs.temperature
    expected = {
        "temperature": (
            temperature == 0 or LEAST_TEMPERATURE <= temperature <= _FLOAT32,
            f"0 (greedy), or {LEAST_TEMPERATURE:g}..{_FLOAT32:.2g}",
        ),
        "top_k": (_is_whole(knobs.top_k, 0, _INT32), f"a whole number in 0 (all ids)..{_INT32}"),
        "top_p": (0 < knobs.top_p <= 1, "more than 0 and at most 1"),
        "min_p": (0 <= knobs.min_p <= 1, "0..1"),
        "grammar": (isinstance(knobs.grammar, bool | np.bool_), "True or False"),
    }
    for name in ("max_tokens", "budget", "forbid_from", "forbid_to"):
        good = _is_whole(getattr(knobs, name), 0, _INT32)
        expected[name] = (good, f"a whole number in 0..{_INT32}")
    for name, (good, what) in expected.items():
        if not good:
            raise InputError(f"{name} is {getattr(knobs, name)}, expected {what}")
    for name, bias in knobs.control_bias.items():
        if not (isinstance(bias, numbers.Real) and math.isfinite(bias) and abs(bias) <= MOST_BIAS):
            raise InputError(
                f"control_bias of {name!r} is {bias}, expected a finite number in "
                f"{-MOST_BIAS:g}..{MOST_BIAS:g}; -1e9 says never, 1e9 always"
            )


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that no 32 bits hold: others would share its draws."""
    if not -(2**31) <= seed <= _UINT32:
        raise InputError(f"the seed is {seed}, expected a whole number in {-(2**31)}..{_UINT32}")


def check_drawn(where: str, trace: np.ndarray, logprobs: np.ndarray, num_forced: int) -> None:
    """Raises UserError for a response whose model gave no distribution at one of its ids.

    Args:
      where: what names the response.
      trace: int [E], with a mark of `distribution` where nothing could be drawn.
      logprobs: float [E], NaN for forced ids only.
      num_forced: how many ids of the trace are forced.
    """
    broken = (trace[num_forced:] < 0) | ~np.isfinite(logprobs[num_forced:])
    if not broken.any():
        return
    step = num_forced + int(np.argmax(broken))
    if trace[step] == NONE_LEGAL:
        raise UserError(
            f"{where}, emitted id {step}: the model gives every legal id a logit of -inf, so there "
            "is nothing to draw; let a Program or Mix lower logits by a finite number"
        )
    raise UserError(
        f"{where}, emitted id {step}: the model's logits are not finite (NaN or inf); look for "
        "such numbers in its parameters, or compute in float32"
    )


def _is_whole(value: Any, least: int, most: int) -> bool:
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_integer and least <= int(value) <= most
