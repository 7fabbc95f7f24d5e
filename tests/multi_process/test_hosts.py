"""Processes of one run: how they find each other, what they agree on, how they end."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from rlbf_jax.critics.language import answerers
from rlbf_jax.endpoints.client import EndpointError
from rlbf_jax.endpoints.journal import Answer, NoAnswer
from rlbf_jax.errors import UserError
from rlbf_jax.parallel import hosts
from rlbf_jax.parallel.hosts import Hosts, check, connect, from_environment
from tests.endpoint_server import serving
from tests.multi_process.groups import free_port, started

CHILD = "tests/multi_process/hosts_child.py"
PATIENCE = 3.0
GONE = "is gone"
JAX_SAYS = "another task died"
"""Of JAX itself, where it is the first to notice that process 0 is gone."""


# One process ------------------------------------------------------------------------------------


def test_one_process_answers_for_itself_and_asks_for_no_coordinator():
    connect(Hosts(), environ={})
    assert not hosts.several() and hosts.is_first() and hosts.process() == 0
    assert hosts.gather({"a": 1}) == [{"a": 1}] and hosts.from_first(lambda: [1]) == [1]
    assert hosts.all_of([3, 4]).tolist() == [[3, 4]]
    hosts.same_everywhere("x", 1, "mend")
    hosts.leave(0)
    hosts.leave(2, "a reason")
    connect(Hosts("127.0.0.1:1", 1, 0), environ={})
    assert not hosts.several()


def test_the_environment_fills_what_the_flags_leave_open():
    environ = {
        "JAX_COORDINATOR_ADDRESS": "a:1",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "3",
    }
    assert from_environment(Hosts(), environ) == Hosts("a:1", 4, 3)
    assert from_environment(Hosts("b:2", 2, 0), environ) == Hosts("b:2", 2, 0)
    assert from_environment(Hosts(), {}) == Hosts()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (Hosts(processes=2, process=0), r"need a coordinator: --coordinator HOST:PORT"),
        (Hosts("somewhere", 2, 0), r"coordinator is 'somewhere', expected HOST:PORT"),
        (Hosts(":8476", 2, 0), r"coordinator is ':8476', expected HOST:PORT"),
        (Hosts("a:99999", 2, 0), r"coordinator is 'a:99999', expected HOST:PORT"),
        (Hosts("a:1"), r"number of processes is missing: --processes N"),
        (Hosts("a:1", 2), r"process is -1, expected 0 to 1; .* --process I"),
        (Hosts("a:1", 2, 2), r"process is 2, expected 0 to 1"),
        (Hosts("a:1", 2, 1, patience=0.5), r"patience is 0.5 s, expected 3 or more"),
    ],
)
def test_fields_that_name_no_process_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        check(wrong)
    with pytest.raises(UserError, match=message):
        connect(wrong, environ={})


def test_a_variable_that_is_no_number_is_refused():
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES is 'two', expected a number"):
        connect(Hosts("a:1"), environ={"JAX_NUM_PROCESSES": "two"})


# Several ----------------------------------------------------------------------------------------


def test_they_exchange_values_and_arrays_and_leave_together(tmp_path):
    with started(tmp_path, [CHILD, "--do", "exchange"]) as group:
        for ended in group.ended():
            assert ended.code == 0 and ended.log.splitlines()[-1] == "all exchanged", ended.log


@pytest.mark.slow
def test_a_cluster_that_jax_knows_needs_no_flags(tmp_path, monkeypatch):
    """As under `srun`, whose variables name the first node and the task."""
    monkeypatch.setenv("SLURM_JOB_ID", str(20_000 + os.getpid() % 4096))
    for name, value in {
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_PROCID", "0")
    alone = dict(count=1, devices=2)
    with started(tmp_path / "0", [CHILD, "--do", "exchange"], **alone) as first:
        monkeypatch.setenv("SLURM_PROCID", "1")
        with started(tmp_path / "1", [CHILD, "--do", "exchange"], **alone) as second:
            for group in (first, second):
                [ended] = group.ended()
                assert ended.code == 0 and "all exchanged" in ended.log, ended.log


@pytest.mark.parametrize("here", [0, 1])
def test_others_that_do_not_come_are_told(tmp_path, here):
    address = f"127.0.0.1:{free_port()}"
    program = (
        "import sys; from rlbf_jax.parallel import hosts; hosts.START_S = 2\n"
        "from rlbf_jax.cli.main import exit_code\n"
        f"here = hosts.Hosts({address!r}, 2, {here})\n"
        "sys.exit(exit_code(lambda: hosts.connect(here), 'again'))"
    )
    with started(tmp_path, ["-c", program], count=1) as group:
        [ended] = group.ended(timeout=60)
    assert ended.code == 2
    told = [line for line in ended.log.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "did not find each other in 2 s" in told[0]
    assert "look whether its port is free and open" in told[0]


@pytest.mark.parametrize(
    "do, struck, number, seen",
    [
        ("wait", 1, signal.SIGKILL, 0),
        ("wait_for_first", 0, signal.SIGSTOP, 1),
        pytest.param("wait", 1, signal.SIGSTOP, 0, marks=pytest.mark.slow),
        pytest.param("wait", 0, signal.SIGSTOP, 1, marks=pytest.mark.slow),
        pytest.param("wait", 0, signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param("wait_for_first", 0, signal.SIGKILL, 1, marks=pytest.mark.slow),
    ],
)
def test_when_one_dies_or_hangs_the_other_ends_and_says_so(tmp_path, do, struck, number, seen):
    with started(tmp_path, [CHILD, "--do", do], patience=PATIENCE) as group:
        for process in (0, 1):
            group.wait_for("in a loop", process)
        time.sleep(2)
        group.strike(struck, number)
        began = time.monotonic()
        code = group.processes[seen].wait(60)
        assert time.monotonic() - began < PATIENCE + 20
        assert code != 0
        log = group.log(seen)
        assert f"error: process {struck} {GONE}" in log or JAX_SAYS in log, log


@pytest.mark.parametrize(
    "do, code, word",
    [
        ("fail", 2, "cannot read a file"),
        pytest.param("fail_all", 2, "nobody can read a file", marks=pytest.mark.slow),
        pytest.param("crash", 1, "ZeroDivisionError: a mistake of ours", marks=pytest.mark.slow),
    ],
)
def test_an_error_of_one_ends_all_with_its_words(tmp_path, do, code, word):
    with started(tmp_path, [CHILD, "--do", do], patience=PATIENCE) as group:
        for process, ended in enumerate(group.ended(60)):
            assert ended.code == code
            assert word in ended.log.splitlines()[-1], ended.log
            assert ("Traceback" in ended.log) == (do == "crash" and process == 1)


@pytest.mark.slow
def test_a_signal_to_one_that_is_outside_of_training_ends_all(tmp_path):
    with started(tmp_path, [CHILD, "--do", "wait"], patience=PATIENCE) as group:
        for process in (0, 1):
            group.wait_for("in a loop", process)
        group.strike(1, signal.SIGTERM)
        first, second = group.ended(60)
    assert second.code == first.code == 130
    assert "interrupted" in second.log and "process 1 stopped: interrupted" in first.log


@pytest.mark.parametrize(
    "do, own, message",
    [
        ("agree", (["--seed", "0"], ["--seed", "1"]), "seed is 1 on process 1 and 0 on process 0"),
        pytest.param(
            "agree",
            (["--workdir", "/a"], ["--workdir", "/b"]),
            "workdir is '/b' on process 1 and '/a' on process 0",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "share",
            (["--workdir", "/"], ["--workdir", "/nowhere"]),
            "written by process 0, not seen by process 1; give all hosts one --workdir",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_hosts_that_would_not_run_the_same_are_told_apart(tmp_path, do, own, message):
    with started(tmp_path, [CHILD, "--do", do], own=own) as group:
        for ended in group.ended(60):
            assert ended.code == 2
            told = [line for line in ended.log.splitlines() if line.startswith("error: ")]
            assert len(told) == 1 and message in told[0], ended.log


def test_an_answer_is_told_to_others_as_it_is():
    answers = [
        Answer("yes", {"yes": -0.5}, cut=True),
        Answer("no"),
        EndpointError("it broke", "http 500", 500),
        NoAnswer("too long", "too long"),
    ]
    for answer in answers:
        told = answerers._told(json.loads(json.dumps(answerers._telling(answer))))
        assert str(told) == str(answer)
        assert isinstance(told, NoAnswer) == isinstance(answer, NoAnswer)
        for name in ("first_token", "cut", "kind", "status"):
            assert getattr(told, name, None) == getattr(answer, name, None)


@pytest.mark.slow
def test_the_first_asks_an_endpoint_once_and_the_other_is_told(tmp_path):
    with serving(lambda messages: "Yes" if "one" in messages[-1]["content"] else "No") as server:
        server.rules = [("fails", (500, {}))]
        argv = [CHILD, "--do", "judge", "--url", server.url, "--workdir", str(tmp_path)]
        with started(tmp_path / "logs", argv) as group:
            lines = [ended.log.splitlines()[-1] for ended in group.ended(60)]
        assert len(server.seen) == 3
    assert lines[0] == lines[1]
    assert lines[0].startswith("[[True, True, ")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) >= 3
