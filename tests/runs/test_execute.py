"""A recipe is run: in order, once, checked before anything is made and once data are there."""

import dataclasses
from typing import ClassVar

import pytest

from rlbf_jax.errors import Preempted, UserError
from rlbf_jax.runs import execute
from rlbf_jax.runs.experiment import DataConfig, Experiment, MethodConfig
from rlbf_jax.runs.files import read_json
from rlbf_jax.runs.run import Run
from rlbf_jax.runs.stage import Stage
from rlbf_jax.storage import held

SEEN: list[str] = []
"""What was called, in order."""


@dataclasses.dataclass(frozen=True)
class Step:
    name: str
    fails_in: str = ""


def seen(what, config):
    SEEN.append(f"{what} {config.name}")
    if config.fails_in == what:
        raise UserError(f"{config.name} failed")


def do(run: Run, config: Step):
    assert run.stage == config.name
    seen("do", config)
    if config.name in ("first", "second"):
        run.stage_folder(config.name).mkdir(parents=True, exist_ok=True)


def check(run: Run, config: Step):
    seen("check", config)


def fit(run: Run, config: Step):
    seen("fit", config)


@dataclasses.dataclass(frozen=True)
class Walk(MethodConfig):
    """Two stages that prepare, two that train."""

    name: ClassVar[str] = "walk"
    paper: ClassVar[str] = "Walking, arXiv 1"
    rule: ClassVar[str] = "backtrack"
    failing: str = ""
    fails_in: str = ""

    def stages(self, e):
        names = ("words", "rows", "first", "second")
        return [
            Stage(
                name,
                do,
                Step(name, self.fails_in if name == self.failing else ""),
                names[:number],
                check,
                fit,
                prepares=number < 2,
            )
            for number, name in enumerate(names)
        ]


def calls(what):
    return [f"{what} {name}" for name in ("words", "rows", "first", "second")]


@pytest.fixture(autouse=True)
def reports(monkeypatch):
    SEEN.clear()
    made = []
    monkeypatch.setattr(execute, "write_report", made.append)
    return made


def run(folder, only=None, **fields):
    SEEN.clear()
    execute.run(Experiment(Walk(**fields)), folder, only)


FITS = ["fit first", "fit second"]


def test_checks_come_first_and_fits_once_the_data_are_there(tmp_path, reports):
    run(tmp_path / "run")
    checks, does = calls("check"), calls("do")
    assert [*checks, *does[:2], *FITS, *does[2:]] == SEEN
    assert reports == [tmp_path / "run"]
    assert all(
        "seconds" in read_json(tmp_path / "run" / "done" / name)
        for name in ("words", "rows", "first", "second")
    )


def test_what_is_done_is_not_done_again_and_the_report_is(tmp_path, reports):
    run(tmp_path)
    run(tmp_path)
    assert calls("check") == SEEN and len(reports) == 2
    (tmp_path / "done" / "second").unlink()
    run(tmp_path)
    # Something was trained: that shapes fit is known by then.
    assert [*calls("check"), "do second"] == SEEN


def test_a_failed_check_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="second failed"):
        run(tmp_path / "run", failing="second", fails_in="check")
    assert not (tmp_path / "run").exists() and calls("check") == SEEN


def test_a_failed_fit_keeps_the_data_and_is_asked_again(tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match="second failed"):
            run(tmp_path, failing="second", fails_in="fit")
        assert SEEN[-2:] == FITS
        assert {p.name for p in (tmp_path / "done").iterdir()} == {"words", "rows"}
        assert not (tmp_path / "stages" / "first").exists()
    assert "do words" not in SEEN
    run(tmp_path)  # the setting was mended
    assert [*calls("check"), *FITS, "do first", "do second"] == SEEN


def test_a_stage_that_fails_is_not_marked(tmp_path):
    with pytest.raises(UserError, match="first failed"):
        run(tmp_path, failing="first", fails_in="do")
    assert {p.name for p in (tmp_path / "done").iterdir()} == {"words", "rows"}
    (tmp_path / "stages" / "first").mkdir(parents=True)  # as if it had begun
    with pytest.raises(UserError, match=r"other settings \(failing is 'first' there, '' here"):
        run(tmp_path)


def test_only_some_stages(tmp_path):
    run(tmp_path, only=("words", "first"))
    assert SEEN == [
        "check words", "check first", "do words", "fit first", "do first",
    ]  # fmt: skip
    assert {p.name for p in (tmp_path / "done").iterdir()} == {"words", "first"}


def test_an_interruption_names_the_stage_and_what_is_kept(tmp_path, monkeypatch):
    run_stage = execute.run_stage

    def stopped(view, stage, number):
        if stage.name == "rows":
            raise KeyboardInterrupt
        run_stage(view, stage, number)

    monkeypatch.setattr(execute, "run_stage", stopped)
    with pytest.raises(Preempted, match="stopped in stage rows; finished stages and .* are kept"):
        run(tmp_path)
    assert {p.name for p in (tmp_path / "done").iterdir()} == {"words"}


def test_two_processes_do_not_share_a_folder(tmp_path):
    run(tmp_path)
    with (
        held(tmp_path / "done"),
        pytest.raises(UserError, match="another process is running here"),
    ):
        run(tmp_path)


def test_a_method_needs_its_rule_among_the_vocabularys(tmp_path):
    e = Experiment(Walk(), data=DataConfig(rules=("reset",)))
    with pytest.raises(UserError, match="data.rules is reset; method walk needs backtrack among"):
        execute.run(e, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_method_alone_is_no_experiment(tmp_path):
    with pytest.raises(UserError, match="expected an Experiment.*got a Walk"):
        execute.run(Walk(), tmp_path / "run")


def test_a_mesh_that_cannot_be_made_leaves_no_folder(tmp_path):
    e = Experiment(Walk()).changed({"mesh.data": 3})
    with pytest.raises(UserError, match="mesh: .*does not fit"):
        execute.run(e, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@dataclasses.dataclass(frozen=True)
class Twisted(Walk):
    """A recipe out of order."""

    name: ClassVar[str] = "twisted"

    def stages(self, e):
        return list(reversed(super().stages(e)))


def test_a_recipe_out_of_order_is_refused(tmp_path):
    with pytest.raises(ValueError, match="which is no earlier stage"):
        execute.run(Experiment(Twisted()), tmp_path / "run")
    assert not (tmp_path / "run").exists()
