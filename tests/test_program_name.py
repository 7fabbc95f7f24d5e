"""The machinery knows no paper: outside `methods/`, "rlbf" is the name of the program alone."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "rlbf_jax"
NAME = re.compile("rlbf", re.IGNORECASE)

COMMANDS = "run|plan|generate|chat|evaluate|attack|report|critic|audit|data|import|export|COMMAND"
ALLOWED = {
    rf"\brlbf ({COMMANDS})\b": "a command, in usage, help and messages",
    r"\brlbf_jax\b": "the package: module paths, its cache folder, versions, file formats",
    r"\brlbf_(controls|rule|policy)\.json\b": "files that exports carry beside a checkpoint",
}
"""Pattern -> why text outside `methods/` may hold it."""

PLACES = {
    ("cli/main.py", "rlbf"): "the console command, in usage and in how to go on",
    ("cli/audit.py", "rlbf "): "the same, before a command's name",
    ("cli/run.py", "rlbf "): "the same",
    ("cli/run.py", "rlbf_experiment"): "module name that an experiment file is imported under",
    ("harness/inspect_provider.py", "rlbf"): "name of the provider of inspect_ai",
    ("harness/inspect_registry.py", "rlbf"): "the same, where it is registered",
    ("harness/lm_eval_model.py", "rlbf"): "name of the model of lm-eval (--model rlbf)",
    (
        "harness/lm_eval_model.py",
        "rlbf-",
    ): "beginning of its tokenizer's name in the harness's caches",
    ("harness/lm_eval_model.py", "\x02rlbf conversation "): "mark of a conversation in its prompts",
    ("harness/lm_eval_model.py", "rlbf: log-likelihoods"): "label of its progress bar",
    ("harness/lm_eval_model.py", "rlbf: answers"): "the same",
}
"""(file, literal) -> why."""


def literals(source: str) -> list[tuple[int, str]]:
    """(line, text) of every string literal that is no docstring, parts of f-strings included."""
    tree = ast.parse(source)
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare
    ]


def left_over(text: str) -> str:
    """The text without what is allowed everywhere."""
    for pattern in ALLOWED:
        text = re.sub(pattern, "", text)
    return text


def offenders(path: str, source: str) -> list[str]:
    """Where a file names the paper."""
    return [
        f"rlbf_jax/{path}:{line}: {text!r}"
        for line, text in literals(source)
        if (path, text) not in PLACES and NAME.search(left_over(text))
    ]


def sources() -> dict[str, str]:
    return {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
        if "methods" not in path.relative_to(PACKAGE).parts
    }


@pytest.mark.parametrize("path", sources())
def test_the_paper_is_named_in_methods_only(path):
    bad = offenders(path, sources()[path])
    why = "a stage, method or data set of one paper belongs into its file in methods/"
    assert not bad, f"{why}: {', '.join(bad)}"


def test_templates_name_no_paper():
    for path in PACKAGE.rglob("templates/*"):
        if path.is_file():
            assert not NAME.search(left_over(path.read_text(encoding="utf-8"))), path


def test_every_listed_place_is_there():
    found = {(path, text) for path, source in sources().items() for _, text in literals(source)}
    assert set(PLACES) <= found


def test_the_check_can_fail():
    source = '"""rlbf."""\nstage = "rlbf"\nlabel = f"{x}_rlbf"\nhelp = "see `rlbf run`"\n'
    assert [bad.split(":")[1] for bad in offenders("runs/run.py", source)] == ["2", "3"]
    assert offenders("cli/main.py", 'main("rlbf")') == []
