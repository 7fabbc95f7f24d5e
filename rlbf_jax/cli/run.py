"""`rlbf run FILE`: an experiment from a Python file, its stages in order, then the report."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import pathlib
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from rlbf_jax.cli import arguments
from rlbf_jax.errors import UserError
from rlbf_jax.parallel.hosts import Hosts, connect, is_first

USAGE = """usage: rlbf run FILE [--workdir DIR] [--dotted.override value ...]

Run an experiment: its stages in order, then the report. \
Finished stages are skipped, a broken one is
resumed. FILE is a Python file with get_config(), as experiments/quickstart.py;
`rlbf run FILE --help` lists what it can change.
"""


def load_experiment(file: pathlib.Path) -> tuple[Any, str]:
    """The configuration that an experiment's `get_config()` returns,
    and the experiment's docstring.

    Raises:
        UserError: no such file, a syntax error in it, or no `get_config()`
          that returns a dataclass.
    """
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; expected a Python file with get_config(), as "
            "experiments/quickstart.py"
        )
    spec = importlib.util.spec_from_file_location("rlbf_experiment", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(
        0, str(file.resolve().parent)
    )  # as `python FILE` does: an experiment may import its neighbors
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(
                f"{file}: defines no get_config(); it must return the experiment's configuration"
            )
        config = module.get_config()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(file)
        ]
        where = f"{file}, line {lines[-1]}" if lines else str(file)
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise UserError(
            f"{file}: get_config() returned a {type(config).__name__}, expected a dataclass "
            "instance"
        )
    return config, module.__doc__ or ""


def parse_run(file: pathlib.Path, rest: Sequence[str]) -> tuple[Any, pathlib.Path, Hosts]:
    """(configuration with `--dotted.override value` applied, workdir, which process of the run)
    of `rlbf run FILE ...`."""
    folder = Annotated[
        pathlib.Path,
        tyro.conf.arg(help="Folder for everything the run writes; an old one is resumed."),
    ]
    default = dataclasses.field(default=pathlib.Path("runs") / file.stem)
    hosts: Any = Annotated[Hosts, tyro.conf.arg(name="")]
    every = [("workdir", folder, default), ("hosts", hosts, dataclasses.field(default=Hosts()))]
    args = parse_experiment("run", file, rest, every)
    return args.config, args.workdir, args.hosts


def parse_experiment(
    command: str, file: pathlib.Path, rest: Sequence[str], fields: Sequence[tuple[str, Any, Any]]
) -> Any:
    """What `rlbf COMMAND FILE ...` says: `config`, with `--dotted.override value` applied, and the
    command's own options.

    Args:
      fields: own options, as (name, type, `dataclasses.field`).

    Raises UserError for a file, option or value that cannot be used.
    """
    config, description = load_experiment(file)
    own = {name for name, _, _ in fields}
    if taken := sorted(own & {field.name for field in dataclasses.fields(config)}):
        raise UserError(
            f"{file}: the configuration has a field {taken[0]}, which --{taken[0]} stands for; "
            "rename it"
        )
    # An empty name puts the configuration's fields beside the options, not below a prefix.
    nested: Any = Annotated[_kind(config), tyro.conf.arg(name="")]
    every = [*fields, ("config", nested, dataclasses.field(default_factory=lambda: config))]
    return _parsed(
        file,
        config,
        dataclasses.make_dataclass(command.title(), every, frozen=True),
        f"rlbf {command} {file}",
        rest,
        description,
    )


def _kind(config: Any) -> Any:
    """The type that options are read from: an experiment's knows its method's settings."""
    method = getattr(config, "method", None)
    if method is None or not dataclasses.is_dataclass(method):
        return type(config)
    return type(config)[type(method)]  # type: ignore[index]


def _parsed(
    file: pathlib.Path, config: Any, kind: Any, command: str, rest: Sequence[str], description: str
) -> Any:
    """Parses options; a flag that belongs to another paper is refused with that paper's name."""
    try:
        return arguments.parse(kind, command, rest, description)
    except arguments.UnknownOption as error:
        owner = _owner(error.option, config)
        if not owner:
            raise
        hint = error.hint or _nearest(error.option, config)
        raise UserError(
            f"{error.option}: a setting of {owner}, and {file} runs {_title(config)}{hint}; "
            f"{error.listed}"
        ) from None


def _nearest(option: str, config: Any) -> str:
    """The experiment's own option that is most like another paper's."""
    from rlbf_jax.plain import field_names

    parts = (type(config.method), type(config.base), type(config))
    names = [f"--{name}" for kind in parts for name in field_names(kind)]
    near = difflib.get_close_matches(option, names, n=1, cutoff=0)
    return f" (did you mean {near[0]}?)" if near else ""


def _title(config: Any) -> str:
    return f"{config.method.name} ({config.method.paper})"


def _owner(option: str, config: Any) -> str:
    """The methods, other than the experiment's, that have this option."""
    method = getattr(config, "method", None)
    if method is None:
        return ""
    from rlbf_jax.methods import METHODS
    from rlbf_jax.plain import field_names

    name = option.removeprefix("--")
    owners = [m for m in METHODS.values() if m is not type(method) and name in field_names(m)]
    return " and ".join(f"{m.name} ({m.paper})" for m in owners)


def run(argv: Sequence[str]) -> None:
    """`rlbf run FILE`."""
    if not argv or argv[0].startswith("-"):
        print(USAGE, end="")
        if argv and argv[0] in ("-h", "--help"):
            return
        raise UserError("run needs a FILE first" + (f", found {argv[0]}" if argv else ""))
    try:
        config, workdir, hosts = parse_run(pathlib.Path(argv[0]), argv[1:])
    except ValueError as error:  # a configuration that checks its own values
        raise UserError(f"{argv[0]}: {error}") from error
    from rlbf_jax.runs import execute

    connect(hosts)
    execute.run(config, workdir)
    if is_first():
        print(f"report: {workdir / 'report.html'}")
