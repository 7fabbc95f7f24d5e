"""Meshes and batch sizes side by side: which fit, and what binds them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlbf_jax.errors import UserError
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.parallel.mesh import MeshConfig
from rlbf_jax.planning.forecast import Forecast, forecast
from rlbf_jax.planning.phases import phases
from rlbf_jax.planning.topology import Topology
from rlbf_jax.runs.experiment import Experiment

OUT_OF_TIME = "not compiled: out of time (--minutes)"
ROWS = {"batch_size", "prompts_per_step", "guidance_batch_size"}
"""Settings of a method's stages that say how many rows a step has."""
MOST_TENSOR = 8
"""Widest tensor axis that is tried: products are exchanged at every layer."""
LEAST_FSDP = 4
"""Narrowest fsdp x tensor that is tried where `data` is wider than 1 and there are so many chips:
below it, parameters are nearly whole on every chip."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One mesh with one batch size."""

    mesh: MeshConfig
    scale: float
    """Rows, times the experiment's."""
    forecasts: tuple[Forecast, ...]
    """In the order of the stages; those behind one that does not fit are left out."""
    refused: str = ""
    """Why nothing was compiled."""

    @property
    def fits(self) -> bool | None:
        """Whether every program fits; None where the chip's memory is not known."""
        if self.refused:
            return None if self.refused == OUT_OF_TIME else False
        verdicts = [f.fits for f in self.forecasts]
        return None if None in verdicts else all(verdicts)

    @property
    def needed(self) -> int:
        """Bytes on one chip, of the program that takes most."""
        return max((f.needed or 0 for f in self.forecasts), default=0)

    @property
    def worst(self) -> Forecast | None:
        """The program that takes most memory."""
        return max(self.forecasts, key=lambda f: f.needed or 0, default=None)

    @property
    def slowest(self) -> Forecast | None:
        """The program that takes most of the run's time, as far as seconds are known."""
        known = [f for f in self.forecasts if f.step_seconds is not None]
        return max(known, key=lambda f: (f.step_seconds or 0) * f.steps, default=None)

    def plain(self) -> dict:
        """As JSON."""
        return {
            "mesh": dataclasses.asdict(self.mesh),
            "scale": self.scale,
            "fits": self.fits,
            "needed": self.needed,
            "refused": self.refused,
            "phases": [f.plain() for f in self.forecasts],
        }


def meshes(devices: int, model: ModelConfig) -> list[MeshConfig]:
    """Ways to lay devices out as data x fsdp x tensor that are worth compiling: `tensor` divides
    the key heads and is `MOST_TENSOR` at most. Those that split parameters widest come first."""
    found = []
    for tensor in _divisors(min(devices, MOST_TENSOR)):
        if devices % tensor or model.num_kv_heads % tensor:
            continue
        for data in _divisors(devices // tensor):
            fsdp = devices // tensor // data
            if data == 1 or fsdp * tensor >= min(devices, LEAST_FSDP):
                found.append(MeshConfig(data, fsdp, tensor))
    return sorted(found, key=lambda mesh: (mesh.data, mesh.tensor))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def scaled(e: Experiment, scale: float) -> Experiment:
    """The experiment with so many times its rows, in every stage and in sampling."""
    return dataclasses.replace(
        e,
        method=_scaled(e.method, scale),
        base=_scaled(e.base, scale),
        sampling_batch=_rows(e.sampling_batch, scale),
    )


def _scaled(value: Any, scale: float) -> Any:
    changes = {}
    for field in dataclasses.fields(value):
        old = getattr(value, field.name)
        if field.name in ROWS:
            changes[field.name] = _rows(old, scale)
        elif dataclasses.is_dataclass(old):
            new = _scaled(old, scale)
            if new != old:
                changes[field.name] = new
    return dataclasses.replace(value, **changes) if changes else value


def _rows(rows: int, scale: float) -> int:
    return max(1, round(rows * scale))


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a table tries."""

    meshes: Sequence[MeshConfig]
    scales: Sequence[float]
    wanted: Sequence[str] = ()
    """Names of programs (update, prefill, decode, ...); empty: all."""
    seconds: float = float("inf")
    """After so long no further mesh is begun."""


def rows(
    e: Experiment, where: Topology, choice: Choice, said: Callable[[str], object]
) -> Iterator[Row]:
    """One row a mesh and batch size, as they are compiled. `said` hears what is under way."""
    began = time.perf_counter()
    for scale in choice.scales:
        for mesh in choice.meshes:
            if time.perf_counter() - began > choice.seconds:
                yield Row(mesh, scale, (), OUT_OF_TIME)
                continue
            yield row(scaled(e, scale), where, Row(mesh, scale, ()), choice.wanted, said)


def row(
    e: Experiment,
    where: Topology,
    empty: Row,
    wanted: Sequence[str],
    said: Callable[[str], object],
) -> Row:
    """Compiles the programs of one mesh until one does not fit; `empty` says which mesh."""
    found: list[Forecast] = []
    try:
        made = phases(e, where.mesh(empty.mesh))
    except UserError as error:
        return dataclasses.replace(empty, refused=str(error))
    for phase in made:
        if wanted and phase.name not in wanted:
            continue
        said(f"{mesh_name(empty.mesh)}, rows x {empty.scale:g}: {phase.title}")
        found.append(forecast(phase, where.chip))
        if found[-1].fits is False:
            break
    return dataclasses.replace(empty, forecasts=tuple(found))


def mesh_name(mesh: MeshConfig) -> str:
    """As `--mesh` takes it."""
    return f"data={mesh.data},fsdp={mesh.fsdp},tensor={mesh.tensor}"
