"""Logical axes: what a dimension of an array means, and which axes of the mesh split it.

    weights      embed x heads, embed x mlp, vocab x (whole)
    activations  rows x time x (whole), rows x time x logits
    caches       rows x heads x slots x (whole)

Code says what a dimension is (`constrain(x, "rows", None, None)`), and `LogicalAxes` says where
that lives. Inside a program the mesh is the one that it was traced for (`traced_for`); without a
mesh, or on one device, nothing here changes a program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

AXES = ("slice", "data", "fsdp", "tensor")
Function = TypeVar("Function", bound=Callable)
Name = str | None
"""A logical axis; None: whole on every device."""


@dataclasses.dataclass(frozen=True)
class LogicalAxes:
    """Mesh axes that split a dimension of each kind, the outermost first.

    Raises ValueError for an axis that the mesh does not have, or that one entry names twice.
    """

    rows: tuple[str, ...] = ("slice", "data", "fsdp")
    """Rows of a batch, of activations and of caches."""
    few_rows: tuple[str, ...] = ("slice", "data")
    """Rows of activations whose width is split: where decoding meets weights."""
    embed: tuple[str, ...] = ("fsdp",)
    """Width of the model, of weights."""
    heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor", "fsdp")
    """Ids of a table that is kept."""
    logits: tuple[str, ...] = ("tensor",)
    """Ids of logits, and of a table where it meets all rows of a device."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            axes = getattr(self, field.name)
            if unknown := set(axes) - set(AXES):
                raise ValueError(f"{field.name}: no mesh axis {', '.join(sorted(unknown))}")
            if len(set(axes)) < len(axes):
                raise ValueError(f"{field.name} is {axes}, expected each mesh axis once")

    def spec(
        self, names: Sequence[Name], shape: Sequence[int], mesh: Mesh | AbstractMesh
    ) -> PartitionSpec:
        """The partition of an array whose dimensions are called `names`.

        Of the axes of a dimension as many are used, from the first on, as divide it; axes of one
        device and those that a program holds by hand (`over_rows`) are left out.

        Raises ValueError where two dimensions want one mesh axis, or names do not fit the shape.
        """
        if len(names) != len(shape):
            raise ValueError(f"{len(names)} names for {len(shape)} dimensions")
        wanted = [getattr(self, name) if name else () for name in names]
        every = [axis for axes in wanted for axis in axes]
        if collisions := {axis for axis in every if every.count(axis) > 1}:
            raise ValueError(
                f"dimensions {tuple(names)} collide on mesh axis {', '.join(sorted(collisions))}"
            )
        free = {
            axis
            for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind != AxisType.Manual and mesh.shape[axis] > 1
        }
        return PartitionSpec(
            *(
                divided(tuple(axis for axis in axes if axis in free), size, mesh)
                for axes, size in zip(wanted, shape, strict=True)
            )
        )


def divided(axes: tuple[str, ...], size: int, mesh: Mesh | AbstractMesh) -> Any:
    """The first of `axes` whose devices divide `size`, as an entry of a PartitionSpec."""
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes if len(axes) > 1 else axes[0] if axes else None


def names_of(spec: Iterable[Any]) -> tuple[str, ...]:
    """All mesh axes that a partition (a PartitionSpec, or entries of one) uses."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return tuple(axis for axes in entries for axis in axes)


LOGICAL = LogicalAxes()


def parts_of(name: str, size: int, mesh: Mesh | AbstractMesh | None) -> int:
    """Into so many parts a mesh divides a dimension of so many entries."""
    if mesh is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in names_of(LOGICAL.spec((name,), (size,), mesh)))


# Within programs ----------------------------------------------------------------------------------


def traced_for(mesh: Mesh | AbstractMesh | None, function: Function) -> Function:
    """`function`, inside which `constrain` and `over_rows` know the mesh; to be jitted."""
    if mesh is None or mesh.size == 1:
        return function
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(abstract):
            return function(*args, **kwargs)

    return traced  # type: ignore[return-value]


def current_mesh() -> AbstractMesh | None:
    """The mesh that a program is traced for; None for one device, where nobody said, and for a mesh
    of other axes, as searches have."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.axis_names != AXES or mesh.size == 1 else mesh


def constrain(x: jax.Array, *names: Name) -> jax.Array:
    """`x`, divided as the names of its dimensions say."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, LOGICAL.spec(names, x.shape, mesh))


def over_rows(function: Callable, whole: Any, rows: Any, name: Name = "rows") -> tuple[Any, Any]:
    """`function(whole, rows) -> (per row, sums)`, each device on its own rows.

    Gradients of `whole` and `sums` are added up on each device first and exchanged once, however
    many chunks a function goes through. The function sees a device's rows alone, so that its chunks
    are of a device's size. Other axes (`tensor`) stay the compiler's.

    Args:
      whole: a pytree that every device of the row axes needs all of.
      rows: a pytree of arrays with rows in front.
      name: "few_rows" leaves rows that the axes of weights divide to the compiler.

    Returns:
      what is per row, rows in front; and sums over all rows.
    """
    mesh = current_mesh()
    count = jax.tree.leaves(rows)[0].shape[0]
    axes = () if mesh is None else names_of(LOGICAL.spec((name,), (count,), mesh))
    if not axes:
        return function(whole, rows)

    def local(whole, rows):
        own, sums = function(whole, rows)
        return own, jax.tree.map(lambda x: jax.lax.psum(x, axes), sums)

    split, alike = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        local,
        in_specs=(alike, split),
        out_specs=(split, alike),
        axis_names=set(axes),
        # What comes in whole gets its gradient summed once, where it came in.
        check_vma=False,
    )(whole, rows)
