"""What devices compute and exchange, read off compiled programs: the mesh really divides the work.

Each claim has a control: the same program traced without a mesh, whose text must break it.
"""

from __future__ import annotations

import json
import math
import pathlib

import pytest

from tests.multi_device.programs_child import GUIDANCE, PACKED, ROWS, TIME, D, V

CHILD = str(pathlib.Path(__file__).with_name("programs_child.py"))
TABLE = V * D


@pytest.fixture(scope="module")
def facts(run_in_child):
    return json.loads(run_in_child(CHILD))


@pytest.fixture(scope="module")
def control(run_in_child):
    return json.loads(run_in_child(CHILD, "control"))


def tables(program: dict, kind: str) -> list[int]:
    """How often each array of a table's size is exchanged."""
    return [
        c["trips"]
        for c in program["collectives"]
        for dims in c["dims"]
        if c["kind"] == kind and sorted(dims) == [D, V]
    ]


def of_all_rows(program: dict) -> list:
    """Exchanges of activations of all rows: ids by width."""
    every = {ROWS * TIME, PACKED * TIME, GUIDANCE * TIME}
    counts = {ROWS, PACKED, GUIDANCE}
    return [
        c
        for c in program["collectives"]
        for dims in c["dims"]
        if len(dims) > 1
        and (dims[0] in every or (len(dims) > 2 and dims[0] in counts and dims[1] == TIME))
    ]


def share(facts: dict, name: str) -> float:
    """Work of a device, in eighths of what one device does alone."""
    return 8 * facts[name]["flops"] / facts["alone"]["flops"]


@pytest.mark.parametrize("name", ["data", "data in 4", "fsdp"])
def test_every_device_computes_an_eighth(facts, name):
    assert 1 <= share(facts, name) + 0.03 <= 1.06


def test_a_mesh_that_nobody_knows_repeats_the_work_of_microbatches(facts, control):
    assert 8 * control["data in 4"]["flops"] / facts["alone"]["flops"] > 2


def test_microbatches_take_less_memory(facts, control):
    assert facts["data in 4"]["temporaries"] < 0.6 * facts["data"]["temporaries"]
    assert control["data in 4"]["temporaries"] > control["data"]["temporaries"]


def test_fully_sharded_rows_stay_where_they_are(facts, control):
    for name in ("fsdp", "policy on fsdp", "policy on all"):
        assert not of_all_rows(facts[name])
    assert of_all_rows(control["fsdp"])


def test_gradients_of_a_data_mesh_are_exchanged_once(facts, control):
    for name, most in (("data", 2), ("data in 4", 2), ("policy on data", 2)):
        # Two tables, whatever the microbatches, losses and chunks.
        assert tables(facts[name], "all-reduce") == [1] * most
        assert {c["trips"] for c in facts[name]["collectives"]} == {1}
    assert max(tables(control["data"], "all-reduce")) > 1
    assert max(tables(control["policy on data"], "all-reduce")) > 1


def test_tables_of_a_fully_sharded_update_move_once_a_use(facts):
    # Two losses, and the look-ups of two passes.
    program = facts["policy on fsdp"]
    assert tables(program, "all-reduce") == [1] * 4
    assert sorted(tables(program, "all-gather")) == [1] * 2


def test_no_update_gathers_all_parameters_or_logits(facts):
    for name in ("data", "fsdp", "policy on data", "policy on fsdp", "policy on all"):
        gathered = [c for c in facts[name]["collectives"] if c["kind"] == "all-gather"]
        # The largest single parameter is a table; logits have ids of the vocabulary last.
        assert all(sum(math.prod(d) for d in c["dims"]) <= TABLE for c in gathered)
        assert not [d for c in gathered for d in c["dims"] if d and d[-1] == V]


# Sampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "held"),
    [("sampling on fsdp", [ROWS // 8, 8, 76, 8]), ("sampling on all", [ROWS // 4, 4, 76, 8])],
)
def test_a_cache_is_divided_by_rows_and_heads_and_stays_so(facts, name, held):
    assert facts[name]["cache"] == [held] * 2
    assert facts[name]["stays"]


@pytest.mark.parametrize("name", ["sampling on fsdp", "sampling on all"])
def test_decoding_exchanges_neither_weights_nor_caches_nor_logits(facts, name):
    """Of any exchange the largest array is that of all rows at the width of one projection."""
    widest, cache = ROWS * 3 * 64, ROWS * 8 * 76 * 8
    moved = [dims for c in facts[name]["collectives"] for dims in c["dims"]]
    assert moved and max(map(math.prod, moved)) <= widest < min(ROWS * V, TABLE, cache)
    projections = [{D, 192}, {64, D}, {D, 2, 88}, {D, 88}]
    assert not [d for d in moved if len(d) > 1 and set(d) - {1} in projections]
    assert not [c for c in facts[name]["collectives"] if "dynamic_update_slice" in c["where"]]
