"""The sampler's benchmark runs, at a size at which its figures mean nothing."""

from __future__ import annotations

import argparse
import importlib
import pathlib

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks"
TINY = dict(num_layers=1, width=32, num_heads=2, head_dim=16, mlp_width=32, vocab_size=1100)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("RLBF_JAX_PEERS", "RLBF_JAX_TUNIX"):
        monkeypatch.delenv(name, raising=False)
    setting = importlib.import_module("sampler_setting")
    monkeypatch.setitem(setting.SHAPES, "tiny", TINY)
    return importlib.import_module("sampler"), setting.Model("tiny", 8)


def rows(benchmark, part: str) -> list[dict]:
    module, model = benchmark
    args = argparse.Namespace(batch=[6], repeats=1, requests=9, semantics=["keep", "rewind"])
    return list(module.PARTS[part](args, model))


def test_greedy_answers_of_the_plain_loop_are_ours(benchmark):
    found = rows(benchmark, "peers")
    assert [r["peer_name"] for r in found] == ["plain loop"] * 2
    assert all(r["agree"] == 1.0 and r["ratio"] > 0 for r in found)


def test_directives_fire_on_as_many_rows_as_asked(benchmark):
    found = rows(benchmark, "directives")
    assert [r["peer_name"] for r in found] == [
        "no rule", "none fires", "no rule", "none fires", "stop and ask again"
    ]  # fmt: skip
    assert sum("fires on 1 rows" in r["name"] for r in found) == 3


def test_continuous_batches_keep_more_rows_busy(benchmark):
    for row in rows(benchmark, "lengths"):
        assert row["rows_busy_static"] <= row["rows_busy"] <= 1 and row["compilations"] == 0
