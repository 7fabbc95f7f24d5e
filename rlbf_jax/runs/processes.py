"""What the processes of one run must have in common before they start."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jax

from rlbf_jax.errors import UserError
from rlbf_jax.parallel import hosts
from rlbf_jax.plain import differences
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.runs.manifest import brief, commit

SHARED_S = 10.0
"""A network file system may show a new name only after a while."""


def agree(e: Experiment, workdir: Path) -> None:
    """Raises UserError, on every process, where one would not run the same as the first."""
    if not hosts.several():
        return
    hosts.same_everywhere("the commit", commit(), "bring all hosts to the same one")
    hosts.same_everywhere("JAX's version", jax.__version__, "install the same on all hosts")
    mine = {"workdir": str(workdir.absolute()), **json.loads(json.dumps(e.stored()))}
    found = differences(hosts.from_first(lambda: mine), mine)
    for process, difference in enumerate(hosts.gather(found[:1])):
        for name, first, here in difference:
            raise UserError(
                f"{name} is {brief(here)} on process {process} and {brief(first)} on process 0; "
                "start the same command, with the same files, on every host"
            )


def check_shared(file: Path) -> None:
    """Raises UserError, on every process, where one does not see what the first one wrote."""
    if not hosts.several():
        return
    end = time.monotonic() + SHARED_S
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.1)
    for process, seen in enumerate(hosts.gather(file.exists())):
        if not seen:
            raise UserError(
                f"{file}: written by process 0, not seen by process {process}; give all hosts one "
                "--workdir on a file system that they share"
            )
