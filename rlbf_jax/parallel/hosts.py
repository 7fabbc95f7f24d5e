"""Several processes of one run: who they are, and what they agree on.

Every process runs the same program on the same inputs, and the devices of all form one mesh. Only
process 0 writes files, and what one process alone knows (a file, a signal, an endpoint's answer) is
handed on to the others. With one process every function here answers for itself and does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from rlbf_jax.errors import UserError
from rlbf_jax.parallel import watch

if TYPE_CHECKING:
    import numpy as np

START_S = 60
"""So long the processes of a run wait for each other at its beginning."""
CLUSTERS = ("SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES")
"""Variables by which JAX knows a cluster by itself: more than one task, host or slice."""
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""What the environment may say in place of `Hosts`' fields."""

NOT_FOUND = "the processes of this run did not find each other"
HOW_TO_START = (
    "start the same command on every host with the same --coordinator and --processes, and look "
    "whether its port is free and open"
)

_channel: ContextVar[str] = ContextVar("channel", default="main")
_counts: defaultdict[str, int] = defaultdict(int)
"""Channel -> exchanges so far."""
_used: defaultdict[str, deque[str]] = defaultdict(deque)
"""Channel -> keys of the store that are not deleted yet."""
_watch: watch.Watch | None = None


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Which process of a run this is; as it stands: what the environment says, or the only one."""

    coordinator: str = ""
    """HOST:PORT of process 0, as every process can reach it."""
    processes: int = 0
    """Processes of the run."""
    process: int = -1
    """This one, from 0."""
    patience: float = 30.0
    """Seconds of silence after which another process counts as dead, and all end."""


def from_environment(hosts: Hosts, environ: Mapping[str, str]) -> Hosts:
    """Fills what is empty from `VARIABLES`. Raises UserError for a variable that is no number."""

    def number(name: str, given: int, empty: int) -> int:
        text = environ.get(name, "")
        if given != empty or not text:
            return given
        if not text.isdecimal():
            raise UserError(f"{name} is {text!r}, expected a number; set it on every host")
        return int(text)

    address, count, this = VARIABLES
    return dataclasses.replace(
        hosts,
        coordinator=hosts.coordinator or environ.get(address, ""),
        processes=number(count, hosts.processes, 0),
        process=number(this, hosts.process, -1),
    )


def check(hosts: Hosts) -> None:
    """Raises UserError for fields that name no process."""
    if not hosts.coordinator:
        raise UserError(
            "several processes need a coordinator: --coordinator HOST:PORT "
            f"(or {VARIABLES[0]}), an address of process 0 that every host can reach"
        )
    name, _, port = hosts.coordinator.rpartition(":")
    if not name or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"coordinator is {hosts.coordinator!r}, expected HOST:PORT")
    if hosts.processes < 1:
        raise UserError(
            f"the number of processes is missing: --processes N (or {VARIABLES[1]}), on every host"
        )
    if not 0 <= hosts.process < hosts.processes:
        raise UserError(
            f"process is {hosts.process}, expected 0 to {hosts.processes - 1}; give every host its "
            f"own --process I (or {VARIABLES[2]})"
        )
    if not hosts.patience >= 3:
        raise UserError(f"patience is {hosts.patience:g} s, expected 3 or more: signs come each 1")


def connect(hosts: Hosts = Hosts(), environ: Mapping[str, str] = os.environ) -> None:
    """Joins the processes of a run, before anything else asks JAX for a device.

    Ends this process where the others do not come in `START_S`. Raises UserError for fields that
    name no process, and for an address that cannot be used.
    """
    hosts = from_environment(hosts, environ)
    told = hosts != Hosts(patience=hosts.patience)
    if told:
        check(hosts)
    if hosts.processes == 1 or not (told or any(_several(environ.get(c, "")) for c in CLUSTERS)):
        return
    import jax  # here, so that `rlbf --help` need not wait for it

    # SIGTERM is the training loop's, whose processes agree on the step after which they stop.
    jax.config.update("jax_enable_preemption_service", False)
    given: dict[str, Any] = {}
    if told:
        given = dict(
            coordinator_address=hosts.coordinator,
            num_processes=hosts.processes,
            process_id=hosts.process,
        )
    # JAX aborts a process whose patience is over; this comes first, and says how to mend it.
    alarm = threading.Timer(START_S, _give_up)
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=2 * START_S,
            heartbeat_timeout_seconds=int(3 * hosts.patience),
            shutdown_timeout_seconds=START_S,
        )
    except (RuntimeError, OSError, ValueError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{NOT_FOUND} ({cause}); {HOW_TO_START}") from error
    finally:
        alarm.cancel()
    if _state().num_processes > 1:
        global _watch
        _watch = watch.Watch(
            _state().client, _state().process_id, _state().num_processes, hosts.patience
        )


def _several(value: str) -> bool:
    return value not in ("", "0", "1") and (value.isdecimal() or "," in value)


def _give_up() -> None:
    watch.write_error(f"{NOT_FOUND} in {START_S} s; {HOW_TO_START}")
    os._exit(watch.EXIT_CODE)


def _state() -> Any:
    # What Orbax and JAX's own multihost_utils use; public names for it do not exist.
    from jax._src import distributed

    return distributed.global_state


def several() -> bool:
    """Whether this run has more processes than this one. Asks for no device."""
    return _watch is not None


def process() -> int:
    """This process, from 0. Asks for no device."""
    return _state().process_id if several() else 0


def is_first() -> bool:
    """Whether this process writes the files."""
    return process() == 0


def leave(code: int, reason: str = "") -> None:
    """Ends this process's part of a run that it has joined.

    With a reason all processes end, with this code; without one each waits for the others to get
    here. Does not return where the code is not 0, for JAX would then wait for the others again.
    """
    if _watch is None:
        return
    _watch.leave(code, reason)
    if code:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def await_verdict(error: BaseException) -> None:
    """To be called with an error that may be another process's end, as a collective sees it: if it
    is, this process ends here and says so. Returns after the time in which that is noticed."""
    if _watch is not None and not isinstance(error, UserError | KeyboardInterrupt):
        _watch.wait_for_verdict()


# What the processes tell each other ---------------------------------------------------------------


def from_first(make: Callable[[], Any]) -> Any:
    """JSON that process 0 makes, on every process; the others wait for it."""
    if not several():
        return make()
    key, client = _key("first"), _state().client
    if is_first():
        client.key_value_set(key, json.dumps(make()))
    return json.loads(client.blocking_key_value_get(key, watch.FOREVER_MS))


def first_alone(do: Callable[[], object]) -> None:
    """Process 0 does it; the others wait until it is done."""

    def done() -> None:
        do()

    from_first(done)


def gather(value: Any) -> list[Any]:
    """JSON of every process, by their numbers."""
    if not several():
        return [value]
    client, key = _state().client, _key("all")
    client.key_value_set(f"{key}/{process()}", json.dumps(value))
    keys = [f"{key}/{other}" for other in range(_state().num_processes)]
    values = [json.loads(client.blocking_key_value_get(k, watch.FOREVER_MS)) for k in keys]
    used = _used[_channel.get()]
    while len(used) > 1:  # all are here, so each has read what came before
        old = used.popleft()
        if is_first():
            client.key_value_delete(old)
    return values


def all_of(values: Sequence[int]) -> np.ndarray:
    """[processes, n] int64: so many numbers of every process, exchanged between the devices; for
    use in loops."""
    import numpy as np

    mine = np.asarray(values, np.int64)
    if not several():
        return mine[None]
    from jax.experimental import multihost_utils

    halves = multihost_utils.process_allgather(mine.view(np.int32))
    return np.ascontiguousarray(halves).view(np.int64)


def _key(kind: str) -> str:
    """The next key of the store; every process comes by the same keys of a channel in the same
    order."""
    channel = _channel.get()
    _counts[channel] += 1
    _used[channel].append(f"hosts/{channel}/{kind}/{_counts[channel]}")
    return _used[channel][-1]


@contextlib.contextmanager
def apart(channel: str) -> Iterator[None]:
    """Exchanges inside are of a channel of their own. For threads: which of two exchanges comes
    first is not the same on every process."""
    token = _channel.set(channel)
    try:
        yield
    finally:
        _channel.reset(token)


def same_everywhere(what: str, value: Any, mend: str) -> None:
    """Raises UserError, on every process, where one has another value than process 0."""
    values = gather(value)
    for other, theirs in enumerate(values):
        if theirs != values[0]:
            raise UserError(
                f"{what} is {_brief(theirs)} on process {other} and {_brief(values[0])} on process "
                f"0; {mend}"
            )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
