"""The front door: what `import rlbf_jax` gives, what it costs, and that names and signatures stay.

`python -m tests.test_api` renews tests/reference/public_api.txt.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import json
import pathlib
import subprocess
import sys
from typing import Any, ForwardRef

import pytest

import rlbf_jax as rj

SNAPSHOT = pathlib.Path(__file__).parent / "reference" / "public_api.txt"
ROOMS = ("rlbf_jax", "rlbf_jax.sampling")
RENEW = (
    "The public interface is another than tests/reference/public_api.txt says. If you did not mean "
    "to change it, change it back. If you did, that is a decision: name it in CHANGELOG.md, and "
    "renew the file with `python -m tests.test_api`."
)


# The snapshot -----------------------------------------------------------------------------------


def public_api() -> str:
    """Every public name with its signature, one room after the other."""
    return "\n".join(f"{room}\n{'=' * len(room)}\n\n{_room(room)}" for room in ROOMS)


def _room(name: str) -> str:
    room = importlib.import_module(name)
    lines = []
    for each in sorted(room.__all__):
        value = getattr(room, each)
        known = room is not rj and getattr(rj, each, None) is value
        lines.append(f"{each}: as rlbf_jax.{each}\n" if known else _entry(each, value))
    return "\n".join(lines)


def _entry(name: str, value: Any) -> str:
    if isinstance(value, type):
        return "\n".join([f"class {name}", *_fields(value), *_members(value), ""])
    if inspect.isfunction(value):
        return f"{name}{_signature(value)}\n"
    return f"{name}: {type(value).__name__}\n"


def _fields(kind: type) -> list[str]:
    if issubclass(kind, enum.Enum):
        return [f"    {member.name} = {member.value!r}" for member in kind]
    if dataclasses.is_dataclass(kind):
        return [f"    {f.name}: {_written(f.type)}{_default(f)}" for f in dataclasses.fields(kind)]
    if hasattr(kind, "_fields"):
        hints = kind.__annotations__
        return [f"    {name}: {_written(hints[name])}" for name in kind._fields]
    constructor = vars(kind).get("__init__")
    own = inspect.isfunction(constructor) and not getattr(kind, "_is_protocol", False)
    return [f"    __init__{_signature(constructor)}"] if own else []


def _members(kind: type) -> list[str]:
    """Methods and properties that the package defines, inherited ones too."""
    members = {}
    for parent in reversed(kind.__mro__):
        if parent.__module__.startswith("rlbf_jax"):
            members |= vars(parent)
    lines = []
    for name, value in sorted(members.items()):
        if name.startswith("_") and name != "__call__":
            continue
        plain = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if isinstance(value, property):
            returns = _written(value.fget.__annotations__.get("return", "Any"))
            lines.append(f"    {name} -> {returns}")
        elif inspect.isfunction(plain):
            lines.append(f"    {name}{_signature(plain)}")
    return lines


def _signature(function: Any) -> str:
    """As `inspect.signature` has it, annotations as they are written in the source."""
    signature = inspect.signature(function)
    parameters, bare = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not bare:
            parameters.append("*")
        bare = bare or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        text = stars.get(parameter.kind, "") + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {_written(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {_value(parameter.default)}"
        parameters.append(text)
    returns = signature.return_annotation
    end = "" if returns is signature.empty else f" -> {_written(returns)}"
    return f"({', '.join(parameters)}){end}"


def _written(annotation: Any) -> str:
    if isinstance(annotation, ForwardRef):
        return annotation.__forward_arg__
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "Any")


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {_value(field.default)}"
    if field.default_factory is not dataclasses.MISSING:
        return f" = {getattr(field.default_factory, '__name__', '...')}()"
    return ""


def _value(value: Any) -> str:
    """A default; a configuration by its class alone, whose own defaults are not frozen here."""
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}(...)"
    return str(value) if isinstance(value, enum.Enum) else repr(value)


def test_public_names_and_signatures_are_as_they_were():
    now, before = public_api(), SNAPSHOT.read_text(encoding="utf-8")
    changed = [f"- {line}" for line in before.splitlines() if line not in now.splitlines()]
    changed += [f"+ {line}" for line in now.splitlines() if line not in before.splitlines()]
    assert now == before, "\n".join([RENEW, *changed])


def test_a_changed_default_is_seen():
    def before(a: int, *, b: str = "x") -> None: ...
    def after(a: int, *, b: str = "y") -> None: ...

    assert _signature(before) == "(a: int, *, b: str = 'x') -> None"
    assert _signature(before) != _signature(after)


# The door ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ROOMS)
def test_every_name_is_there_and_listed(room):
    module = importlib.import_module(room)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is getattr(module, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = module.nonsense


def test_type_checkers_see_the_same_names():
    """What stands below `TYPE_CHECKING` is what `__getattr__` gives."""
    source = pathlib.Path(rj.__file__).read_text(encoding="utf-8")
    block = source.partition("if TYPE_CHECKING:\n")[2].partition("\n\n")[0]
    seen: dict[str, Any] = {}
    exec("\n".join(line.strip() for line in block.splitlines()), seen)
    seen.pop("__builtins__")
    assert sorted([*seen, "__version__"]) == sorted(rj.__all__)
    assert all(getattr(rj, name) is value for name, value in seen.items())


def test_no_public_name_is_a_submodules():
    """`import rlbf_jax.run` would put a module in the place of the function."""
    for room in ROOMS:
        module = importlib.import_module(room)
        folder = pathlib.Path(module.__file__ or "").parent
        parts = {path.stem for path in folder.iterdir()}
        assert not parts & set(module.__all__)


def loaded_after(statement: str) -> set[str]:
    """Modules of a fresh process that has run a statement."""
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(out.stdout.splitlines()[-1]))


HEAVY = {"jax", "jaxlib", "numpy", "flax", "optax", "orbax", "tyro", "matplotlib", "grain"}


@pytest.mark.parametrize(
    "statement",
    [
        "import rlbf_jax",
        "from rlbf_jax.sampling import __all__",
        "from rlbf_jax.cli import main; main.main(['--help'])",
    ],
)
def test_the_door_is_light(statement):
    """What is imported, because how long it takes is the machine's."""
    before, after = loaded_after("pass"), loaded_after(statement)
    assert not after & HEAVY
    ours = {name for name in after - before if name.startswith("rlbf_jax")}
    assert "rlbf_jax" in ours and len(ours) <= 10
    if statement == "import rlbf_jax":
        assert ours == {"rlbf_jax"} and len(after - before) <= 30


def test_a_name_brings_only_what_it_needs():
    after = loaded_after("import rlbf_jax; rlbf_jax.Knobs")
    assert "rlbf_jax.sampling.request" in after and "rlbf_jax.runs.execute" not in after


def test_setup_reads_the_version():
    source = pathlib.Path(rj.__file__).read_text(encoding="utf-8")
    assert source.split('__version__ = "')[1].split('"')[0] == rj.__version__


if __name__ == "__main__":
    SNAPSHOT.write_text(public_api(), encoding="utf-8")
    print(f"written: {SNAPSHOT}")
