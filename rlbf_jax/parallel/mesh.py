"""The mesh (slice, data, fsdp, tensor) and where parameters, optimizer states and batches live.

One rule table says what the dimensions of each parameter mean, big_vision and EasyLM style, and
`axes.LogicalAxes` which mesh axes split them; optimizer moments carry the names of their parameters
in their paths and so inherit the rule. An axis that does not divide a dimension is left out.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlbf_jax.parallel.axes import AXES, LOGICAL, Name


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 on one axis takes what the others leave."""

    data: int = -1
    """Rows of a batch; parameters are copied."""
    fsdp: int = 1
    """Rows of a batch; parameters are split and gathered as needed."""
    tensor: int = 1
    """Heads, MLP columns and the vocabulary."""
    slice: int = 1
    """Slices of a pod (or nodes) that a slower network joins: rows of a batch; parameters are
    copied."""

    def __post_init__(self):
        for axis in AXES:
            size = getattr(self, axis)
            if size < 1 and size != -1:
                raise ValueError(
                    f"{axis} is {size}, expected 1 or more, or -1 for what the other axes leave"
                )


# Last name of a parameter -> what its trailing dimensions are.
# Leading (scanned) dimensions stay whole.
RULES: dict[str, tuple[Name, ...]] = {
    "embedding": ("vocab", None),
    "unembedding": ("vocab", None),
    "qkv": ("embed", "heads", None, None),
    "out": ("heads", None, "embed"),
    "gate_up": ("embed", None, "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "position_embedding": (None, "embed"),
    "qkv_lora_a": ("embed", None),
    "qkv_lora_b": (None, "heads", None, None),
    "out_lora_a": ("heads", None, None),
    "out_lora_b": (None, "embed"),
    "gate_up_lora_a": ("embed", None),
    "gate_up_lora_b": (None, None, "mlp"),
    "up_lora_a": ("embed", None),
    "up_lora_b": (None, "mlp"),
    "down_lora_a": ("mlp", None),
    "down_lora_b": (None, "embed"),
}


def make_mesh(config: MeshConfig = MeshConfig(), devices: list | None = None) -> Mesh:
    """A mesh over `devices` (all by default).
    Raises ValueError if the axes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    if sizes.count(-1) > 1:
        raise ValueError("at most one mesh axis may be -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        named = zip(AXES, sizes, strict=True)
        wanted = " x ".join(f"{a}={size}" for a, size in named if a != "slice" or size != 1)
        raise ValueError(f"mesh {wanted} does not fit {len(devices)} devices")
    return Mesh(_arranged(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(devices: list, sizes: list[int]) -> np.ndarray:
    """Devices in the order of the mesh: on a TPU neighbors of an axis are neighbors in the torus,
    and only the axis `slice` leaves a slice."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    within = [1, *sizes[1:]]
    if sizes[0] == 1:
        return mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        within,
        [sizes[0]] + [1] * (len(sizes) - 1),
        devices=devices,
        allow_split_physical_axes=True,
    )


def spec_of(path: tuple, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of one leaf, by the last name in its path that the rules know."""
    names = [getattr(part, "key", getattr(part, "name", None)) for part in path]
    rule = next((RULES[name] for name in reversed(names) if name in RULES), None)
    if rule is None or len(shape) < len(rule):
        return PartitionSpec()
    lead = len(shape) - len(rule)
    return LOGICAL.spec((None,) * lead + rule, shape, mesh)


def shardings(tree, mesh: Mesh):
    """NamedShardings for a tree of parameters, optimizer states or a whole train state
    (arrays or shapes)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path, np.shape(leaf), mesh)), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over slice, data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL.rows))


def row_shards(mesh: Mesh) -> int:
    """Into so many parts `batch_sharding` divides rows."""
    return math.prod(mesh.shape[axis] for axis in LOGICAL.rows)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
