"""`rlbf plan`: what a person types, and what comes back."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import pytest

from rlbf_jax.cli import main as cli
from rlbf_jax.cli.plan import with_axes

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = """from tests.small_run import get_config as small


def get_config():
    return small()
"""
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'"
)


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "experiment.py"
    path.write_text(SMALL)
    return str(path)


def test_programs_of_an_experiment(file, capsys):
    argv = ["plan", file, "--phases", "decode", "--json", "--max_drawn", "7"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["name"] for row in rows] == ["rlbf decode"]
    assert rows[0]["assumed_turns"] == 7 and rows[0]["about"] == "4 rows x 7 ids"
    assert rows[0]["memory"]["beside"] > 0 and rows[0]["flops"] > 0
    assert rows[0]["mesh"] == {"slice": 1, "data": 1, "fsdp": 1, "tensor": 1}
    assert "[1/1] rlbf decode: 4 rows x 7 ids" in err


def test_tables_are_for_people(file, capsys):
    assert cli.main(["plan", file, "--phases", "measure"]) == 0
    out = capsys.readouterr().out
    assert "| rlbf measure |" in out and "No figures of this device are known" in out
    assert cli.main(["plan", file, "--phases", "measure", "--table", "--scales", "1,0.5"]) == 0
    out = capsys.readouterr().out
    assert out.count("| data=1,fsdp=1,tensor=1 |") == 2


@pytest.mark.parametrize("folder", ["rlbf_gemma2_9b", "rlbf_llama3_8b"])
def test_experiments_of_large_models_need_no_checkpoint(folder, capsys):
    """Nothing is compiled: no program has the name."""
    argv = ["plan", str(ROOT / "experiments" / f"{folder}.py"), "--mesh", "tensor=1"]
    assert cli.main([*argv, "--model.lora.rank", "16", "--phases", "none"]) == 2
    said = capsys.readouterr().err
    assert said.strip().endswith("it has update, prefill, decode, measure, compare")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--topology", "w5e:2x2"], "expected a name as v5e:16x16"),
        (["--topology", "v5e:16by16"], "expected a name as v5e:16x16"),
        (["--topology", "v7x:2x2"], "expected a name as v5e:16x16"),
        (["--mesh", "fsdp=3"], "fsdp=3 x tensor=1 does not fit 1 devices"),
        (["--mesh", "rows=3"], "--mesh rows=3: expected axes and sizes"),
        (["--mesh"], "--mesh : expected axes and sizes"),
        (["--phases", "uptade"], "no program 'uptade' in this experiment; it has update, prefill"),
        (["--table", "--scales", "0"], "--scales 0: expected numbers above 0"),
        (["--sft.stepz", "3"], "did you mean --sft.steps?"),
        (["--reinforcement.accumulate", "3"], "choose a multiple of 3"),
    ],
)
def test_mistakes_take_one_line(options, said, file, capsys):
    assert cli.main(["plan", file, *options]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1, err


def test_an_experiment_that_is_not_there(tmp_path, capsys):
    assert cli.main(["plan", str(tmp_path / "none.py")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert cli.main(["plan"]) == 2
    assert "plan needs a FILE first" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is there")
def test_libtpu_that_is_missing(file, capsys):
    assert cli.main(["plan", file, "--topology", "v5e:2x2"]) == 2
    err = capsys.readouterr().err
    assert "libtpu is not there; install it" in err and err.count("\n") == 1


def test_axes_are_the_experiments_own_settings():
    assert with_axes(["--seed", "1", "--mesh", "data=1,fsdp=-1"]) == [
        "--seed", "1", "--mesh.data", "1", "--mesh.fsdp", "-1",
    ]  # fmt: skip
    assert with_axes(["--mesh=tensor=2", "--mesh.data", "4"]) == [
        "--mesh.tensor", "2", "--mesh.data", "4",
    ]  # fmt: skip


def test_a_node_of_gpus_by_formula(file, run_in_child):
    """On virtual CPU devices, as the page says."""
    program = "import sys\nfrom rlbf_jax.cli import main as cli\nsys.exit(cli.main(sys.argv[1:]))\n"
    options = "--topology h100:2 --mesh data=1,fsdp=2 --phases measure --json".split()
    (row,) = map(json.loads, run_in_child(program, "plan", file, *options, devices=1).splitlines())
    assert row["topology"] == "h100:2" and row["mesh"]["fsdp"] == 2 and row["fits"]
    assert row["exchanged"] and set(row["seconds"]) == {"compute", "memory", "exchange"}


@NEEDS_LIBTPU
@pytest.mark.slow
def test_a_tpu_slice_that_is_not_there(file, run_in_child):
    program = "import sys\nfrom rlbf_jax.cli import main as cli\nsys.exit(cli.main(sys.argv[1:]))\n"
    options = (
        "--topology v5e:2x2 --mesh data=1,fsdp=2,tensor=2 --phases decode,update --json".split()
    )
    out = run_in_child(program, "plan", file, *options, devices=1)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["phase"] for row in rows] == ["update", "decode", "update"]
    assert all(row["fits"] and row["memory"]["arguments"] > 0 for row in rows)
    assert rows[0]["exchanged"] and rows[1]["assumed_turns"]
    said = run_in_child(
        "import sys\nfrom rlbf_jax.cli import main as cli\n"
        "sys.stderr = sys.stdout\nassert cli.main(sys.argv[1:]) == 2\n",
        "plan", file, "--topology", "v5e:17x3", devices=1,
    )  # fmt: skip
    assert "libtpu knows no such slice" in said and said.count("\n") == 1
