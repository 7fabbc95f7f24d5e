"""Shapes that do not fit the mesh, the model or the data."""

import types

import pytest

from rlbf_jax.errors import UserError
from rlbf_jax.models.attention import QUERY_BLOCK
from rlbf_jax.models.config import LoraConfig, ModelConfig
from rlbf_jax.models.families import styled
from rlbf_jax.runs.shapes import check_precision, check_rows, check_rows_suffice, check_width

LEARNED = styled(ModelConfig(family="gpt2", max_positions=100))


def mesh(data, fsdp):
    return types.SimpleNamespace(shape={"slice": 1, "data": data, "fsdp": fsdp, "tensor": 2})


@pytest.mark.parametrize("rows", range(1, 49))
def test_rows_divide_over_shards_and_microbatches(rows):
    fits = rows % 2 == 0 and rows // 2 % 3 == 0 and rows // 6 % 4 == 0
    if fits:
        check_rows("batch", rows, mesh(2, 3), 4)
    else:
        with pytest.raises(UserError, match=f"batch: {rows} rows .*choose a multiple of 24"):
            check_rows("batch", rows, mesh(2, 3), 4)


def test_widths():
    free = ModelConfig()
    for width in (1, QUERY_BLOCK, 2 * QUERY_BLOCK):
        check_width("row", width, free)
    with pytest.raises(UserError, match=f"row: {QUERY_BLOCK + 1} ids; .* a multiple of it"):
        check_width("row", QUERY_BLOCK + 1, free)
    check_width("row", QUERY_BLOCK + 1, free, in_blocks=False)
    check_width("row", 100, LEARNED)
    for in_blocks in (True, False):
        with pytest.raises(UserError, match="row: 101 ids; the model has 100 positions"):
            check_width("row", 101, LEARNED, in_blocks)


def test_data_sets_have_a_batch():
    check_rows_suffice("sft.batch_size", 8, "bsafe_plus", 8, "sft_examples")
    with pytest.raises(
        UserError, match="sft.batch_size is 8, but .*bsafe_plus has 7 rows; raise s"
    ):
        check_rows_suffice("sft.batch_size", 8, "bsafe_plus", 7, "sft_examples")


def test_whole_models_are_not_trained_in_half_precision():
    """Adapters are: they have float32 of their own."""
    half = ModelConfig(dtype="bfloat16", param_dtype="bfloat16")
    with pytest.raises(UserError, match="--model.param_dtype float32 .* --model.lora.rank 16"):
        check_precision(half, LoraConfig())
    check_precision(half, LoraConfig(rank=4))
    check_precision(ModelConfig(dtype="bfloat16"), LoraConfig())
