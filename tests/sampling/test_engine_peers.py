"""An engine of another project collects rollouts: tunix's own sampler and types."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import pytest

pytestmark = pytest.mark.slow
CHILD = pathlib.Path(__file__).with_name("tunix_child.py")


def test_what_tunix_samples_is_what_our_scorer_reads():
    python = os.environ.get("RLBF_JAX_TUNIX")
    if not python:
        pytest.skip("RLBF_JAX_TUNIX is not set: point it at a python that has google-tunix")
    root = str(pathlib.Path(__file__).parents[2])
    run = subprocess.run(
        [python, str(CHILD)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["is_engine"] and found["difference"] < 1e-4 and found["control"] > 1
    assert len(found["ids"]) == 20 and sum(found["ids"]) > 100
