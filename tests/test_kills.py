"""A run that is killed at any moment, or asked to stop, and started again until it ends is the
undisturbed run."""

from __future__ import annotations

import collections
import json
import re
import shlex
import shutil
import signal

import numpy as np
import pytest

from rlbf_jax.data.datasets import content_hash
from rlbf_jax.evaluation.results import read_results
from rlbf_jax.storage import held
from tests.kills import EXPERIMENT, Strike, fingerprint, leftovers, nursery

QUICK = ("tokenizer", "pretraining_data", "base", "evaluate_base")
PREPARED = ("tokenizer", "pretraining_data", "bsafe_plus_data", "refusal_data")
TRAINED = ("base", "refusal_sft", "sft", "sft_control", "rlbf")
STAGES = (*PREPARED, *TRAINED, *(f"evaluate_{name}" for name in TRAINED), "report")
SLOW = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGKILL)]
CHECKPOINT, MODEL = "checkpoints/2.orbax-checkpoint-tmp", "model/0.orbax-checkpoint-tmp"


@pytest.fixture(scope="module")
def children():
    with nursery() as made:
        yield made


class Case:
    """One experiment: an undisturbed run of it, and runs that are struck."""

    def __init__(self, children, folder, only=()):
        self.children, self.folder, self.only = children, folder, only
        self.touches = folder / "touches"
        ended = self.run(folder / "undisturbed" / "run", touches=self.touches)
        assert ended.code == 0, ended.log[-3000:]
        self.wanted = fingerprint(folder / "undisturbed" / "run")
        self.touched = collections.Counter(
            line.split()[0] for line in self.touches.read_text().splitlines()
        )

    def run(self, workdir, strike=None, touches=None):
        workdir.parent.mkdir(exist_ok=True)
        return self.children.run(workdir, self.argv(workdir), strike, self.only, touches)

    def argv(self, workdir):
        return ["run", EXPERIMENT, "--workdir", str(workdir), "--baselines"]

    def strike(self, workdir, strike):
        """Runs until the strike, and checks what the user sees of it. Returns the line that says
        how to go on."""
        ended = self.run(workdir, strike)
        assert ended.struck_in == strike.stage, ended.log[-3000:]
        if strike.signal == signal.SIGKILL:
            assert ended.code == -signal.SIGKILL, ended.log[-3000:]
            return ""
        assert ended.code == 130, ended.log[-3000:]
        assert "Traceback" not in ended.log
        told = [line for line in ended.log.splitlines() if "go on with: " in line]
        assert len(told) == 1 and strike.stage in told[0], ended.log[-3000:]
        assert shlex.split(told[0].split("go on with: ")[1]) == ["rlbf", *self.argv(workdir)]
        return told[0]

    def finish(self, workdir):
        """Runs to the end and compares everything with the undisturbed run."""
        ended = self.run(workdir)
        assert ended.code == 0, ended.log[-3000:]
        found = fingerprint(workdir)
        different = {
            name for name in found.keys() | self.wanted if found.get(name) != self.wanted.get(name)
        }
        assert not different
        assert leftovers(workdir) == []


@pytest.fixture(scope="module")
def quick(children, tmp_path_factory):
    return Case(children, tmp_path_factory.mktemp("quick"), QUICK)


def test_the_fingerprint_sees_data_journals_rows_records_and_parameters(quick):
    assert quick.wanted.keys() >= {
        *(
            "manifest.json",
            "results.json",
            "report.md",
            "report.html",
            "data/report.json",
            "tokenizer/tokenizer.model",
        ),
        *(
            "data/pretraining/content.json",
            "stages/base/metrics.jsonl",
            "evaluation/base.jsonl",
            "base (parameters)",
        ),
    }
    assert {*QUICK, "report"} <= set(quick.touched)


def test_killed_in_writes_and_asked_to_stop_in_data_training_and_evaluation(quick):
    workdir = quick.folder / "struck" / "run"
    quick.strike(workdir, Strike("tokenizer", 1, "tokenizer", signal=signal.SIGTERM))
    quick.strike(workdir, Strike("pretraining_data", 3, "-unfinished-"))
    told = quick.strike(workdir, Strike("base", 9, CHECKPOINT, signal=signal.SIGINT))
    # Steps go on while the checkpoint after step 2 is written, up to the next one's turn.
    assert re.match(r"stage base stopped after step [2-5] of 7; its state is saved; ", told)
    quick.strike(workdir, Strike("base", 9, "checkpoints/6.orbax-checkpoint-tmp"))
    quick.strike(workdir, Strike("evaluate_base", signal=signal.SIGTERM))
    quick.strike(workdir, Strike("evaluate_base", 2, "results.json"))
    quick.finish(workdir)


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_is_there(quick):
    workdir = quick.folder / "undisturbed" / "run"
    before = fingerprint(workdir)
    with held(workdir / "done"):
        ended = quick.run(workdir)
    assert ended.code == 2
    assert ended.log.startswith("error: ") and "another process is running here" in ended.log
    assert fingerprint(workdir) == before


def struck_and_run_again(children, folder, argv, number, match):
    """What a command prints when it is started again after it was struck while it wrote `match`."""
    ended = children.run(folder, argv, Strike("start", 2, match, signal=number))
    if number == signal.SIGKILL:
        assert ended.code == -number, ended.log[-3000:]
    else:
        assert (ended.code, ended.log.splitlines()[-1]) == (
            130,
            f"interrupted; go on with: {shlex.join(['rlbf', *argv])}",
        )
        assert "Traceback" not in ended.log
    ended = children.run(folder, argv)
    assert ended.code == 0, ended.log[-3000:]
    return ended.log


@pytest.mark.parametrize("number", [signal.SIGTERM, *SLOW])
def test_data_build_struck_while_it_writes_leaves_nothing_and_builds_the_same_again(
    children, quick, tmp_path, number
):
    rows = tmp_path / "rows.jsonl"
    answer = (
        "Bread rises best in a warm corner of the kitchen. It takes an hour or two to do this well."
    )
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"What about {i}?", "response": answer}) + "\n" for i in range(40)
        )
    )
    tokenizer = str(quick.folder / "undisturbed" / "run" / "tokenizer")
    out = tmp_path / "set"
    argv = [
        "data",
        "build",
        str(rows),
        "--tokenizer",
        tokenizer,
        "--out",
        str(out),
        "--num_examples",
        "12",
    ]
    log = struck_and_run_again(children, tmp_path, argv, number, "-unfinished-")
    assert f'"sha256": "{content_hash(out)}"' in log
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl", "set"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_evaluate_struck_while_it_writes_results_ends_with_each_record_once(
    children, quick, number
):
    workdir = quick.folder / f"evaluated-{number}" / "run"
    shutil.copytree(quick.folder / "undisturbed" / "run", workdir)
    argv = ["evaluate", str(workdir), "--stage", "base", "--n_prompts", "2"]
    struck_and_run_again(children, workdir, argv, number, "results.json")
    once = (workdir / "results.json").read_bytes()
    keys = [record.key for record in read_results(workdir / "results.json")]
    assert len(keys) == len(set(keys)) > 0
    assert children.run(workdir, argv).code == 0
    assert (workdir / "results.json").read_bytes() == once


# Everything -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(children, tmp_path_factory):
    return Case(children, tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
def test_killed_in_every_stage_at_a_random_touch_of_a_file(whole):
    rng = np.random.default_rng(1)
    workdir = whole.folder / "every" / "run"
    for stage in STAGES:
        whole.strike(workdir, Strike(stage, int(rng.integers(1, whole.touched[stage] + 1))))
    whole.finish(workdir)


@pytest.mark.slow
def test_killed_inside_writes_and_at_random_times(whole):
    rng = np.random.default_rng(2)
    workdir = whole.folder / "writes" / "run"
    for strike in (
        Strike("pretraining_data", 1, "-unfinished-", delay=0.05),
        Strike("base", 4, CHECKPOINT, delay=float(rng.uniform(0.001, 0.02))),
        Strike("base", 0, delay=float(rng.uniform(0.1, 1.5))),
        Strike("refusal_sft", int(rng.integers(1, 20)), MODEL),
        Strike("sft", int(rng.integers(1, 20)), CHECKPOINT),
        Strike("rlbf", 0, delay=float(rng.uniform(0.1, 3.0))),
        Strike("rlbf", int(rng.integers(1, 20)), CHECKPOINT),
        Strike("evaluate_rlbf", 1, "evaluation/rlbf.jsonl"),
    ):
        whole.strike(workdir, strike)
    whole.finish(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_in_every_stage(whole, number):
    rng = np.random.default_rng(number)
    workdir = whole.folder / f"asked-{number}" / "run"
    for stage in STAGES:
        whole.strike(
            workdir, Strike(stage, int(rng.integers(1, whole.touched[stage] + 1)), signal=number)
        )
    whole.finish(workdir)
