"""One of our own models as a critic or judge: loaded from its folder and asked here,
no endpoint takes part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlbf_jax.critics.language.answerers import ModelAnswerer
from rlbf_jax.critics.language.http_critic import HttpCriticConfig, judge_format
from rlbf_jax.critics.language.language_model import LanguageModelCritic
from rlbf_jax.errors import UserError
from rlbf_jax.runs.checkpoint_policy import open_model
from rlbf_jax.sampling.sampler import SamplerConfig

BATCH = 8
"""Texts that a model is asked about at once."""


def is_model(folder: Path) -> bool:
    """Whether a folder looks like RUN/stages/STAGE or a checkpoint."""
    return (folder / "model").is_dir() or (folder / "config.json").is_file()


def check_model(folder: str | Path, option: str) -> None:
    """Raises UserError where there is no model, before one is loaded."""
    if not is_model(Path(folder)):
        raise UserError(
            f"{option} {folder}: no model here; expected RUN/stages/STAGE, or the folder of a "
            "checkpoint"
        )


def model_critic(
    folder: str | Path,
    config: HttpCriticConfig,
    categories: Sequence[str],
    option: str,
    settings: str,
    max_unjudged: float = 1.0,
) -> LanguageModelCritic:
    """A model's folder as a critic, on one device.

    Args:
      folder: RUN/stages/STAGE, or a checkpoint as published or as `rlbf import` writes it.
      config: `format` and what belongs to it count: `threshold`, `guidelines`,
        `max_answer_tokens`, `category_names`.
      categories: kinds of violation, for the format minimal_edit.
      option: names the folder, for messages.
      settings: the option that holds `config`, for messages.
      max_unjudged: see `LanguageModelCritic`.

    Raises UserError for a folder that cannot be used, or for `server_template`,
    as no server renders anything.
    """
    if config.server_template:
        raise UserError(
            f"server_template is set, but {option} names a model's folder: no server is asked"
        )
    check_model(folder, option)
    model, form = open_model(folder), judge_format(config, categories)
    shapes = SamplerConfig(
        batch_size=BATCH, min_room=form.max_tokens, bucket=128, max_context=model.max_length
    )
    policy = model.policy
    answerer = ModelAnswerer(policy.sampler(shapes), policy.params, policy.name)
    return LanguageModelCritic(answerer, form, max_unjudged=max_unjudged, option=settings)
