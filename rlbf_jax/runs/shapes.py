"""Whether the configured shapes fit each other, the mesh and the model: known before anything is
made."""

from __future__ import annotations

from rlbf_jax.errors import UserError
from rlbf_jax.models.attention import QUERY_BLOCK
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.families import styled
from rlbf_jax.runs.experiment import ExperimentConfig


def check_rows(config: ExperimentConfig, shards: int, model: ModelConfig | None = None) -> None:
    """Raises UserError where a batch does not divide over the mesh's row shards and its
    microbatches, or where rows have a length that attention cannot cut into blocks."""
    rl = config.reinforcement
    sizes = {
        f"{name}.batch_size": (stage.batch_size, stage.accumulate)
        for name, stage in (
            ("pretraining", config.pretraining),
            ("refusal_sft", config.refusal_sft),
            ("sft", config.sft),
        )
    }
    if config.start_from:
        del sizes["pretraining.batch_size"]
    sizes["reinforcement.prompts_per_step x group_size"] = (
        rl.prompts_per_step * rl.group_size,
        rl.accumulate,
    )
    sizes["reinforcement.guidance_batch_size"] = (rl.guidance_batch_size, rl.accumulate)
    sizes["sampling_batch"] = (config.sampling_batch, 1)
    widths = {
        "data.row_length": config.data.row_length,
        "max_prompt + rollout_tokens": config.max_prompt + config.rollout_tokens,
    }
    model = styled(config.model) if model is None else model
    asked = {
        "max_prompt + evaluation.knobs.max_tokens": config.max_prompt
        + config.evaluation.knobs.max_tokens
    }
    for name, width in (widths | asked).items():
        if (
            model.learned_positions
            and model.max_positions is not None
            and width > model.max_positions
        ):
            raise UserError(
                f"{name}: {width} ids; the model has {model.max_positions} positions "
                "(model.max_positions)"
            )
        if name in widths and width > QUERY_BLOCK and width % QUERY_BLOCK:
            raise UserError(
                f"{name}: {width} ids; rows longer than {QUERY_BLOCK} must be a multiple of it"
            )
    for name, (rows, accumulate) in sizes.items():
        if rows % (shards * accumulate):
            raise UserError(
                f"{name}: {rows} rows do not divide into {shards} shards (mesh data x fsdp) of "
                f"{accumulate} "
                f"microbatches; choose a multiple of {shards * accumulate}"
            )
