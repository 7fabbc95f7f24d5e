"""Run by `test_programs.py` in a process with 8 virtual devices: compiles the programs of training
and sampling for meshes, runs none, and prints facts of their texts as JSON.

    programs_child.py [control]

With `control` nothing is constrained inside programs, as if models knew no mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from unittest import mock

import jax
import jax.numpy as jnp

from rlbf_jax.directives import BacktrackRule, Limits, Semantics
from rlbf_jax.models import transformer
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.parallel.compiled import collectives, dots
from rlbf_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh, shardings
from rlbf_jax.sampling import loop
from rlbf_jax.sampling.distribution import Truncation
from rlbf_jax.sampling.program import Single
from rlbf_jax.sampling.scoring import Traces
from rlbf_jax.sampling.state import Batch, Contexts
from rlbf_jax.training import state
from rlbf_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlbf_jax.training.policy import (
    Measured,
    PolicyBatch,
    PolicyConfig,
    PolicyGradient,
    init_policy,
)
from rlbf_jax.training.state import init_state, jit_update
from rlbf_jax.training.supervised import Rows, supervised_objective

V, D, ROWS, TIME, DRAWN, GUIDANCE, PACKED = 4160, 32, 16, 40, 28, 24, 64
"""No two products of these are alike: shapes tell what they are of."""
RULE = BacktrackRule(4000, ("a", "b"), (), 12)
MODEL = ModelConfig(
    vocab_size=V, num_layers=2, width=D, num_heads=8, num_kv_heads=8, head_dim=8,
    mlp_width=88, tied_embeddings=False, scan_layers=True, remat="block",
)  # fmt: skip
INT, REAL = jnp.int32, jnp.float32
S = jax.ShapeDtypeStruct


def rows_of(count: int, time: int) -> Rows:
    return Rows(*(S((count, time), d) for d in (INT, INT, bool, bool)))


def limits_of(count: int) -> Limits:
    return Limits(*[S((count,), INT)] * 4, S((count,), bool))


def policy_batch() -> PolicyBatch:
    row, real = S((ROWS,), INT), S((ROWS, TIME), REAL)
    traces = Traces(
        S((ROWS, TIME), INT), row, row, row, limits_of(ROWS), S((ROWS,), REAL),
        S((ROWS, RULE.num_controls), REAL),
    )  # fmt: skip
    measured = Measured(*[real] * 5, S((ROWS, TIME), bool))
    return PolicyBatch(traces, measured, rows_of(GUIDANCE, TIME))


def update_text(mesh, objective, params, batch, accumulate: int = 1):
    optimizer = make_optimizer(OptimizerConfig(), 10, name="x")
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    update = jit_update(
        objective.terms, objective.denominators, objective.weights, optimizer, mesh, shapes,
        accumulate,
    )  # fmt: skip
    return update.lower(shapes, {}, batch).compile()


def params_of() -> dict:
    return jax.eval_shape(lambda: transformer.init(MODEL, jax.random.key(0)))


def exchanged(text: str) -> list[dict]:
    return [
        {
            "kind": c.kind,
            "dims": [list(shape.dims) for shape in c.shapes],
            "trips": c.trips,
            "where": c.where,
            "bytes": c.bytes,
        }
        for c in collectives(text)
    ]


def supervised(sizes, accumulate: int = 1) -> dict:
    devices = jax.devices()[: math.prod(sizes)]
    mesh = make_mesh(MeshConfig(*sizes), devices)
    objective = supervised_objective(MODEL, RULE, Semantics.KEEP)
    program = update_text(mesh, objective, params_of(), rows_of(PACKED, TIME), accumulate)
    text = program.as_text()
    return {
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "flops": sum((dot.flops or 0) * (dot.trips or 1) for dot in dots(text)),
        "collectives": exchanged(text),
    }


def reinforcement(sizes) -> dict:
    mesh = make_mesh(MeshConfig(*sizes))
    gradient = PolicyGradient(
        MODEL, RULE, Semantics.REWIND, PolicyConfig(algorithm="grpo", max_drawn=DRAWN)
    )
    params = jax.eval_shape(lambda p: init_policy(p, MODEL, jax.random.key(1)), params_of())
    text = update_text(mesh, gradient.objective, params, policy_batch()).as_text()
    return {"collectives": exchanged(text)}


def sampling(sizes) -> dict:
    """One id a turn, for all rows."""
    mesh = make_mesh(MeshConfig(*sizes))
    model = dataclasses.replace(MODEL, scan_layers=False)
    params = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    params = placed(params, shardings(params, mesh))
    rows = batch_sharding(mesh)

    def row(dtype, *more):
        return S((ROWS, *more), dtype, sharding=rows)

    limits = jax.tree.map(lambda x: S(x.shape, x.dtype, sharding=rows), limits_of(ROWS))
    batch = Batch(
        row(INT), row(jnp.uint32), limits, row(REAL), Truncation(row(INT), row(REAL), row(REAL)),
        row(REAL, RULE.num_controls), row(INT, 1),
    )  # fmt: skip
    told = dict(program=Single(model), rule=RULE, semantics=Semantics.KEEP, mesh=mesh.abstract_mesh)
    shape = dict(capacity=76, rewound=0)
    contexts = Contexts(row(INT, 24), row(INT), row(INT))
    begin = loop.begin.lower(params, contexts, **told, **shape).compile()
    begun = jax.eval_shape(lambda p, c: loop.begin(p, c, **told, **shape), params, contexts)
    begun = placed(begun, begin.output_shardings)
    idle = loop.idle.lower(begun, rows=ROWS, mesh=mesh.abstract_mesh).compile()
    held = jax.eval_shape(lambda x: loop.idle(x, rows=ROWS, mesh=mesh.abstract_mesh), begun)
    held = placed(held, idle.output_shardings)
    key = jax.eval_shape(lambda: jax.random.key(0))
    go_on = loop.go_on.lower(params, batch, held, key, ROWS, 48, **told, one_hot=False).compile()
    return {
        "cache": [list(x.sharding.shard_shape(x.shape)) for x in held.cache.key],
        "stays": [x.spec for x in jax.tree.leaves(go_on.output_shardings)]
        == [x.sharding.spec for x in jax.tree.leaves(held)],
        "collectives": exchanged(go_on.as_text()),
    }


def placed(shapes, places):
    return jax.tree.map(lambda x, to: S(x.shape, x.dtype, sharding=to), shapes, places)


@contextlib.contextmanager
def knowing_no_mesh():
    """Programs are traced as on one device, microbatches are neighbors: the compiler alone
    divides them."""

    def neighbors(rows, accumulate):
        return rows.reshape(accumulate, rows.shape[0] // accumulate, *rows.shape[1:])

    with (
        mock.patch.object(state, "traced_for", lambda mesh, function: function),
        mock.patch.object(state, "_dealt", neighbors),
    ):
        yield


DATA, FSDP, ALL = (8, 1, 1), (1, 8, 1), (2, 2, 2)


def main(control: bool) -> None:
    with knowing_no_mesh() if control else contextlib.nullcontext():
        facts = {
            "data": supervised(DATA),
            "data in 4": supervised(DATA, 4),
            "fsdp": supervised(FSDP),
            "policy on data": reinforcement(DATA),
        }
    if not control:
        facts |= {
            "alone": supervised((1, 1, 1)),
            "policy on fsdp": reinforcement(FSDP),
            "policy on all": reinforcement(ALL),
            "sampling on fsdp": sampling(FSDP),
            "sampling on all": sampling(ALL),
        }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1:] == ["control"])
