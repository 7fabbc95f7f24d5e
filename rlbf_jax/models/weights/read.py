"""A published checkpoint folder -> `ModelConfig` and parameters,
tensor by tensor, straight into place.

Every parameter gets one buffer on the host, which its published tensors fill in our axes and dtype;
then it moves to its devices. On CPU the buffer *is* the parameter (it is aligned as JAX wants it),
so the peak is the parameters and the tensor being read; on an accelerator it is the largest
parameter and that tensor.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from rlbf_jax.errors import UserError
from rlbf_jax.gguf_file import is_gguf, open_gguf
from rlbf_jax.models import transformer
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.config_of_gguf import config_of_gguf
from rlbf_jax.models.published_config import config_from_hf
from rlbf_jax.models.weights.mapping import NAMES, Names, Placement, placements
from rlbf_jax.models.weights.of_gguf import tensors_of_gguf
from rlbf_jax.models.weights.rows import TABLES, NewRows
from rlbf_jax.models.weights.tensors import StoredTensor, open_tensors
from rlbf_jax.parallel import hosts
from rlbf_jax.parallel.mesh import make_mesh, shardings
from rlbf_jax.parallel.placing import placed
from rlbf_jax.storage import parse_object

ALIGNMENT = 64
"""Bytes: JAX takes over host memory without a copy where it is so aligned."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, or what a GGUF file says in its place. Raises UserError where there
    is none, or no JSON object in it."""
    if is_gguf(folder):
        return config_of_gguf(open_gguf(folder)).config
    return _read_json(folder / "config.json", "expected the folder of a Hugging Face checkpoint")


def read_checkpoint(
    folder: Path,
    mesh: Mesh | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    scan_layers: bool = False,
    new: NewRows | None = None,
) -> tuple[ModelConfig, dict]:
    """Reads config.json and model.safetensors, or the shards of its index.

    Args:
      folder: of a Hugging Face checkpoint, or a GGUF file.
      mesh: where parameters live, by `parallel.mesh.RULES`; None: the first device.
      dtype: of the parameters and of activations; None: as stored (float16 becomes float32).
      scan_layers: parameters for scanned layers.
      new: rows for control tokens; the tables are read at their final size,
        so this takes no second copy.

    Returns:
      The model and its parameters.

    Raises:
      UserError: naming the field or the tensor that is wrong, missing or unknown,
        before any tensor is read.
    """
    config = config_from_hf(read_config(folder))
    stored = find_tensors(folder)
    if dtype is None:
        dtype = "bfloat16" if {t.code for t in stored.values()} == {"BF16"} else "float32"
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype, scan_layers=scan_layers)
    rows = config.vocab_size
    final = config if new is None else dataclasses.replace(config, vocab_size=new.vocab_size)
    shapes = jax.eval_shape(functools.partial(transformer.init, final), jax.random.key(0))
    leaves = {
        tuple(part.key for part in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    sources = match(config, placements(config, list(leaves)), stored, folder)
    mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
    places = jax.tree.leaves(shardings(shapes, mesh))
    parts: dict[tuple[str, ...], list[Placement]] = collections.defaultdict(list)
    for placement in sources:
        parts[placement.path].append(placement)
    params: dict = {}
    for (path, leaf), place in zip(leaves.items(), places, strict=True):
        # The order of places is that of leaves: both are flattened from the same tree.
        buffer = aligned_empty(leaf.shape, np.dtype(leaf.dtype))
        is_table = path[-1] in TABLES
        _fill(buffer[:rows] if is_table else buffer, [(p, sources[p]) for p in parts[path]])
        if is_table and new is not None:
            new.fill(buffer, rows, path[-1])
        on_devices = (
            placed(buffer, place)
            if hosts.several()
            else jax.device_put(buffer, place, may_alias=True)
        )
        _store(params, path, on_devices)
    return final, params


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Tensors of a checkpoint folder, or a GGUF file, by name. Raises UserError for missing or
    damaged files."""
    if is_gguf(folder):
        return tensors_of_gguf(open_gguf(folder))
    if (folder / SINGLE).is_file():
        return open_tensors(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise UserError(
            f"{folder}: neither {SINGLE} nor {INDEX} here; weights in other formats are not read"
        )
    listed = _read_json(folder / INDEX, "expected the index of the checkpoint").get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(
            f"{folder / INDEX}: weight_map is missing, expected tensor names and their files"
        )
    if outside := [file for file in listed.values() if Path(file).name != file]:
        raise UserError(
            f"{folder / INDEX}: weight_map names {outside[0]!r}, expected files of this folder"
        )
    files = {file: open_tensors(folder / file) for file in sorted(set(listed.values()))}
    for name, file in listed.items():
        if name not in files[file]:
            raise UserError(
                f"{folder / file}: tensor {name} is missing, which {INDEX} says is there; copy it "
                "again"
            )
    return {name: files[file][name] for name, file in listed.items()}


def match(
    config: ModelConfig, expected: list[Placement], stored: Mapping[str, StoredTensor], folder: Path
) -> dict[Placement, StoredTensor]:
    """Which stored tensor is which. Raises UserError for the first that is missing,
    misshapen or unknown."""
    names = NAMES[config.family]
    # A checkpoint of the bare decoder has the same names without the prefix.
    bare = not any(name.startswith(names.prefix) for name in stored)
    found, used = {}, set()
    for placement in expected:
        name = placement.name.removeprefix(names.prefix) if bare else placement.name
        if name not in stored:
            raise UserError(
                f"{folder}: tensor {name} is missing, expected shape {list(placement.shape)}"
            )
        if stored[name].shape != placement.shape:
            raise UserError(
                f"{stored[name].file}: tensor {name} has shape {list(stored[name].shape)}, "
                "expected "
                f"{list(placement.shape)} by config.json"
            )
        stored[name].dtype  # noqa: B018  (raises for numbers that cannot be read)
        found[placement] = stored[name]
        used.add(name)
    constants = names.ignored
    if config.tied_embeddings:
        constants = (*constants, names.head[0])
        _check_one_table(names, found, stored)
    extra = sorted(name for name in stored if name not in used and not name.endswith(constants))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(
            f"{stored[extra[0]].file}: tensor {extra[0]}{more} is unknown to a {config.family} "
            "model"
        )
    return found


def _check_one_table(
    names: Names, found: Mapping[Placement, StoredTensor], stored: Mapping[str, StoredTensor]
) -> None:
    """Tied checkpoints may hold their one table twice, but not two tables.
    Raises UserError, since either of them may be the trained one."""
    table = next(t for p, t in found.items() if p.path == ("embedding",))
    for name, other in stored.items():
        if name.endswith(names.head[0]) and not other.equals(table):
            raise UserError(
                f"{other.file}: tensor {name} differs from {table.name}, which config.json says is "
                "tied to it (tie_word_embeddings); set it to false to keep both, or take the "
                "tensor out"
            )


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array that JAX can take over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT
    return raw[skip : skip + size].view(dtype).reshape(shape)


def _fill(buffer: np.ndarray, parts: list[tuple[Placement, StoredTensor]]) -> None:
    """Fills one parameter from its published tensors, with one of these in memory besides."""
    for placement, tensor in parts:
        if placement.is_whole and tensor.dtype == buffer.dtype:
            tensor.read_into(buffer)
            tensor.check_finite(buffer)
            continue
        stored = tensor.read()
        tensor.check_finite(stored)
        target, source = placement.part(buffer), placement.to_ours(stored)
        if target.dtype == source.dtype == ml_dtypes.bfloat16:
            target, source = (
                target.view(np.uint16),
                source.view(np.uint16),
            )  # numpy moves plain integers faster
        np.copyto(target, source, casting="unsafe")


def _store(tree: dict, path: tuple[str, ...], leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def _read_json(path: Path, expected: str) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {expected}") from error
    return parse_object(content, path, expected)
