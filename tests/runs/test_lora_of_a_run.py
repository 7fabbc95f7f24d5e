"""A run whose later stages train adapters: what it keeps, and that every reader merges them."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from rlbf_jax.cli import main as cli
from rlbf_jax.errors import UserError
from rlbf_jax.models import lora
from rlbf_jax.models.config import LoraConfig
from rlbf_jax.runs import execute
from rlbf_jax.runs.load import load, open_run
from rlbf_jax.training.model_folder import load_model
from tests.training.tiny_experiment import get_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = get_config()
    model = dataclasses.replace(
        config.base.model, family="llama", lora=LoraConfig(rank=2, targets=("qkv", "up"))
    )
    folder = tmp_path_factory.mktemp("lora") / "run"
    execute.run(config.replace(model=model), folder)
    return folder


def trainable(opened, stage: str) -> dict:
    """What a stage after this one would train."""
    e = opened.experiment
    return opened.run.trainable(stage, e.base.model.lora, opened.run.rule(e.rule))


def leaves(tree) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_stages_after_base_keep_adapters_alone(finished):
    opened = open_run(finished)
    base = leaves(opened.policy("base").params)
    assert not any("lora" in name for name in base)
    for stage in ("sft", "rlbf"):
        adapters, frozen = map(leaves, lora.split(trainable(opened, stage)))
        assert {name.split("'")[-2] for name in adapters} == {
            "qkv_lora_a", "qkv_lora_b", "gate_up_lora_a", "gate_up_lora_b", "embedding_rows",
        }  # fmt: skip
        assert all(np.array_equal(frozen[name], base[name]) for name in base)
        kept = json.loads(
            (finished / "stages" / stage / "model" / "0" / "checksums.json").read_text()
        )
        whole = json.loads(
            (finished / "stages" / "base" / "model" / "0" / "checksums.json").read_text()
        )
        assert sum(size for size, _ in kept.values()) < sum(size for size, _ in whole.values())


def test_stages_go_on_from_the_adapters_before_them(finished):
    opened = open_run(finished)
    fresh, sft, rlbf = (
        leaves(lora.split(trainable(opened, stage))[0]) for stage in ("base", "sft", "rlbf")
    )
    b = [name for name in fresh if name.endswith("_lora_b']") or "rows" in name]
    assert all(not fresh[name].any() and sft[name].any() for name in b)
    # Reinforcement makes 5 small updates from what SFT has left.
    moved = max(np.abs(rlbf[name] - sft[name]).max() for name in b)
    assert 0 < moved < max(np.abs(sft[name]).max() for name in b)


def test_every_reader_merges(finished, tmp_path):
    opened = open_run(finished)
    expected = leaves(opened.policy("rlbf").params)
    config, params = load_model(finished / "stages" / "rlbf")
    assert config == opened.run.model and config.lora.rank == 0
    assert cli.main(["export", str(finished / "stages" / "rlbf"), str(tmp_path / "out")]) == 0
    _, exported = load_model(tmp_path / "out")
    for found in (leaves(params), leaves(exported)):
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert load(finished).program.config == config


def test_a_stage_without_its_base_says_so(finished, tmp_path):
    for part in ("manifest.json", "tokenizer", "stages"):
        (tmp_path / part).symlink_to(finished / part)
    opened = open_run(tmp_path)
    (tmp_path / "stages").unlink()
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "sft").symlink_to(finished / "stages" / "sft")
    with pytest.raises(UserError, match="no finished stage 'base'"):
        opened.policy("sft")
