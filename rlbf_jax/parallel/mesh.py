"""The mesh (data, fsdp, tensor) and where parameters, optimizer states and batches live on it.

One rule table maps parameter names to axes, big_vision and EasyLM style;
optimizer moments carry the names of their parameters in their paths and so inherit the rule.
An axis that does not divide a dimension is left out.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 on one axis takes what the others leave."""

    data: int = -1
    """Rows of a batch; parameters are copied."""
    fsdp: int = 1
    """Rows of a batch; parameters are split and gathered as needed."""
    tensor: int = 1
    """Heads and MLP columns."""

    def __post_init__(self):
        for axis in AXES:
            size = getattr(self, axis)
            if size < 1 and size != -1:
                raise ValueError(
                    f"{axis} is {size}, expected 1 or more, or -1 for what the other axes leave"
                )


# Last name of a parameter -> axes of its trailing dimensions.
# Leading (scanned) dimensions stay whole.
RULES: dict[str, tuple[str | None, ...]] = {
    "embedding": (None, "fsdp"),
    "unembedding": (None, "fsdp"),
    "qkv": ("fsdp", "tensor", None, None),
    "out": ("tensor", None, "fsdp"),
    "gate_up": ("fsdp", None, "tensor"),
    "up": ("fsdp", "tensor"),
    "down": ("tensor", "fsdp"),
    "position_embedding": (None, "fsdp"),
    "qkv_lora_a": ("fsdp", None),
    "qkv_lora_b": (None, "tensor", None, None),
    "out_lora_a": ("tensor", None, None),
    "out_lora_b": (None, "fsdp"),
    "gate_up_lora_a": ("fsdp", None),
    "gate_up_lora_b": (None, None, "tensor"),
    "up_lora_a": ("fsdp", None),
    "up_lora_b": (None, "tensor"),
    "down_lora_a": ("tensor", None),
    "down_lora_b": (None, "fsdp"),
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
        wanted = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(f"mesh {wanted} does not fit {len(devices)} devices")
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def spec_of(path: tuple, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of one leaf, by the last name in its path that the rules know."""
    names = [getattr(part, "key", getattr(part, "name", None)) for part in path]
    rule = next((RULES[name] for name in reversed(names) if name in RULES), None)
    if rule is None or len(shape) < len(rule):
        return PartitionSpec()
    lead = len(shape) - len(rule)
    axes = [
        axis if axis and shape[lead + i] % mesh.shape[axis] == 0 else None
        for i, axis in enumerate(rule)
    ]
    return PartitionSpec(*[None] * lead, *axes)


def shardings(tree, mesh: Mesh):
    """NamedShardings for a tree of parameters, optimizer states or a whole train state
    (arrays or shapes)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path, np.shape(leaf), mesh)), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def row_shards(mesh: Mesh) -> int:
    """Into so many parts `batch_sharding` divides rows."""
    return int(mesh.shape["data"] * mesh.shape["fsdp"])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
