"""Memory of every phase of training, as the compiler plans it: nothing is allocated,
so a laptop can ask about 8B.

Command: python experiments/benchmarks/memory.py --model
  llama32_1b --batch 8 --length 2048 --dtype bfloat16

Each phase is lowered from shapes and compiled for the backend at hand, the way the trainers do it:
same functions, same donation. Bytes are those of `memory_analysis()`: arguments (parameters,
optimizer, batch), temporaries (activations, gradients), outputs, and what of them takes the place
of a donated argument. On CPU the temporaries are the CPU compiler's: it widens bfloat16 products to
float32 (copies of weights included) and orders work otherwise than a GPU's or TPU's does, so
compare rows of one table, and take arguments and outputs as exact.

With `--topology v5p:2x2x1` a TPU's own compiler plans instead, for the first fsdp x tensor devices
of that slice, and without any: `pip install "jax[tpu]"` on a Linux machine is enough. Bytes are
then those of one device. Nothing runs, and what a GPU would take is not said.

`rlbf plan FILE` says the same, and more, of an experiment; this page asks about one shape.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import time
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

from rlbf_jax.directives import BacktrackRule, Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.models import lora, transformer
from rlbf_jax.models.attention import QUERY_BLOCK
from rlbf_jax.models.config import LoraConfig, ModelConfig, Remat
from rlbf_jax.models.presets import PRESETS
from rlbf_jax.parallel.backend import compiling_for
from rlbf_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh, replicated, shardings
from rlbf_jax.planning import shapes
from rlbf_jax.planning.forecast import memory_of
from rlbf_jax.planning.phases import lowered_update
from rlbf_jax.planning.topology import topology
from rlbf_jax.sampling import loop
from rlbf_jax.sampling.distribution import Truncation
from rlbf_jax.sampling.program import Single
from rlbf_jax.sampling.scoring import Traces, score
from rlbf_jax.sampling.state import Batch, Contexts
from rlbf_jax.training.learner import Objective
from rlbf_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlbf_jax.training.policy import (
    Measured,
    PolicyBatch,
    PolicyConfig,
    PolicyGradient,
    init_policy,
    measure,
)
from rlbf_jax.training.state import init_state, jit_update
from rlbf_jax.training.supervised import Rows, supervised_objective

GROUP = 8
COLUMNS = ("arguments", "temporaries", "outputs", "reused", "total")
MODELS = PRESETS | {
    "toy": ModelConfig(vocab_size=2088),
    "12x768": ModelConfig(
        vocab_size=32_000,
        num_layers=12,
        width=768,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        mlp_width=2048,
    ),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is asked about."""

    model: ModelConfig
    semantics: Semantics
    batch: int
    length: int
    """T: prompt and response."""
    drawn: int
    """Ids that a row draws itself."""
    accumulate: int
    mesh: jax.sharding.Mesh | None = None
    """Devices of a TPU that is not there; None: the first device of the backend at hand."""
    free_layouts: bool = False
    """Updates take parameters and state in the layout that the compiler chooses,
    which the trainers do not."""

    @property
    def rule(self) -> BacktrackRule:
        x_max = 40
        return BacktrackRule(self.model.vocab_size - x_max - 2, ("a", "b"), x_max=x_max)

    @property
    def policy(self) -> PolicyConfig:
        return PolicyConfig(max_drawn=self.drawn)

    @property
    def params(self) -> dict:
        """Shapes of the decoder's parameters."""
        return shapes.parameters(self.model)

    @property
    def policy_params(self) -> dict:
        init = functools.partial(init_policy, model=self.model, key=jax.random.key(0))
        return jax.eval_shape(init, self.params)


def placed(s: Setting, tree, rows: bool = False):
    """Shapes with their places on the mesh: of `rows`, or of parameters by their names.
    As they are without a mesh."""
    if s.mesh is None:
        return tree
    return shapes.by_rows(tree, s.mesh) if rows else shapes.by_name(tree, s.mesh)


def rows_of(s: Setting) -> Rows:
    return shapes.packed_rows(s.batch, s.length)


def traces_of(s: Setting) -> Traces:
    return shapes.traces(s.batch, s.length, s.rule)


def updated(s: Setting, objective: Objective, trees):
    """Lowers an update as `make_update` gives it to a trainer.

    `trees`: shapes of what is trained, of what is frozen, and of a batch.
    """
    optimizer = make_optimizer(OptimizerConfig(), 100)
    mesh = s.mesh or make_mesh(devices=jax.devices()[:1])
    if not s.free_layouts:
        return lowered_update(objective, optimizer, trees, mesh, s.accumulate)
    trained, frozen, batch = trees
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), trained)
    update = jit_update(
        objective.terms, objective.denominators, objective.weights, optimizer, mesh, state,
        s.accumulate, frozen,
    )  # fmt: skip
    free = functools.partial(jax.tree.map, lambda place: Format(Layout.AUTO, place))
    places = free(shardings(state, mesh))
    update = jax.jit(
        update.__wrapped__,
        in_shardings=(places, free(shardings(frozen, mesh)), batch_sharding(mesh)),
        out_shardings=(places, replicated(mesh)),
        donate_argnums=0,
    )
    return update.lower(state, frozen, batch)


def sft_update(s: Setting):
    objective = supervised_objective(s.model, s.rule, s.semantics)
    return updated(s, objective, (*lora.split(s.params), rows_of(s)))


def scoring(s: Setting):
    read = functools.partial(score, s.model, rule=s.rule, semantics=s.semantics, drawn=s.drawn)
    return jax.jit(lambda params, traces: read(params=params, traces=traces)).lower(
        placed(s, s.params), placed(s, traces_of(s), rows=True)
    )


def measuring(s: Setting):
    groups = max(1, s.batch // GROUP)
    columns, row = shapes.columns(s.batch, s.length), shapes.counts(s.batch, jnp.float32)
    run = jax.jit(functools.partial(measure, s.model, s.rule, s.semantics, s.policy, groups))
    batch = (traces_of(s), row, shapes.counts(s.batch), columns)
    return run.lower(placed(s, s.policy_params), *placed(s, batch, rows=True))


def rl_update(s: Setting):
    columns = shapes.columns(s.batch, s.length)
    flags = jax.ShapeDtypeStruct(columns.shape, jnp.bool)
    measured = Measured(columns, columns, columns, columns, columns, flags)
    trained, frozen = lora.split(s.params)
    gradient = PolicyGradient(s.model, s.rule, s.semantics, s.policy)
    batch = PolicyBatch(traces_of(s), measured, rows_of(s))
    trees = {**s.policy_params, "model": trained}, {"model": frozen}, batch
    return updated(s, gradient.objective, trees)


def sampling(s: Setting):
    """Contexts as wide as a row, as runs have them (one program for every attack),
    and room for what is drawn.

    Windowed layers have rings of a window's slots:
    a budget of retractions under REWIND would add to them.
    """
    count, real = shapes.counts(s.batch), shapes.counts(s.batch, jnp.float32)
    batch = Batch(
        prompt_length=count,
        id=shapes.counts(s.batch, jnp.uint32),
        limits=shapes.limits(s.batch),
        temperature=real,
        truncation=Truncation(count, real, real),
        control_bias=shapes.columns(s.batch, len(s.rule.names())),
        stop_ids=jax.ShapeDtypeStruct((s.batch, 1), jnp.int32),
    )
    model = dataclasses.replace(s.model, scan_layers=False)
    params = jax.eval_shape(lambda p: transformer.unrolled(s.model, p)[1], s.params)
    told: dict[str, Any] = dict(program=Single(model), rule=s.rule, semantics=s.semantics)
    begin = functools.partial(loop.begin, **told, capacity=s.length + s.drawn, rewound=0)
    ids = jax.ShapeDtypeStruct((s.batch, s.length), jnp.int32)
    contexts = Contexts(ids, count, count)
    begun = jax.eval_shape(begin, params, contexts)
    return loop.go_on.lower(
        placed(s, params),
        placed(s, batch, rows=True),
        placed(s, jax.eval_shape(lambda x: loop.idle(x, rows=s.batch), begun), rows=True),
        jax.eval_shape(lambda: jax.random.key(0)),
        s.batch,
        s.drawn,
        **told,
        one_hot=s.mesh is not None,  # as the sampler writes on a TPU
    )


PHASES: dict[str, Callable[[Setting], Any]] = {
    "sft_update": sft_update,
    "score": scoring,
    "measure": measuring,
    "rl_update": rl_update,
    "sample": sampling,
}


def planned(name: str, s: Setting) -> dict:
    """Bytes of one phase, and the seconds its compilation took."""
    began = time.perf_counter()
    plan = memory_of(PHASES[name](s).compile())
    sizes = {"arguments": plan.arguments, "temporaries": plan.temporaries}
    sizes |= {"outputs": plan.outputs, "reused": plan.reused}
    total = sizes["arguments"] + sizes["temporaries"] + sizes["outputs"] - sizes["reused"]
    return {"name": name, **sizes, "total": total, "compile_seconds": time.perf_counter() - began}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default="toy")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--length", type=int, default=512, help="ids of a row, prompt and response")
    parser.add_argument(
        "--drawn", type=int, help="ids a row draws itself; half of the length if not given"
    )
    parser.add_argument("--semantics", choices=[s.value for s in Semantics], default="keep")
    parser.add_argument("--remat", choices=typing.get_args(Remat), default="none")
    parser.add_argument(
        "--lora", type=int, default=0, help="rank of adapters, which then are all that is trained"
    )
    parser.add_argument("--accumulate", type=int, default=1, help="microbatches")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="activations and cache"
    )
    parser.add_argument(
        "--param-dtype", choices=("float32", "bfloat16"), help="parameters; --dtype if not given"
    )
    parser.add_argument("--unrolled", action="store_true", help="layers one by one, not in a scan")
    parser.add_argument(
        "--topology", help="a TPU slice to compile for, as v5p:2x2x1; it need not be there"
    )
    parser.add_argument(
        "--fsdp",
        type=int,
        default=1,
        help="with --topology: devices that rows and parameters split over",
    )
    parser.add_argument(
        "--tensor",
        type=int,
        default=1,
        help="with --topology: devices that heads and columns split over",
    )
    parser.add_argument(
        "--free-layouts",
        action="store_true",
        help="updates with the layouts that the compiler would choose; trainers do not",
    )
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    if args.batch % args.accumulate:
        parser.error(f"--batch {args.batch} does not divide into {args.accumulate} microbatches")
    if args.length > QUERY_BLOCK and args.length % QUERY_BLOCK:
        parser.error(f"--length {args.length}: rows longer than {QUERY_BLOCK} are multiples of it")
    if args.batch % (args.accumulate * args.fsdp):
        parser.error(
            f"--batch {args.batch} does not divide over {args.fsdp} devices x {args.accumulate} "
            "microbatches"
        )
    if args.topology is None and args.fsdp * args.tensor > 1:
        parser.error(
            "--fsdp and --tensor split over the devices of a --topology, and none is given"
        )
    return args


def setting_of(args: argparse.Namespace) -> Setting:
    model = dataclasses.replace(
        MODELS[args.model],
        dtype=args.dtype,
        param_dtype=args.param_dtype or args.dtype,
        remat=args.remat,
        scan_layers=not args.unrolled,
    )
    controls = LoraConfig(args.lora, first_row=model.vocab_size - 42, rows=42)
    model = dataclasses.replace(model, lora=controls if args.lora else LoraConfig())
    drawn = args.drawn or args.length // 2
    mesh = topology_mesh(args.topology, args.fsdp, args.tensor) if args.topology else None
    return Setting(
        model,
        Semantics(args.semantics),
        args.batch,
        args.length,
        drawn,
        args.accumulate,
        mesh,
        args.free_layouts,
    )


def topology_mesh(name: str, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    """The first fsdp x tensor devices of a TPU slice that need not be there.

    Exits where libtpu is not installed, or does not know the slice.
    """
    try:
        devices = topology(name).devices
    except UserError as error:
        raise SystemExit(str(error)) from error
    if fsdp * tensor > len(devices):
        raise SystemExit(
            f"--topology {name} has {len(devices)} devices, --fsdp {fsdp} x --tensor {tensor} "
            "need more"
        )
    return make_mesh(MeshConfig(data=1, fsdp=fsdp, tensor=tensor), list(devices[: fsdp * tensor]))


def main() -> None:
    args = parse()
    setting = setting_of(args)  # which makes the topology, before anything looks for devices
    asked = {k: v for k, v in vars(args).items() if k not in ("json", "phases")} | {
        "backend": "tpu compiler" if args.topology else jax.default_backend()
    }
    if not args.json:
        print(", ".join(f"{k} {v}" for k, v in asked.items() if v is not None))
        print("{:12}{:>12}{:>13}{:>10}{:>10}{:>10}{:>14}".format("MB", *COLUMNS, "compiled in"))
    chosen = compiling_for("tpu") if args.topology else contextlib.nullcontext()
    with chosen:
        show(args, setting, asked)


def show(args: argparse.Namespace, setting: Setting, asked: dict) -> None:
    """Prints the chosen phases as they are compiled."""
    for name in args.phases:
        row = planned(name, setting)
        if args.json:
            print(json.dumps(row | asked), flush=True)
            continue
        cells = (f"{row[k] / 1e6:,.1f}" for k in COLUMNS)
        line = "{:>12}{:>13}{:>10}{:>10}{:>10}".format(*cells)
        print(f"{name:12}{line}{row['compile_seconds']:12.1f} s", flush=True)


if __name__ == "__main__":
    main()
