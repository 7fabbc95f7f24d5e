"""Whether text, shapes and batches fit each other, found out before the training that they would
break."""

from __future__ import annotations

from collections.abc import Mapping

from rlbf_jax.errors import UserError
from rlbf_jax.runs.experiment import ExperimentConfig
from rlbf_jax.runs.workspace import Workspace
from rlbf_jax.training.reinforcement import PromptSource

CHECKED_ROLLOUTS = 200
"""Rollouts that are drawn to see whether prompts and attacks fit."""


def check_fit(work: Workspace, source: PromptSource) -> None:
    """Fails before the training, and not after it, where prompts or attacks do not fit into the
    configured shapes.

    Raises:
        UserError: an attack of the evaluation or of the rollouts finds nothing that fits, or a
            prompt and its response may have more ids than the buffer of a rollout.
    """
    _ = work.attempts
    steps = -(-CHECKED_ROLLOUTS // work.config.reinforcement.prompts_per_step)
    try:
        requests = [rollout.request for step in range(steps) for rollout in source(step)]
    except ValueError as error:
        raise UserError(
            f"rollouts: {error} (knobs.max_tokens of rollouts is --rollout_tokens; an attack's "
            "other options are those "
            "of --evaluation)"
        ) from error
    width = work.config.max_prompt + work.config.rollout_tokens
    sizes = [
        len(work.tokenizer.encode_prompt(request.prompt)) + request.knobs.max_tokens
        for request in requests
    ]
    if max(sizes) > width:
        prompt = requests[sizes.index(max(sizes))].prompt
        raise UserError(
            f"max_prompt + rollout_tokens is {width}, but a rollout of {prompt!r} may take "
            f"{max(sizes)} ids; "
            f"set --max_prompt {work.config.max_prompt + max(sizes) - width} or more"
        )


def check_rows_suffice(config: ExperimentConfig, rows: Mapping[str, int]) -> None:
    """Raises UserError where a data set has fewer rows than one batch of a stage that trains on it."""
    needs = [
        ("bsafe_plus", "sft.batch_size", config.sft.batch_size),
        (
            "bsafe_plus",
            "reinforcement.guidance_batch_size",
            config.reinforcement.guidance_batch_size,
        ),
    ]
    if not config.start_from:
        needs.insert(0, ("pretraining", "pretraining.batch_size", config.pretraining.batch_size))
    if config.baselines:
        needs.append(("refusal", "refusal_sft.batch_size", config.refusal_sft.batch_size))
    counts = {
        "pretraining": "pretraining_examples",
        "bsafe_plus": "sft_examples",
        "refusal": "refusal_examples",
    }
    for name, field, size in needs:
        if rows[name] < size:
            raise UserError(
                f"{field} is {size}, but the data set {name} has {rows[name]} rows; raise "
                f"data.{counts[name]}"
            )
