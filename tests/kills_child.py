"""The other process of `kills.py`: imports everything once, then forks a child for every command
that it is told.

What a child does with files of its run (opens for writing, renames, removals) is counted by an
audit hook, which can end it at an exact one of them: inside a checkpoint, between a file and its
final name. The package knows nothing of it.
"""

import dataclasses
import functools
import json
import os
import signal
import sys

from rlbf_jax.cli import main as cli
from rlbf_jax.data import datasets, packing  # noqa: F401  imported here, so that no child has to
from rlbf_jax.data.builders import bsafe_plus  # noqa: F401  imported here, so that no child has to
from rlbf_jax.runs import execute as runner

EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def main():
    """Reads one JSON order a line. Returns an exit code, in a child only; never returns in the
    parent before EOF."""
    out = os.dup(1)

    def tell(**what):
        os.write(out, json.dumps(what).encode() + b"\n")

    tell(event="ready")
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return obey(order, tell)
        tell(event="began", pid=pid)
        tell(event="ended", code=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return 0


def obey(order, tell):
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(old, new)
    if order.get("only"):
        runner.run = functools.partial(runner.run, only=order["only"])
    Watch(order, tell)
    return cli.main(order["argv"])


class Watch:
    """Follows a run through its stages, and strikes once: at a touch of a file, or at the end of
    the stage."""

    def __init__(self, order, tell):
        self.folder, self.plan, self.tell = order["folder"], order.get("plan"), tell
        self.touches = open(order["touches"], "a") if order.get("touches") else None
        self.stage, self.count, self.struck = "start", 0, False
        run_stage, write_report = runner.run_stage, runner.write_report

        def staged(work, stage, number):
            do = self.within(stage.name, stage.do)
            run_stage(work, dataclasses.replace(stage, do=do), number)

        runner.run_stage, runner.write_report = staged, self.within("report", write_report)
        sys.addaudithook(self.hear)

    def within(self, name, call):
        def called(*args):
            self.stage, self.count = name, 0
            if self.plan and self.plan["stage"] == name and not self.plan["touch"]:
                self.strike()
            call(*args)
            if self.plan and self.plan["stage"] == name:
                self.strike()
            self.stage = "between"

        return called

    def hear(self, event, args):
        if event == "open":
            mode, flags = args[1] or "", args[2] or 0
            if not (set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR)):
                return
        elif event not in EVENTS:
            return
        path = args[0]
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(self.folder):
            return
        if self.touches and "touches" not in os.fspath(path):
            self.touches.write(
                f"{self.stage} {event} {os.fspath(path).removeprefix(self.folder)}\n"
            )
            self.touches.flush()
        plan = self.plan
        if (
            plan
            and plan["stage"] == self.stage
            and plan["touch"]
            and plan["match"] in os.fspath(path)
        ):
            self.count += 1
            if self.count == plan["touch"]:
                self.strike()

    def strike(self):
        if self.struck:
            return
        self.struck = True
        self.tell(event="strike", stage=self.stage)
        if not self.plan.get("delay"):  # otherwise whoever reads `strike` does it
            os.kill(os.getpid(), self.plan.get("signal", signal.SIGKILL))


if __name__ == "__main__":
    sys.exit(main())
