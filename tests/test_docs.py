"""The Python of the pages runs: each page in one namespace, block by block, in order."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import numpy as np
import pytest

import rlbf_jax as rj
from rlbf_jax.cli import main as cli
from rlbf_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = {"README.md": 2, "docs/api.md": 13}
"""Pages and the number of their blocks: a block that is no longer seen as one would go unrun."""


def blocks(page: str) -> list[tuple[int, str]]:
    """(line at which it begins, source) of every Python block of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(text[: m.start(1)].count("\n"), m.group(1)) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, small_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(small_run)
    monkeypatch.chdir(tmp_path)
    sources = blocks(page)
    assert len(sources) == PAGES[page]
    namespace: dict[str, Any] = {"__name__": "page"}
    for line, source in sources:
        # Behind so many empty lines an error names the line of the page.
        exec(compile("\n" * line + source, str(ROOT / page), "exec"), namespace)
    assert "policy" in namespace and capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_no_wider_than_code(page):
    for line, source in blocks(page):
        for number, text in enumerate(source.splitlines(), line + 1):
            assert len(text) <= 100, f"{page}:{number} is {len(text)} columns wide"


CODE = re.compile(r"`(?:rlbf_jax/)?((?:\w+/)+\w+\.py)`")


def test_files_that_pages_name_are_there():
    pages = [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    named = [(page.name, name) for page in pages for name in CODE.findall(page.read_text("utf-8"))]
    assert len(named) > 20
    roots = (ROOT, ROOT / "rlbf_jax")
    assert [n for n in named if not any((root / n[1]).is_file() for root in roots)] == []


def test_load_opens_a_run_a_stage_and_a_checkpoint(small_run, tmp_path):
    exported = tmp_path / "exported"
    assert cli.main(["export", str(small_run / "stages" / "sft"), str(exported)]) == 0
    for folder, name in (
        (small_run, "rlbf"),
        (str(small_run / "stages" / "sft"), "sft"),
        (exported, str(exported)),
    ):
        policy = rj.load(folder)
        assert policy.name == name
        (answer,) = policy.sample(["Tell me about gardening."])
        assert np.abs(policy.score([answer])[0] - answer.logprobs).max() < 1e-4
    assert rj.load(small_run, "base").name == "base"
    with pytest.raises(UserError, match="no run, hence no stage 'sft' of it"):
        rj.load(exported, "sft")


def test_every_public_name_has_a_story():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    code = "\n".join(source for _, source in blocks("docs/api.md"))
    for name in set(rj.__all__) - {"__version__"}:
        assert re.search(rf"`[\w.]*{name}`", text), f"docs/api.md does not say what {name} is"
        assert re.search(rf"\brj\.{name}\b", code) or name in ("Policy", "Generation"), name
