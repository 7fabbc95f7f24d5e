"""Run by `test_compiled.py` in a process with 8 virtual devices: texts of small compiled programs
as one JSON object."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

P = PartitionSpec
MESH = Mesh(np.array(jax.devices()).reshape(2, 4), ("rows", "columns"))


def placed(shape, *axes):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, P(*axes)))


def kept(x, *axes):
    return jax.lax.with_sharding_constraint(x, NamedSharding(MESH, P(*axes)))


def nested(x, w):
    """5 turns of 3 products whose sums meet over 4 devices."""

    def outer(x, _):
        def inner(x, _):
            return jnp.tanh(kept(x @ w, "rows", "columns")), None

        x, _ = jax.lax.scan(inner, x, None, length=3)
        return x, None

    return jax.lax.scan(outer, x, None, length=5)[0]


def endless(x, n):
    """A loop whose end the data decide; a scan of 7 in it."""

    def turn(at):
        x, _ = jax.lax.scan(
            lambda x, _: (kept(jnp.sin(x), None, None), None), at[1], None, length=7
        )
        return at[0] + 1, kept(x, "rows", "columns")

    return jax.lax.while_loop(lambda at: at[0] < n, turn, (0, x))


def gathered(x):
    """One all-gather of 8 x 16 over 8 devices, outside of any loop."""
    return kept(kept(x, ("rows", "columns")) * 2, None)


def branched(x, yes):
    return jax.lax.cond(yes, lambda x: kept(x, None) * 1.0, lambda x: x * 2.0, x)


def text(f, *shapes):
    return jax.jit(f).lower(*shapes).compile().as_text()


print(
    json.dumps(
        {
            "nested": text(
                nested, placed((8, 16), "rows", "columns"), placed((16, 16), "columns", None)
            ),
            "endless": text(
                endless, placed((8, 16), "rows", "columns"), jax.ShapeDtypeStruct((), jnp.int32)
            ),
            "gathered": text(gathered, placed((8, 16), ("rows", "columns"))),
            "branched": text(
                branched,
                placed((8, 16), ("rows", "columns")),
                jax.ShapeDtypeStruct((), jnp.bool),
            ),
        }
    )
)
