"""`ModelConfig` and parameters -> a Hugging Face checkpoint folder:
config.json and safetensors, byte-stable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlbf_jax.errors import UserError
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.published_config import config_to_hf
from rlbf_jax.models.weights.mapping import Placement, placements
from rlbf_jax.models.weights.read import INDEX, SINGLE
from rlbf_jax.models.weights.tensors import TensorToWrite, write_tensors
from rlbf_jax.storage import write_whole

SHARD_BYTES = 5 << 30
"""Most bytes of tensors in one file, as transformers has it
(a larger tensor has a file of its own)."""


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes what `read_checkpoint` reads: reading it gives the same numbers again.

    Args:
      folder: made if missing. config.json is written last, so a folder that has one is whole.
      config: of a published family.
      params: of `config`, in float32 or bfloat16, on any devices.
      extra: further fields of config.json, such as token ids.
      shard_bytes: most bytes of tensors in one file.

    Raises:
      UserError: the family cannot say what `config` says (before anything is written),
        or the folder has weights.
    """
    hf = {**config_to_hf(config), **(extra or {})}
    if folder.is_dir() and (
        old := [f.name for f in folder.iterdir() if f.name.startswith("model")]
    ):
        raise UserError(f"{folder}: has {sorted(old)[0]} already; choose another folder")
    leaves = {
        tuple(part.key for part in path): x
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    order = sorted(placements(config, list(leaves)), key=lambda p: p.name)
    tensors = [_tensor(p, leaves[p.path]) for p in order]
    folder.mkdir(parents=True, exist_ok=True)
    shards = split(tensors, shard_bytes)
    if len(shards) == 1:
        write_tensors(folder / SINGLE, shards[0])
    else:
        listed: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_tensors(folder / name, shard)
            listed |= {tensor.name: name for tensor in shard}
        index = {"metadata": {"total_size": sum(t.size for t in tensors)}, "weight_map": listed}
        write_whole(folder / INDEX, json.dumps(index, indent=2) + "\n")
    write_whole(
        folder / "config.json", json.dumps(hf, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    )


def split(tensors: list[TensorToWrite], shard_bytes: int) -> list[list[TensorToWrite]]:
    """Consecutive shards of at most `shard_bytes`, each of at least one tensor."""
    shards: list[list[TensorToWrite]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    return shards


def _tensor(placement: Placement, leaf: Any) -> TensorToWrite:
    def make() -> np.ndarray:
        return placement.to_theirs(np.asarray(jax.device_get(placement.part(leaf))))

    return TensorToWrite(placement.name, placement.shape, np.dtype(leaf.dtype), make)
