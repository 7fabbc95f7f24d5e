"""`rlbf run | plan | generate | chat | evaluate | attack | report | critic | audit | data |
import | export`: dispatch, thin and lazy; every command has a file of its own beside this one."""

from __future__ import annotations

import difflib
import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

from rlbf_jax.cli.surroundings import check_environment, mend_streams
from rlbf_jax.errors import Preempted, UserError, machine_error
from rlbf_jax.parallel import hosts
from rlbf_jax.training.preemption import EXIT_CODE, interruptible

Command = Callable[[Sequence[str]], None]

COMMANDS = {
    "run": "run:run",
    "plan": "plan:plan",
    "generate": "generate:generate",
    "chat": "chat:chat",
    "evaluate": "evaluate:evaluate",
    "attack": "attack:attack",
    "report": "report:report",
    "critic": "audit:train_critic",
    "audit": "audit:audit_critic",
    "data": "data:data",
    "import": "models:import_model",
    "export": "models:export_model",
}
"""Command -> module of this room and function."""

USAGE = """usage: rlbf COMMAND ...

Language models that take back what they should not have said.

  run        run an experiment: its stages in order, then the report; resumes where it stopped
  plan       say what an experiment will take on each chip, without running it
  generate   sample from a stage of a run and show what was taken back
  chat       talk to a stage of a run, or to any checkpoint
  evaluate   evaluate a stage of a run again
  attack     attack a stage of a run with more than its evaluation did
  report     rebuild report.md, report.html and plots/ of a run, or put several runs side by side
  critic     train a classifier as a critic on labelled texts
  audit      measure a critic on labelled texts
  data       train a tokenizer, build BSAFE+ from your own file
  import     read a Hugging Face checkpoint, or a GGUF file, into a model folder
  export     write a model folder, or a stage of a run, as a Hugging Face checkpoint

`rlbf COMMAND --help` lists a command's options; \
`rlbf run FILE --help` lists every value of an experiment.
"""


def dispatch(
    commands: Mapping[str, Command | str], prefix: str, usage: str, argv: Sequence[str]
) -> None:
    """Runs the command that the first argument names. Raises UserError where there is none."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage, end="")
        if not argv:
            raise UserError(f"{prefix} needs a command: {', '.join(commands)}")
        return
    if argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(commands)}"
        raise UserError(f"{prefix} has no command {argv[0]!r}; {hint}")
    command = commands[argv[0]]
    if isinstance(command, str):
        module, _, name = command.partition(":")
        command = getattr(importlib.import_module(f"rlbf_jax.cli.{module}"), name)
    command(argv[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `rlbf`. Returns the exit code: 0, 2 for what the user can mend,
    130 when interrupted."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's chatter would tear progress bars
    keep_compiled_programs()
    mend_streams()
    argv = sys.argv[1:] if argv is None else list(argv)
    again = f"go on with: {shlex.join(['rlbf', *argv])}"

    def command() -> None:
        check_environment(os.environ)
        dispatch(COMMANDS, "rlbf", USAGE, argv)

    return exit_code(command, again)


def exit_code(command: Callable[[], None], again: str) -> int:
    """Runs a command and says on one line what stopped it.

    Args:
      again: how to go on after an interruption.

    Returns 0, 2 for what the user can mend, 130 when interrupted; all other errors are raised.
    """
    try:
        with interruptible(f"stopped at once; {again}"):
            command()
    except Preempted as stop:  # all processes of a run are, after the same step
        print(f"{stop}; {again}", file=sys.stderr)
        hosts.leave(EXIT_CODE)
        return EXIT_CODE
    except KeyboardInterrupt as stop:
        print(f"{str(stop) or 'interrupted'}; {again}", file=sys.stderr)
        hosts.leave(EXIT_CODE, "interrupted")
        return EXIT_CODE
    except BrokenPipeError:  # `rlbf generate ... | head`: nobody reads on, which is no mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        hosts.await_verdict(error)
        message = str(error) if isinstance(error, UserError) else machine_error(error)
        if not message:
            if hosts.several():
                traceback.print_exc()
                hosts.leave(1, f"{type(error).__name__}: {error}")
            raise
        message = " ".join(message.split())
        print("error: " + message, file=sys.stderr)
        hosts.leave(2, message)
        return 2
    hosts.leave(0)
    return 0


def keep_compiled_programs() -> None:
    """Compiled programs outlive the process (JAX's persistent cache),
    so that a second command starts in seconds."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(home, "rlbf_jax", "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


if __name__ == "__main__":
    sys.exit(main())
