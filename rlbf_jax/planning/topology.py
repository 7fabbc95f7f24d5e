"""Devices to compile for: a TPU slice that is not there, a node of H100s by formula, or what is at
hand."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from rlbf_jax.errors import UserError
from rlbf_jax.parallel.backend import compiling_for
from rlbf_jax.parallel.mesh import MeshConfig, make_mesh
from rlbf_jax.planning.chips import CHIPS, Chip

_TPU = re.compile(r"(v\w+):\d+x\d+(x\d+)?")
_NODE = re.compile(r"(h100):(\d+)")
_MEND = "install it on a Linux machine: pip install 'jax[tpu]'"
_LIBTPU = {
    # It would ask the cloud's metadata server, and wait for it.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "none",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Only a TPU's owner has to be alone; several may plan at a time.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu reads from the environment, where it is not set."""
_EXAMPLES = "v5e:16x16, v5p:2x2x4, v4:2x2x4, v6e:4x4 or h100:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind."""

    name: str
    platform: str
    """Backend whose choices programs take: cpu, gpu or tpu."""
    devices: tuple[Any, ...]
    chip: Chip | None
    """None: no figures are known, and no seconds are estimated."""

    def mesh(self, config: MeshConfig) -> Mesh:
        """A mesh over all devices. Raises UserError where its axes do not multiply to them."""
        try:
            return make_mesh(config, list(self.devices))
        except ValueError as error:
            raise UserError(f"{error} ({self.name})") from error

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        """Programs that are traced inside are made for these devices."""
        with compiling_for(self.platform):
            yield


def topology(name: str = "") -> Topology:
    """The devices of a name as v5e:16x16 or h100:8; without one, those at hand.

    To be called before anything else asks JAX for devices: a TPU is then compiled for and not
    looked for, and the CPU stands in for as many H100s as are wanted.

    Raises UserError for a name that is unknown, and where libtpu is missing.
    """
    if not name:
        devices = tuple(jax.devices())
        return Topology(f"{len(devices)} x {devices[0].device_kind}", _here(), devices, None)
    if match := _NODE.fullmatch(name):
        return _node(name, CHIPS[match.group(1)], int(match.group(2)))
    match = _TPU.fullmatch(name)
    if match is None or match.group(1) not in CHIPS:
        near = difflib.get_close_matches(name.split(":")[0], CHIPS, n=1)
        hint = f"; did you mean {near[0]}?" if near and near[0] != name.split(":")[0] else ""
        raise UserError(f"--topology {name}: expected a name as {_EXAMPLES}{hint}")
    return Topology(name, "tpu", _described(name), CHIPS[match.group(1)])


def _here() -> str:
    return jax.default_backend()


def _described(name: str) -> tuple[Any, ...]:
    """The devices of a TPU slice, by libtpu and without any TPU."""
    from jax.experimental import topologies

    for variable, value in _LIBTPU.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise UserError(f"--topology {name}: libtpu is not there; {_MEND}") from error
    try:
        with _quiet():
            found = topologies.get_topology_desc(topology_name=name, platform="tpu")
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--topology {name}: libtpu knows no such slice ({reason}); expected a name as "
            f"{_EXAMPLES}"
        ) from error
    return tuple(found.devices)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what a library writes to standard error, past Python, away: libtpu complains there that
    this machine is no TPU's host."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _node(name: str, chip: Chip, count: int) -> Topology:
    """Virtual CPU devices in the place of GPUs."""
    jax.config.update("jax_platforms", "cpu")
    # Says nothing where JAX has its devices already: then there are as many as there are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = tuple(jax.devices("cpu"))
    if len(devices) < count:
        raise UserError(
            f"--topology {name}: JAX has {len(devices)} CPU devices to compile with; set XLA_FLAGS="
            f"--xla_force_host_platform_device_count={count}"
        )
    return Topology(name, "cpu", devices[:count], chip)
