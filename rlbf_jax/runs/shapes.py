"""Whether configured shapes fit the mesh and the model: known before anything is made."""

from __future__ import annotations

from jax.sharding import Mesh

from rlbf_jax.errors import UserError
from rlbf_jax.models.attention import QUERY_BLOCK
from rlbf_jax.models.config import LoraConfig, ModelConfig
from rlbf_jax.parallel.mesh import row_shards


def check_rows(name: str, rows: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError for a batch that the mesh's row shards and microbatches do not divide."""
    shards = row_shards(mesh)
    if rows % (shards * accumulate):
        raise UserError(
            f"{name}: {rows} rows do not divide into {shards} shards (mesh slice x data x fsdp) of "
            f"{accumulate} microbatches; choose a multiple of {shards * accumulate}"
        )


def check_width(name: str, width: int, model: ModelConfig, in_blocks: bool = True) -> None:
    """Raises UserError where rows are longer than the model's positions or, with `in_blocks`, of a
    length that attention cannot cut into blocks."""
    positions = model.max_positions
    if model.learned_positions and positions is not None and width > positions:
        raise UserError(
            f"{name}: {width} ids; the model has {positions} positions (model.max_positions)"
        )
    if in_blocks and width > QUERY_BLOCK and width % QUERY_BLOCK:
        raise UserError(
            f"{name}: {width} ids; rows longer than {QUERY_BLOCK} must be a multiple of it"
        )


def check_precision(model: ModelConfig, lora: LoraConfig) -> None:
    """Raises UserError where a whole model would be trained in half precision: an update of 2e-5
    is lost in the 8 bits of a bfloat16 of order 1, so it would hardly learn."""
    if model.param_dtype != "float32" and not lora.rank:
        raise UserError(
            f"model.param_dtype: all parameters are trained, and updates are lost in "
            f"{model.param_dtype}; set --model.param_dtype float32 (products are as fast with "
            "--model.dtype bfloat16), or train adapters alone with --model.lora.rank 16"
        )


def check_rows_suffice(flag: str, batch_size: int, dataset: str, rows: int, mend: str) -> None:
    """Raises UserError where a data set has fewer rows than one batch.

    `mend`: the flag that makes the data set larger.
    """
    if rows < batch_size:
        raise UserError(
            f"{flag} is {batch_size}, but the data set {dataset} has {rows} rows; raise {mend}"
        )
