"""A stage: one step of a recipe, and the fingerprint that says when its result may be reused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rlbf_jax.plain import digest, plain

if TYPE_CHECKING:
    from rlbf_jax.runs.run import Run

C = TypeVar("C")


def no_check(run: Run, config: Any) -> None:
    """For stages that have nothing to check."""


@dataclasses.dataclass(frozen=True)
class Stage(Generic[C]):
    """One step of a recipe. It sees its own configuration and the results
    of the stages it comes after, nothing else.

    `do(run, config)` may be called again after a kill and goes on from its own checkpoints. It is a
    plain function: whatever it depends on stands in `config`, or comes from a stage in `after`.
    """

    name: str
    do: Callable[[Run, C], None]
    config: C
    """A frozen dataclass; its fields are named as the experiment's flags are."""
    after: tuple[str, ...] = ()
    """Stages whose results it reads. What those came after counts too."""
    check: Callable[[Run, C], None] = no_check
    """Called before anything is made. Raises UserError for shapes that do not fit."""
    fit: Callable[[Run, C], None] = no_check
    """Called once the prepared data are there, before the first stage trains.

    Raises UserError where text and shapes do not fit."""
    prepares: bool = False
    """Makes data or a tokenizer, no model."""
    evaluated: bool = False
    """Keeps a policy that evaluations ask."""
    files: tuple[str, ...] = ()
    """Of its folder, beside a model: its result, which another run may take over."""
    retracts: bool = False
    """Its policy was taught to take back, so evaluations may calibrate how readily it does."""
    method: str = ""
    """`method` of its records; empty: its name."""
    label: str = ""
    """What the report calls it; empty: its name."""
    headline: bool = False
    """Stands in the headline of the report; where no stage does, the first and the last do."""

    @property
    def does(self) -> str:
        """Name of what it does: stages of one name and other papers are other stages."""
        return f"{self.do.__module__}.{self.do.__qualname__}"


Shared = Mapping[str, Any]
"""What all stages depend on (seed, data), as plain JSON."""


def lineage(stages: Sequence[Stage], name: str) -> tuple[str, ...]:
    """A stage and all that it comes after, in the order of the recipe.

    Raises ValueError for a stage that comes after one that is unknown or later.
    """
    names = [stage.name for stage in stages]
    by_name = {stage.name: stage for stage in stages}
    wanted, queue = {name}, [name]
    while queue:
        stage = by_name[queue.pop()]
        for before in stage.after:
            if before not in names or names.index(before) >= names.index(stage.name):
                raise ValueError(
                    f"stage {stage.name} comes after {before!r}, which is no earlier stage; there "
                    f"are {', '.join(names)}"
                )
            if before not in wanted:
                wanted.add(before)
                queue.append(before)
    return tuple(n for n in names if n in wanted)


def dependencies(stages: Sequence[Stage], name: str, shared: Shared) -> dict[str, Any]:
    """Everything that decides a stage's result, as plain JSON: `shared`, then the configuration of
    the stage and of all that it comes after, by name."""
    by_name = {stage.name: stage for stage in stages}
    return {
        **shared,
        "stages": {
            n: {**plain(by_name[n].config, decisive=True), "does": by_name[n].does}
            for n in lineage(stages, name)
        },
    }


def fingerprint(stages: Sequence[Stage], name: str, shared: Shared) -> str:
    """Hash of `dependencies`: two stages of one fingerprint have one result, up to hardware."""
    return digest(dependencies(stages, name, shared))
