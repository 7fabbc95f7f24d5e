"""`rlbf import` and `rlbf export` from the command line:
there and back, and what goes wrong on one line."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.cli import main as cli
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.families import same_model, styled
from rlbf_jax.models.weights.read import read_checkpoint
from rlbf_jax.models.weights.write import write_checkpoint
from rlbf_jax.training.checkpoint import Checkpoints
from rlbf_jax.training.model_folder import load_model
from tests.fakes import init

CONFIG = styled(
    ModelConfig(
        family="gemma2", vocab_size=24, num_layers=3, width=8, num_heads=2, num_kv_heads=1,
        head_dim=4, mlp_width=12, windows=(4, None), dtype="bfloat16", param_dtype="bfloat16",
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "model"
    params = jax.tree.map(lambda x: x + jnp.ones_like(x), init(CONFIG, jax.random.key(0)))
    write_checkpoint(
        folder, CONFIG, params, {"eos_token_id": 1, "bos_token_id": 2}, shard_bytes=1000
    )
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "pytorch_model.bin").write_bytes(b"weights in another format")
    (folder / "rollouts.jsonl").write_text("not part of a checkpoint")
    return folder


def run(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out.strip(), out.err.strip()


def test_import_and_export_are_the_identity(published, tmp_path, capsys):
    code, out, _ = run(capsys, "import", published, tmp_path / "in")
    assert code == 0 and "gemma2, " in out and out.endswith("parameters in bfloat16")
    assert same_model(load_model(tmp_path / "in")[0], CONFIG) == []
    assert (tmp_path / "in" / "model.safetensors").is_file()
    code, out, _ = run(capsys, "export", tmp_path / "in", tmp_path / "out", "--shard_gb", "1e-6")
    assert code == 0
    expected = {
        f.name: f.read_bytes() for f in published.iterdir() if f.suffix not in (".bin", ".jsonl")
    }
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == expected
    assert json.loads(expected["config.json"])["eos_token_id"] == 1 and len(expected) > 5
    assert not list(tmp_path.glob("*.partial"))


def test_numbers_are_converted_when_asked(published, tmp_path, capsys):
    assert run(capsys, "import", published, tmp_path / "in", "--dtype", "float32")[0] == 0
    config, params = load_model(tmp_path / "in")
    assert config.dtype == config.param_dtype == "float32"
    assert {np.dtype(x.dtype) for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_a_stage_without_its_run_is_exported(tmp_path, capsys):
    """Weights alone; with its run around it: tests/runs/test_start.py."""
    config = dataclasses.replace(CONFIG, scan_layers=True)
    params = init(config, jax.random.key(1))
    stage = tmp_path / "run" / "stages" / "sft"
    checkpoints = Checkpoints(stage / "model", writes=True)
    checkpoints.save(0, params, {"stage": "sft", "model": dataclasses.asdict(config)})
    checkpoints.close()
    code, out, _ = run(capsys, "export", stage, tmp_path / "out")
    assert code == 0 and "no tokenizer: there is no run around" in out
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    _, again = read_checkpoint(tmp_path / "out", scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    checkpoints = Checkpoints(tmp_path / "toy" / "model", writes=True)
    checkpoints.save(0, {"a": jnp.ones(2)}, {"model": {"width": "wide", "windows": [None]}})
    checkpoints.close()
    code, _, err = run(capsys, "export", tmp_path / "toy", tmp_path / "none")
    assert (
        code == 2 and "its configuration cannot be read" in err and not (tmp_path / "none").exists()
    )


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (
            ["import", "{nowhere}", "{out}"],
            "config.json: No such file or directory; expected the folder of a Hugging",
        ),
        (
            ["import", "{published}", "{published}"],
            "is there already; choose another folder, or delete it",
        ),
        (
            ["export", "{empty}", "{out}"],
            "no model here; expected a checkpoint (config.json, safetensors) as `rlbf impor",
        ),
        (
            ["export", "{published}", "{out}", "--shard_gb", "0"],
            "--shard_gb is 0.0, expected more than 0",
        ),
        (
            ["export", "{published}", "{out}", "--max_tokens", "0"],
            "--max_tokens is 0, expected 1 or more",
        ),
        (
            ["import", "{published}", "{out}", "--categories", "a,a"],
            "categories must be distinct, non-empty names",
        ),
        (
            ["import", "{published}", "{out}", "--categories", "a"],
            "tokenizer.json: model.vocab is missing; copy the file",
        ),
        (["import", "{published}"], "rlbf import needs"),
        (["import", "{published}", "{out}", "--rules", "reset"], "give --categories with it"),
    ],
)
def test_mistakes_take_one_line(argv, match, published, tmp_path, capsys):
    names = dict(
        nowhere=tmp_path / "nowhere", out=tmp_path / "out", published=published, empty=tmp_path
    )
    code, _, err = run(capsys, *(a.format(**names) for a in argv))
    assert code == 2 and match in err and "\n" not in err
    assert list(tmp_path.iterdir()) == []
