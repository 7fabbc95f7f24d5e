"""What is read off compiled programs, against counts by hand: texts of this machine's compiler, and
pieces of texts as TPU compilers write them."""

from __future__ import annotations

import json
import pathlib

import pytest

from rlbf_jax.parallel.compiled import collectives, dots, group_size, while_loops
from rlbf_jax.parallel.hlo import Shape, bits, parse

CHILD = str(pathlib.Path(__file__).with_name("compiled_child.py"))


@pytest.fixture(scope="module")
def texts(run_in_child) -> dict[str, str]:
    return json.loads(run_in_child(CHILD))


def test_nested_loops_multiply(texts):
    """x [8, 16] @ w [16, 16] on 2 x 4 devices: 4 rows a device, contracted over 4 of 16 columns,
    5 x 3 times."""
    products = dots(texts["nested"])
    assert [(d.result.dims, d.flops, d.trips) for d in products] == [((4, 16), 2 * 4 * 4 * 16, 15)]
    exchanged = collectives(texts["nested"])
    assert {c.trips for c in exchanged} == {15} and {c.group_size for c in exchanged} == {4}
    summed = [c for c in exchanged if c.kind in ("all-reduce", "reduce-scatter")]
    assert len(summed) == 1 and summed[0].where.endswith("dot_general")
    if summed[0].kind == "all-reduce":
        assert (summed[0].bytes, summed[0].total_bytes) == (4 * 16 * 4, 15 * 4 * 16 * 4)
        assert summed[0].sent_bytes == 2 * 3 / 4 * 4 * 16 * 4
    assert [(loop.turns, loop.trips) for loop in while_loops(texts["nested"])] == [(5, 1), (3, 5)]


def test_turns_that_nobody_knows_are_not_made_up(texts):
    loops = while_loops(texts["endless"])
    assert loops[0].turns is None and loops[0].trips == 1
    assert all(loop.trips is None for loop in loops[1:])
    inside = collectives(texts["endless"])
    assert inside and all(c.trips is None and c.total_bytes is None for c in inside)


def test_an_exchange_outside_of_loops_runs_once(texts):
    (gather,) = collectives(texts["gathered"])
    assert (gather.kind, gather.shapes) == ("all-gather", (Shape("f32", (8, 16)),))
    assert (gather.bytes, gather.group_size, gather.trips) == (8 * 16 * 4, 8, 1)
    assert gather.sent_bytes == 7 / 8 * 8 * 16 * 4
    assert not dots(texts["gathered"]) and not while_loops(texts["gathered"])


def test_branches_are_walked(texts):
    assert [c.kind for c in collectives(texts["branched"])] == ["all-gather"]


TPU = """HloModule jit_step, is_scheduled=true, num_partitions=8

FileNames
1 "step.py"

%add.clone (x.3: bf16[], y.1: bf16[]) -> bf16[] {
  %x.3 = bf16[]{:T(256)} parameter(0)
  %y.1 = bf16[]{:T(256)} parameter(1)
  ROOT %add.5 = bf16[]{:T(256)} add(%x.3, %y.1)
}

%all-reduce-scatter.clone.1 (input.2: bf16[1024,1024]) -> bf16[128,1024] {
  %input.2 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.3 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-reduce(%input.2), channel_id=3, \
replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add.clone
  %constant.1 = s32[] constant(0)
  ROOT %dynamic-slice.17 = bf16[128,1024]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.3, \
%constant.1, %constant.1), dynamic_slice_sizes={128,1024}
}

%fused_dot (p.0: bf16[8,128,16,64], p.1: bf16[8,128,16,64]) -> bf16[8,16,128,128] {
  %p.0 = bf16[8,128,16,64]{3,1,2,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[8,128,16,64]{3,1,2,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[8,16,128,128]{3,2,1,0:T(8,128)(2,1)} convolution(%p.0, %p.1), \
window={size=8x16 stride=7x15 lhs_dilate=8x16}, dim_labels=0b1f_0o1i->01bf, \
metadata={op_name="jit(step)/while/body/bthd,bshd->bhts/dot_general"}
}

%body.1 (wide.param.4: (s32[], bf16[8,128,16,64], bf16[128,1024], /*index=3*/s32[])) -> \
(s32[], bf16[8,128,16,64], bf16[128,1024], /*index=3*/s32[]) {
  %wide.param.4 = (s32[]{:T(128)}, bf16[8,128,16,64]{3,2,1,0:T(8,128)(2,1)S(1)}, \
bf16[128,1024]{1,0:T(8,128)(2,1)}, /*index=3*/s32[]{:T(128)}) parameter(0)
  %gte.0 = s32[]{:T(128)} get-tuple-element(%wide.param.4), index=0
  %gte.1 = bf16[8,128,16,64]{3,2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.4), index=1
  %gte.2 = bf16[128,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.4), index=2
  %gte.3 = s32[]{:T(128)} get-tuple-element(%wide.param.4), index=3
  %fusion.91 = bf16[8,16,128,128]{3,2,1,0:T(8,128)(2,1)S(1)} fusion(%gte.1, %gte.1), \
kind=kOutput, calls=%fused_dot
  %all-gather-start.1 = (bf16[128,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}) \
all-gather-start(%gte.2), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}, \
metadata={op_name="jit(step)/while/body/weights"}
  %all-gather-done.1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-gather-done(%all-gather-start.1)
  %fusion.111 = bf16[128,1024]{1,0:T(8,128)(2,1)S(1)} fusion(%all-gather-done.1), kind=kCustom, \
calls=%all-reduce-scatter.clone.1, metadata={op_name="jit(step)/while/body/gradient"}
  %add.34 = s32[]{:T(128)} add(%gte.0, %gte.3)
  ROOT %tuple.68 = (s32[]{:T(128)}, bf16[8,128,16,64]{3,2,1,0:T(8,128)(2,1)S(1)}, \
bf16[128,1024]{1,0:T(8,128)(2,1)}, /*index=3*/s32[]{:T(128)}) tuple(%add.34, %gte.1, %fusion.111, \
%gte.3)
}

%condition.1 (wide.param.1: (s32[], bf16[8,128,16,64], bf16[128,1024], /*index=3*/s32[])) \
-> pred[] {
  %constant.105 = s32[]{:T(128)} constant(START + 6)
  %wide.param.1 = (s32[]{:T(128)}, bf16[8,128,16,64]{3,2,1,0:T(8,128)(2,1)S(1)}, \
bf16[128,1024]{1,0:T(8,128)(2,1)}, /*index=3*/s32[]{:T(128)}) parameter(0)
  %gte.9 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  ROOT %lt.12 = pred[]{:T(512)} compare(%gte.9, %constant.105), direction=LT
}

%wrapped_sum (q.0: (f32[8,128], f32[4])) -> (f32[8,128], f32[4]) {
  %q.0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %q.1 = f32[4]{0:T(128)} parameter(1)
  ROOT %all-reduce.7 = (f32[8,128]{1,0:T(8,128)}, f32[4]{0:T(128)}) all-reduce(%q.0, %q.1), \
replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add.clone, metadata={op_name="jit(step)/losses"}
}

ENTRY %main.10_spmd (param.5: bf16[8,128,16,64], param.4: bf16[128,1024], param.6: f32[8,128], \
param.7: f32[4]) -> f32[8,128] {
  %param.5 = bf16[8,128,16,64]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %param.4 = bf16[128,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %param.6 = f32[8,128]{1,0:T(8,128)} parameter(2)
  %param.7 = f32[4]{0:T(128)} parameter(3)
  %constant.113 = s32[]{:T(128)} constant(START)
  %constant.101 = s32[]{:T(128)} constant(1)
  %copy.50 = s32[]{:T(128)} copy(%constant.113)
  %tuple.73 = (s32[]{:T(128)}, bf16[8,128,16,64]{3,2,1,0:T(8,128)(2,1)S(1)}, \
bf16[128,1024]{1,0:T(8,128)(2,1)}, /*index=3*/s32[]{:T(128)}) tuple(%copy.50, %param.5, %param.4, \
%constant.101)
  %while.28 = (s32[]{:T(128)}, bf16[8,128,16,64]{3,2,1,0:T(8,128)(2,1)S(1)}, \
bf16[128,1024]{1,0:T(8,128)(2,1)}, /*index=3*/s32[]{:T(128)}) while(%tuple.73), \
condition=%condition.1, body=%body.1, metadata={op_name="jit(step)/while"}
  %async-start = ((f32[8,128]{1,0:T(8,128)}, f32[4]{0:T(128)}), (f32[8,128]{1,0:T(8,128)}, \
f32[4]{0:T(128)}), u32[]{:S(2)}) async-start(%param.6, %param.7), calls=%wrapped_sum
  %async-done = (f32[8,128]{1,0:T(8,128)}, f32[4]{0:T(128)}) async-done(%async-start), \
calls=%wrapped_sum
  %collective-permute-start = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}, u32[], u32[]) \
collective-permute-start(%param.6), channel_id=4, source_target_pairs={{0,1},{1,2},{2,0}}
  %collective-permute-done = f32[8,128]{1,0:T(8,128)} \
collective-permute-done(%collective-permute-start)
  ROOT %gte.20 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%async-done), index=0
}
"""


def tpu_text(start: int = 0) -> str:
    return TPU.replace("START + 6", str(start + 6)).replace("START", str(start))


@pytest.mark.parametrize("start", [0, 3])
def test_a_tpu_text(start):
    """The loop says no turns: its counter goes from `start` to `start` + 6, and its step is carried
    along with it."""
    text = tpu_text(start)
    assert [(loop.turns, loop.trips) for loop in while_loops(text)] == [(6, 1)]
    seen = {c.where or c.kind: c for c in collectives(text)}
    gather = seen["jit(step)/while/body/weights"]
    assert (gather.kind, gather.bytes, gather.group_size) == ("all-gather", 2 * 1024**2, 8)
    scatter = seen["jit(step)/while/body/gradient"]
    assert (scatter.kind, scatter.bytes, scatter.group_size) == (
        "reduce-scatter",
        2 * 128 * 1024,
        8,
    )
    assert scatter.sent_bytes == gather.sent_bytes == 7 / 8 * 2 * 1024**2
    assert {gather.trips, scatter.trips} == {6}
    losses = seen["jit(step)/losses"]
    assert losses.shapes == (Shape("f32", (8, 128)), Shape("f32", (4,))) and losses.group_size == 2
    permute = seen["collective-permute"]
    assert (permute.bytes, permute.sent_bytes) == (8 * 128 * 4, 8 * 128 * 4)
    assert {losses.trips, permute.trips} == {1} and len(collectives(text)) == 4


def test_a_batched_product_is_a_window_over_padding():
    """[8, 16] products of 128 x 64 by 64 x 128 and no more, 6 times."""
    (product,) = dots(tpu_text())
    assert product.flops == 2 * 8 * 16 * 128 * 128 * 64 and product.trips == 6
    assert product.operands == (Shape("bf16", (8, 128, 16, 64)),) * 2


def test_a_counter_that_starts_somewhere_gives_no_turns():
    text = tpu_text().replace("constant(0)\n  %constant.101", "partition-id()\n  %constant.101")
    assert while_loops(text)[0].turns is None
    assert {c.trips for c in collectives(text)} == {None, 1}


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("replica_groups={{0,1},{2,3}}, x=1", 2),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", 8),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0), y", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, z", 4),
        ("replica_groups=mesh['a'=2,'b'=3,'c'=4] {'a','c'}", 8),
        ("replica_groups=mesh['a'=2,'b'=8] {'b':(2)4}", 4),
        ("replica_groups={}", 16),
        ("dimensions={0}", None),
    ],
)
def test_group_sizes(written, size):
    assert group_size(f", channel_id=1, {written}", devices=16) == size


def test_element_types():
    assert [bits(t) for t in ("pred", "s4", "u8", "f8e4m3fn", "bf16", "f64", "c64")] == [
        8, 4, 8, 8, 16, 64, 64,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="q7: no element type"):
        bits("q7")


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("module @jit_f { func.func public @main() }")
