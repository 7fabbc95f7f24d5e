"""Look-ups in a table whose rows are divided among devices."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from rlbf_jax.parallel.axes import LOGICAL, constrain, current_mesh, names_of


def look_up(table: Float[Array, "V D"], ids: Int[Array, "*shape"], dtype) -> Array:
    """[..., D] in `dtype`: rows of a table.

    Devices find what they hold, and add up: ids divided as batches are meet a table that is divided
    over `tensor` alone; few ids (less than a device has rows of the table, as of decoding) come to
    a table that stays where it is kept, for less is moved so.
    """
    mesh = current_mesh()
    if mesh is None:
        return jnp.take(table, ids, axis=0).astype(dtype)
    parts = math.prod(mesh.shape[axis] for axis in LOGICAL.vocab)
    few = ids.size * parts < table.shape[0]
    kept, rows = ("vocab", "few_rows") if few else ("logits", "rows")
    table = constrain(table, kept, None)
    held = LOGICAL.spec((kept,), table.shape[:1], mesh)
    split = LOGICAL.spec((rows,), ids.shape[:1], mesh)
    axes, others = names_of(held), names_of(split)
    if not axes:
        return jnp.take(table, ids, axis=0).astype(dtype)

    def local(part: Array, number: Array, ids: Array) -> Array:
        place = ids - number[0]
        here = (place >= 0) & (place < part.shape[0])
        found = jnp.take(part, jnp.where(here, place, 0), axis=0).astype(jnp.float32)
        # Exact in any type; XLA on CPU cannot compile such a sum of bfloat16.
        return jax.lax.psum(jnp.where(here[..., None], found, 0), axes).astype(dtype)

    return jax.shard_map(
        local, in_specs=(held, held, split), out_specs=split, axis_names={*axes, *others}
    )(table, jnp.arange(table.shape[0], dtype=ids.dtype), ids)


def pick(x: Float[Array, "*shape V"], ids: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The number of each id out of a row of one an id (logits, log-probabilities).

    Where these are divided among devices it is a sum over what each holds: a look-up would bring
    them together first.
    """
    if current_mesh() is None:
        return jnp.take_along_axis(x, ids[..., None], axis=-1)[..., 0]
    hit = jnp.arange(x.shape[-1], dtype=ids.dtype) == ids[..., None]
    return jnp.sum(jnp.where(hit, x, 0), axis=-1)
