"""The programs of an experiment, as its stages jit them, lowered from shapes.

A stage's programs follow from its configuration: `STAGES` says how for every kind of
configuration, so a new paper that trains with the shared stages needs nothing here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlbf_jax.methods.reinforcement import policy_optimizer
from rlbf_jax.methods.rlbf import ReinforcementStage
from rlbf_jax.methods.shared import BaseStage, SupervisedStage
from rlbf_jax.models import lora
from rlbf_jax.models.config import LoraConfig
from rlbf_jax.planning import shapes
from rlbf_jax.planning.sampling import Sampling
from rlbf_jax.planning.shapes import Vocabulary
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.runs.shapes import check_rows
from rlbf_jax.sampling.request import Knobs
from rlbf_jax.training.learner import Objective
from rlbf_jax.training.optimizer import make_optimizer
from rlbf_jax.training.policy import Measured, PolicyBatch, PolicyGradient, init_policy
from rlbf_jax.training.state import init_state, jit_update
from rlbf_jax.training.supervised import SupervisedConfig, supervised_objective


@dataclasses.dataclass(frozen=True)
class Phase:
    """One program of a stage."""

    name: str
    """Of the program: update, prefill, decode, measure, compare."""
    stages: tuple[str, ...]
    """Stages that run it."""
    lower: Callable[[], jax.stages.Lowered]
    runs: float
    """How often it runs in one step of its stage."""
    steps: int
    """Steps of its stage."""
    beside: int = 0
    """Bytes on each device of what is kept while it runs and is none of its arguments."""
    unknown_turns: int = 1
    """Turns of a loop whose end the data decide."""
    about: str = ""
    """Rows and ids, for a person."""

    @property
    def title(self) -> str:
        """As a person names it."""
        return f"{'/'.join(self.stages)} {self.name}"


@dataclasses.dataclass(frozen=True)
class Site:
    """Where and for what programs are lowered."""

    experiment: Experiment
    vocabulary: Vocabulary
    mesh: Mesh


def phases(e: Experiment, mesh: Mesh) -> list[Phase]:
    """The programs of an experiment's stages in their order; stages with the same program share an
    entry. Evaluations sample as reinforcement does and are left out.

    Raises UserError for batches that the mesh does not divide.
    """
    site = Site(e, shapes.vocabulary(e), mesh)
    found: dict[Any, Phase] = {}
    for stage in e.method.stages(e):
        make = STAGES.get(type(stage.config))
        for key, phase in make(site, stage.name, stage.config) if make else ():
            old = found.get(key)
            if old is not None:
                phase = dataclasses.replace(old, stages=(*old.stages, *phase.stages))
            found[key] = phase
    return list(found.values())


def unplanned(e: Experiment) -> list[str]:
    """Stages that compute and that nothing here knows the programs of."""
    stages = e.method.stages(e)
    return [s.name for s in stages if not s.prepares and type(s.config) not in STAGES]


Planned = Iterator[tuple[Any, Phase]]
"""(what makes two programs the same, the program)."""


# Updates ------------------------------------------------------------------------------------------


def lowered_update(
    objective: Objective, optimizer: Any, trees: tuple[Any, Any, Any], mesh: Mesh, accumulate: int
) -> jax.stages.Lowered:
    """The update that a `Learner` makes.

    Args:
      trees: shapes of what is trained, of what is frozen, and of a batch.
    """
    trained, frozen, batch = trees
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), trained)
    update = jit_update(
        objective.terms, objective.denominators, objective.weights, optimizer, mesh, state,
        accumulate, frozen,
    )  # fmt: skip
    return update.lower(state, frozen, batch)


def _supervised(site: Site, stage: str, config: SupervisedStage) -> Planned:
    yield _supervised_update(site, stage, config.training, config.flag, config.lora)


def _base(site: Site, stage: str, config: BaseStage) -> Planned:
    if not config.start_from:  # a checkpoint is not trained
        yield _supervised_update(site, stage, config.pretraining, "pretraining", LoraConfig())


def _supervised_update(
    site: Site, stage: str, training: SupervisedConfig, flag: str, adapters: LoraConfig
) -> tuple[Any, Phase]:
    e, rows, accumulate = site.experiment, training.batch_size, training.accumulate
    check_rows(f"{flag}.batch_size", rows, site.mesh, accumulate)
    rule = site.vocabulary.rule(e.rule)
    model = site.vocabulary.tuned(adapters, rule)
    length = e.data.row_length

    def lower() -> jax.stages.Lowered:
        optimizer = make_optimizer(training.optimizer, training.steps, warn=False)
        trees = *lora.split(shapes.parameters(model)), shapes.packed_rows(rows, length)
        weight = training.directive_weight
        objective = supervised_objective(model, rule, e.semantics, weight)
        return lowered_update(objective, optimizer, trees, site.mesh, accumulate)

    about = f"{rows} rows x {length} ids"
    phase = Phase("update", (stage,), lower, 1, training.steps, about=about)
    return ("update", model, rows, accumulate, training.optimizer.name), phase


# Reinforcement ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Reinforcement:
    """Shapes of a reinforcement stage."""

    site: Site
    config: ReinforcementStage

    @property
    def rule(self):
        return self.site.vocabulary.rule(self.config.rule)

    @property
    def gradient(self) -> PolicyGradient:
        config = self.config
        model = self.site.vocabulary.tuned(config.lora, self.rule)
        return PolicyGradient(model, self.rule, config.semantics, config.reinforcement.policy)

    @property
    def rows(self) -> int:
        """Rollouts of a step."""
        return self.config.reinforcement.prompts_per_step * self.config.reinforcement.group_size

    @functools.cached_property
    def decoder(self) -> tuple[dict, dict]:
        """(trained, frozen) parameters of the decoder."""
        return lora.split(shapes.parameters(self.gradient.model))

    @functools.cached_property
    def policy(self) -> dict:
        """What is trained: the decoder's parameters and the value head."""
        model = self.gradient.model
        return jax.eval_shape(
            lambda trained: init_policy(trained, model, jax.random.key(0)), self.decoder[0]
        )

    @functools.cached_property
    def joined(self) -> dict:
        """What samples and measures, in its places."""
        return shapes.by_name(lora.join(self.policy, {"model": self.decoder[1]}), self.site.mesh)

    @property
    def kept(self) -> dict[str, int]:
        """Bytes on each device of what is kept from step to step, by kind. Parameters that the
        reference shares with the policy (frozen ones) count once."""
        mesh = self.site.mesh
        optimizer = policy_optimizer(self.config.reinforcement)
        state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), self.policy)
        trained, frozen = self.decoder
        return {
            "trained": shapes.bytes_of(shapes.by_name(self.policy, mesh)),
            "moments": shapes.bytes_of(shapes.by_name(state.opt_state, mesh)),
            "frozen": shapes.bytes_of(shapes.by_name(frozen, mesh)),
            "reference": shapes.bytes_of(shapes.by_name(trained, mesh)),
        }

    def traces(self):
        return shapes.by_rows(
            shapes.traces(self.rows, self.config.width, self.rule), self.site.mesh
        )

    def measured(self, placed: bool = True):
        columns: Any = shapes.columns(self.rows, self.config.width)
        flags: Any = jax.ShapeDtypeStruct(columns.shape, jnp.bool)
        batch = Measured(columns, columns, columns, columns, columns, flags)
        return shapes.by_rows(batch, self.site.mesh) if placed else batch

    def lower_update(self) -> jax.stages.Lowered:
        rl, e = self.config.reinforcement, self.site.experiment
        traces = shapes.traces(self.rows, self.config.width, self.rule)
        guidance = shapes.packed_rows(rl.guidance_batch_size, e.data.row_length)
        batch = PolicyBatch(traces, self.measured(placed=False), guidance)
        trees = self.policy, {"model": self.decoder[1]}, batch
        optimizer = policy_optimizer(rl)
        return lowered_update(
            self.gradient.objective, optimizer, trees, self.site.mesh, rl.accumulate
        )

    def lower_measure(self) -> jax.stages.Lowered:
        rows = self.rows
        reward, group = shapes.counts(rows, jnp.float32), shapes.counts(rows)
        recorded = shapes.columns(rows, self.config.width)
        measure = self.gradient.measuring(
            self.config.reinforcement.prompts_per_step, self.site.mesh
        )
        return measure.lower(self.joined, self.traces(), reward, group, recorded)  # type: ignore[attr-defined]

    def lower_compare(self) -> jax.stages.Lowered:
        compare = self.gradient.comparing(self.site.mesh)
        return compare.lower(self.joined["model"], self.traces(), self.measured())  # type: ignore[attr-defined]


def _reinforcement(site: Site, stage: str, config: ReinforcementStage) -> Planned:
    rl = config.reinforcement
    parts = _Reinforcement(site, config)
    for name, rows, accumulate in (
        ("prompts_per_step x group_size", parts.rows, rl.accumulate),
        ("guidance_batch_size", rl.guidance_batch_size, rl.accumulate),
    ):
        check_rows(f"reinforcement.{name}", rows, site.mesh, accumulate)
    check_rows("sampling_batch", config.sampling_batch, site.mesh)
    kept = parts.kept
    everything = sum(kept.values())
    knobs = Knobs(max_tokens=config.rollout_tokens, budget=config.rollout_budget)
    sampling = Sampling(
        parts.gradient.model, parts.rule, config.sampler, knobs, config.max_prompt, site.mesh
    )
    copied = parts.gradient.model.scan_layers  # unrolled copies are arguments of their own
    beside = everything if copied else everything - kept["trained"] - kept["frozen"]
    params = parts.joined["model"]
    steps = rl.steps

    def phase(
        name: str, lower: Callable, runs: float, beside: int, about: str
    ) -> tuple[Any, Phase]:
        turns = config.max_drawn if name == "decode" else 1
        return (name, stage), Phase(name, (stage,), lower, runs, steps, beside, turns, about)

    batches = -(-parts.rows // config.sampling_batch)
    contexts = sampling.contexts
    yield phase(
        "prefill", lambda: sampling.lower_prefill(params), -(-rl.prompts_per_step // contexts),
        beside, f"{contexts} contexts x {config.width} ids",
    )  # fmt: skip
    yield phase(
        "decode", lambda: sampling.lower_decode(params), batches,
        beside, f"{config.sampling_batch} rows x {config.max_drawn} ids",
    )  # fmt: skip
    about = f"{parts.rows} rows x {config.width} ids"
    alone = kept["moments"] + kept["reference"]
    yield phase("measure", parts.lower_measure, 1, alone, about)
    share = 1.0 if rl.policy.kl_weight else 1 / rl.kl_every
    others = everything - kept["reference"] - kept["frozen"]
    yield phase("compare", parts.lower_compare, share, others, about)
    about += f", {rl.guidance_batch_size} x {site.experiment.data.row_length}"
    yield phase("update", parts.lower_update, rl.updates_per_step, kept["reference"], about)


STAGES: dict[type, Callable[[Site, str, Any], Planned]] = {
    BaseStage: _base,
    SupervisedStage: _supervised,
    ReinforcementStage: _reinforcement,
}
"""Kind of a stage's configuration -> its programs."""
