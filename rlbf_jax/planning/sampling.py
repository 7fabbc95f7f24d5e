"""The sampler's programs, lowered from shapes as `sampling.sampler` runs them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlbf_jax.directives import EditRule
from rlbf_jax.models import transformer
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.planning import shapes
from rlbf_jax.sampling import loop
from rlbf_jax.sampling.batching import (
    IDLE,
    STOPS,
    Row,
    SamplerConfig,
    batch_of,
    context_width,
    shape_of,
)
from rlbf_jax.sampling.program import Single
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.sampler import contexts_read, writes_one_hot
from rlbf_jax.sampling.state import Contexts


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A sampler of one shape."""

    model: ModelConfig
    rule: EditRule
    config: SamplerConfig
    knobs: Knobs
    max_prompt: int
    """Ids of the longest prompt."""
    mesh: Mesh

    @property
    def contexts(self) -> int:
        """Contexts that are read in one pass."""
        return contexts_read(self.config, self.mesh)

    @functools.cached_property
    def program(self) -> Single:
        return Single(dataclasses.replace(self.model, scan_layers=False))

    @functools.cached_property
    def told(self) -> dict[str, Any]:
        return dict(
            program=self.program,
            rule=self.rule,
            semantics=self.config.semantics,
            mesh=self.mesh.abstract_mesh,
        )

    def unrolled(self, params: Any) -> Any:
        """Shapes of the parameters as the loop takes them, in their places."""
        made = jax.eval_shape(lambda p: transformer.unrolled(self.model, p)[1], params)
        return shapes.by_name(made, self.mesh)

    def lower_prefill(self, params: Any) -> jax.stages.Lowered:
        """`loop.begin` for contexts as wide as rows are."""
        row = Row(Request("", (), self.knobs), (0,) * self.max_prompt, 0, 0)
        shape = shape_of(row, self.config, self.program, self.rule)
        width = context_width(shape.capacity, self.config, self.program)
        count = shapes.counts(self.contexts)
        ids: Any = jax.ShapeDtypeStruct((self.contexts, width), jnp.int32)
        contexts = shapes.by_rows(Contexts(ids, count, count), self.mesh)
        return loop.begin.lower(
            self.unrolled(params), contexts, **self.told, **shape._asdict(),
            int8_cache=self.config.int8_cache,
        )  # fmt: skip

    def lower_decode(self, params: Any) -> jax.stages.Lowered:
        """`loop.go_on` until all rows of a batch are over. The state comes out of `loop.idle`, so
        it lies where that puts it."""
        prefill = self.lower_prefill(params)
        prefilled = shapes.by_rows(shapes.at_shapes(prefill.out_info), self.mesh)
        rows = self.config.batch_size
        idle = loop.idle.lower(prefilled, rows=rows, mesh=self.mesh.abstract_mesh)
        state = shapes.at_places(idle.out_info, idle.compile().output_shardings)
        asked = batch_of([IDLE] * rows, self.rule, (), STOPS)
        batch = shapes.by_rows(jax.tree.map(jax.typeof, asked), self.mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return loop.go_on.lower(
            self.unrolled(params), batch, state, key, np.int32(rows), np.int32(2**31 - 1),
            one_hot=writes_one_hot(self.config), **self.told,
        )  # fmt: skip
