"""docs/extending.md is true: its files, registered by its lines, run to a report.

Also: every method that there is can be described, stored, read back and listed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import re
import sys
import types

import numpy as np
import pytest

from rlbf_jax.attacks.registry import ATTACKS
from rlbf_jax.cli import main as cli
from rlbf_jax.critics.registry import CRITICS
from rlbf_jax.directives import Controls, Semantics
from rlbf_jax.directives.controls import RULES
from rlbf_jax.evaluation.columns import COLUMNS
from rlbf_jax.evaluation.suite import SuiteConfig
from rlbf_jax.methods import METHODS
from rlbf_jax.runs.execute import recipe, run
from rlbf_jax.runs.experiment import BaseConfig, Experiment
from rlbf_jax.runs.manifest import experiment_from
from rlbf_jax.sampling import Knobs, Policy, Request, Single
from tests import small_run
from tests.fakes import LetterTokenizer, random_model
from tests.test_docs import blocks

PAGE = "docs/extending.md"
TEXT = (pathlib.Path(__file__).resolve().parent.parent / PAGE).read_text(encoding="utf-8")
FILES = {source.split("\n", 1)[0].removeprefix("# "): source for _, source in blocks(PAGE)}
"""Path -> text of the files that the page shows."""
ASKED = ("none", "direct", "one_word")


def load_page(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, types.ModuleType]:
    """The page's files, written below a folder and imported as if they stood in the package."""
    modules = {}
    for path, source in FILES.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
        if path.startswith("experiments/"):
            continue
        name = path.removesuffix(".py").replace("/", ".")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        modules[file.stem] = module
    return modules


@pytest.fixture(scope="module")
def registered():
    """Makes the page's lines true, for as long as the tests of this file last."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def page(registered, tmp_path_factory):
    """The page's modules, registered in the five lists."""
    modules = load_page(tmp_path_factory.mktemp("page"), registered)
    for spec in modules["one_word"].SPECS:
        registered.setitem(ATTACKS, spec.name, spec)
    registered.setitem(CRITICS, "no_z", modules["no_z"].NoZ)
    registered.setitem(METHODS, "parrot", modules["parrot"].ParrotConfig)
    rule = modules["backspace"].BackspaceRule
    registered.setitem(RULES, "backspace", lambda controls, at: rule(at))
    COLUMNS.append(modules["excitement"].EXCLAMATIONS)
    yield modules
    COLUMNS.remove(modules["excitement"].EXCLAMATIONS)


@pytest.fixture(scope="module")
def parrot(page, tmp_path_factory):
    """Folder of a finished run of the page's method, attack and metric."""
    method = page["parrot"].ParrotConfig(parrot_examples=60, parrot_sft=small_run.FEW)
    e = Experiment(
        method,
        data=small_run.DATA,
        base=BaseConfig(small_run.MODEL, small_run.FEW),
        evaluation=SuiteConfig(attacks=ASKED, n=2),
        sampling_batch=4,
        perplexity_examples=4,
    )
    folder = tmp_path_factory.mktemp("parrot") / "run"
    run(e, folder)
    return folder


def records(folder: pathlib.Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())


def rows(folder: pathlib.Path, stage: str) -> list[dict]:
    lines = (folder / "evaluation" / f"{stage}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# The page ---------------------------------------------------------------------------------------


def test_lines_of_the_page_name_what_its_files_define(page):
    """Each indented line below "The line, in `LIST` of `FILE`" is about a list of that file."""
    lines = re.findall(r"The line, in `(\w+)` of `([\w/.]+)`:\n\n    (.+)\n", TEXT)
    assert [name for name, _, _ in lines] == ["ATTACKS", "COLUMNS", "CRITICS", "PAPERS", "RULES"]
    for name, path, line in lines:
        source = (pathlib.Path(__file__).resolve().parent.parent / path).read_text()
        assert re.search(rf"^{name}\b.*=", source, re.MULTILINE), f"{path} has no {name}"
        words = set(re.findall(r"\w+", line))
        assert words & {n for m in page.values() for n in (*vars(m), m.__name__.split(".")[-1])}


def test_files_of_the_page_are_not_in_the_way():
    root = pathlib.Path(__file__).resolve().parent.parent
    assert len(FILES) == 7 and not [path for path in FILES if (root / path).exists()]


def test_the_attack_is_asked_of_every_stage(parrot):
    for stage in ("base", "parrot_sft"):
        asked = [row for row in rows(parrot, stage) if row["attack"] == "one_word"]
        assert len(asked) == 2 and all(row["num_forced"] for row in asked)
        assert {row["prefix"] for row in asked} == {"Well"}
    assert {r["stage"] for r in records(parrot) if r["attack"] == "one_word"} >= {"parrot_sft"}


def test_the_metric_is_in_rows_records_and_report(parrot, page):
    every = rows(parrot, "parrot_sft")
    assert all(row["metrics"]["exclamations"] == row["visible"].count("!") for row in every)
    answer = types.SimpleNamespace(response=types.SimpleNamespace(final="Oh! Ah!"))
    assert page["excitement"].EXCLAMATIONS.value(answer) == 2
    found = [r for r in records(parrot) if r["metric"] == "exclamations"]
    assert {r["attack"] for r in found} == set(ASKED)
    report = (parrot / "report.md").read_text().replace("\\_", "_")
    assert "exclamations" in report and "exclamation marks in the final visible text" in report
    assert "one_word" in report and "parrot_sft" in report


def test_the_methods_stages_are_there(parrot):
    manifest = json.loads((parrot / "manifest.json").read_text())
    names = [stage["name"] for stage in manifest["stages"]]
    assert names[:5] == ["tokenizer", "pretraining_data", "parrot_data", "base", "parrot_sft"]
    assert manifest["config"]["method"] == "parrot" and manifest["config"]["parrot_examples"] == 60
    assert {path.name for path in (parrot / "done").iterdir() if path.is_file()} >= set(names)


def test_commands_know_nothing_of_the_method(parrot, registered, monkeypatch, capsys):
    monkeypatch.delitem(METHODS, "parrot")
    monkeypatch.setitem(sys.modules, "rlbf_jax.methods.parrot", None)
    before = (parrot / "report.md").read_text()
    assert cli.main(["report", str(parrot)]) == 0
    assert (parrot / "report.md").read_text() == before
    asked = ["--prompt", "Tell me about gardening.", "--max_tokens", "8", "--json"]
    assert cli.main(["generate", str(parrot), *asked]) == 0
    assert '"prompt": "Tell me about gardening."' in capsys.readouterr().out


def test_the_options_of_the_method_are_listed(page, tmp_path, capsys):
    file = tmp_path / "parrot_experiment.py"
    file.write_text(FILES["experiments/parrot.py"])
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(file), "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--parrot_examples" in shown and "--parrot_sft.steps" in shown
    assert "--reinforcement" not in shown
    assert cli.main(["run", str(file), "--sft.steps", "3"]) == 2
    assert "a setting of rlbf (RLBF, arXiv 2602.08377)" in capsys.readouterr().err


def test_the_critic_trains_and_records_name_it(page, tmp_path):
    e = small_run.get_config().replace(critic="no_z", evaluation=SuiteConfig(attacks=ASKED, n=2))
    only = [s.name for s in recipe(e) if s.name not in ("evaluate_base", "evaluate_sft")]
    run(e, tmp_path / "run", only)
    of_rlbf = [r for r in records(tmp_path / "run") if r["stage"] == "rlbf"]
    assert of_rlbf and {r["critic"] for r in of_rlbf} == {"no_z"}
    assert {r["judge"] for r in of_rlbf if r["metric"] == "asr"} == {"toy_grammar"}
    (verdict,) = CRITICS["no_z"](types.SimpleNamespace(categories=("odd",))).judge(
        [types.SimpleNamespace(text="lazy dog")]
    )
    assert [(s.start, s.category) for s in verdict.spans] == [(2, "odd")]


# Rules and programs -----------------------------------------------------------------------------


class Tokenizer(LetterTokenizer):
    """Letters, with control ids of the page's rule."""

    def __init__(self, rule):
        super().__init__()
        self.rule = dataclasses.replace(rule, never=self.rule.never)
        self.vocab_size = rule.end_id


@pytest.mark.parametrize("semantics", Semantics)
def test_the_law_of_the_sampler_holds_for_the_pages_rule_and_program(page, semantics):
    controls = Controls(LetterTokenizer().rule.first_id, (), 4, ("backspace",))
    tokenizer = Tokenizer(controls.rule())
    config, params = random_model(tokenizer, num_layers=1)
    knobs = Knobs(max_tokens=40, budget=8, control_bias={"[BACKSPACE]": 2.5})
    program = page["sharper"].Sharper(config, 1.5)
    policy = Policy(program, params, tokenizer, tokenizer.rule, semantics)
    generations = policy.sample([Request("tell me", (), knobs)] * 8)
    edits = [edit for g in generations for edit in g.edits]
    assert len(edits) > 8 and all(len(edit.removed) <= 1 for edit in edits)
    for g, logprobs in zip(generations, policy.score(generations), strict=True):
        assert np.abs(logprobs - g.logprobs).max() < 1e-4
    # The control: without the program's factor the numbers are others.
    plain = policy.replace(program=Single(config)).score(generations)
    assert max(np.abs(p - g.logprobs).max() for p, g in zip(plain, generations, strict=True)) > 0.1


def test_the_program_scales_logits(page):
    config, params = random_model(LetterTokenizer())
    hidden = np.ones((2, config.width), np.float32)
    once, thrice = (
        page["sharper"].Sharper(config, factor).unembed(params, hidden) for factor in (1.0, 3.0)
    )
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)
    assert np.std(once) > 0.1


def test_backspace_stands_among_other_rules(page):
    controls = Controls(10, ("one",), 3, ("backtrack", "backspace", "reset"))
    assert list(controls.names().values())[4:] == ["[BACKSPACE]", "[RESET]"]
    rule = controls.rule("backspace")
    assert (rule.first_id, rule.num_controls) == (14, 1) and 15 in rule.never


# All methods ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_builds_its_recipe_and_is_stored(name):
    e = Experiment(METHODS[name]())
    names = [stage.name for stage in recipe(e)]
    assert len(set(names)) == len(names) and "base" in names and names[-1].startswith("evaluate_")
    stored = json.loads(json.dumps(e.stored()))
    assert (stored["method"], stored["rule"]) == (name, e.rule)
    assert experiment_from(stored, METHODS[name]) == e


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_options_are_listed(name, tmp_path, capsys):
    kind = METHODS[name]
    file = tmp_path / f"{name}_experiment.py"
    file.write_text(
        f"from rlbf_jax.runs.experiment import Experiment\n"
        f"from {kind.__module__} import {kind.__name__}\n\n"
        f"def get_config():\n    return Experiment({kind.__name__}())\n"
    )
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(file), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--evaluation.n" in shown
    for field in dataclasses.fields(kind):
        if not field.metadata.get("flat"):
            assert f"--{field.name}" in shown
