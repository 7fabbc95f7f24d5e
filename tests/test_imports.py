"""The house: imports go downstairs only, there are no cycles, and no module outgrows its reader."""

from __future__ import annotations

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "rlbf_jax"

# Ground floor first. Rooms on one line may not import each other in a circle,
# which the cycle test sees to.
FLOORS = [
    ["errors", "ranges", "storage", "plain"],
    ["directives", "parallel", "objectives", "progress"],
    ["tokenizers", "endpoints", "gguf_file"],
    ["models", "data"],
    ["sampling"],
    ["critics", "attacks"],
    ["training"],
    ["evaluation"],
    ["report"],
    ["runs"],
    ["methods"],
    ["planning"],
    ["harness", "serving"],
    ["cli"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FORBIDDEN = {"tensorflow", "torch", "pickle", "xmanager"}
MAX_LINES, MAX_FUNCTION = 400, 60


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(
    name: str, source: str, modules: set[str], is_package: bool = False, for_types: bool = True
) -> set[str]:
    """Full names of everything that `source`, the text of module `name`,
    imports, inside functions too.

    `for_types`: also what only a type checker imports, below `if TYPE_CHECKING:`.
    """
    found: set[str] = set()
    tree = ast.parse(source)
    for_checkers = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_checkers and not for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".")[
                : (None if node.level == 0 else -node.level + is_package or None)
            ]
            base = ".".join(
                [*(parents if node.level else []), *([node.module] if node.module else [])]
            )
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in modules else base)
    return found


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def imports_of(name: str, for_types: bool = True) -> set[str]:
    path = MODULES[name]
    source = path.read_text(encoding="utf-8")
    return imported(name, source, set(MODULES), path.name == "__init__.py", for_types)


def upstairs(name: str, targets: set[str]) -> list[str]:
    """Imports that do not go downstairs: another room on a higher floor, or anything at all from
    the front door, which hands out names when they are first used."""
    mine = FLOOR.get(room(name), -1)
    ours = [t for t in sorted(targets) if t.startswith("rlbf_jax.") and room(t) != room(name)]
    return [t for t in ours if FLOOR[room(t)] > mine]


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of the graph as a path, or an empty list."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if cycle := visit(target, [*path, node]):
                return cycle
        done.add(node)
        return []

    for start in graph:
        if cycle := visit(start, []):
            return cycle
    return []


def test_every_room_has_a_floor():
    unknown = {room(name) for name in MODULES} - set(FLOOR) - {""}
    assert not unknown, f"add {sorted(unknown)} to FLOORS and to docs/design.md"


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downstairs(name):
    at_the_door = name == "rlbf_jax"  # which shows its names to type checkers, and imports none
    bad = upstairs(name, imports_of(name, for_types=not at_the_door))
    assert not bad, f"{name} imports upstairs: {', '.join(bad)}"


@pytest.mark.parametrize("name", MODULES)
def test_no_forbidden_packages(name):
    assert not {target.split(".")[0] for target in imports_of(name)} & FORBIDDEN


@pytest.mark.parametrize("name", MODULES)
def test_module_is_short_enough(name):
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name} has {lines} lines; split it along its ideas"


@pytest.mark.parametrize("name", MODULES)
def test_functions_are_short_enough(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= MAX_FUNCTION
    ]
    assert not long, f"{name}: {', '.join(long)}; split them along their ideas"


def test_no_cycles():
    """Names that only annotations need may go round: a stage is called with its run."""
    graph = {
        name: {t for t in imports_of(name, for_types=False) if t in MODULES and t != name}
        for name in MODULES
    }
    assert find_cycle(graph) == []


def test_the_checks_can_fail():
    modules = {"rlbf_jax.data.schema", "rlbf_jax.runs.execute", "rlbf_jax.cli.main"}
    source = "def f():\n    from rlbf_jax.runs import execute\n"
    assert imported("rlbf_jax.data.schema", source, modules) == {"rlbf_jax.runs.execute"}
    assert upstairs("rlbf_jax.data.schema", {"rlbf_jax.runs.execute"}) == ["rlbf_jax.runs.execute"]
    assert upstairs("rlbf_jax", {"rlbf_jax.cli.main"}) == ["rlbf_jax.cli.main"]
    assert upstairs("rlbf_jax.runs.execute", {"rlbf_jax.methods.rlbf"}) == ["rlbf_jax.methods.rlbf"]
    assert upstairs("rlbf_jax.runs.execute", {"rlbf_jax.data.schema", "numpy"}) == []
    assert imported("rlbf_jax.data.schema", "from . import world", {"rlbf_jax.data.world"}) == {
        "rlbf_jax.data.world"
    }
    assert imported("rlbf_jax.data", "from .world import World", set(), True) == {
        "rlbf_jax.data.world"
    }
    typed = "if TYPE_CHECKING:\n    import rlbf_jax.runs.execute\nimport rlbf_jax.cli.main\n"
    assert imported("rlbf_jax.data.schema", typed, modules) == modules - {"rlbf_jax.data.schema"}
    assert imported("rlbf_jax.data.schema", typed, modules, for_types=False) == {
        "rlbf_jax.cli.main"
    }
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
