"""Bytes moved, counted by hand on texts whose every instruction can be seen."""

from __future__ import annotations

import pytest

from rlbf_jax.parallel.traffic import traffic

TEXT = """HloModule jit_f, is_scheduled=true

%fused_row (p.0: f32[6,8,128], p.1: s32[], p.2: f32[8,128]) -> f32[8,128] {
  %p.0 = f32[6,8,128]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,8,128]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,8,128}
  %flat = f32[8,128]{1,0} bitcast(%row)
  %p.2 = f32[8,128]{1,0} parameter(2)
  ROOT %sum = f32[8,128]{1,0} add(%flat, %p.2)
}

%fused_put (q.0: f32[6,8,128], q.1: s32[], q.2: f32[8,128]) -> f32[6,8,128] {
  %q.0 = f32[6,8,128]{2,1,0} parameter(0)
  %q.1 = s32[] parameter(1)
  %q.2 = f32[8,128]{1,0} parameter(2)
  %one = f32[1,8,128]{2,1,0} bitcast(%q.2)
  %zero.1 = s32[] constant(0)
  ROOT %put = f32[6,8,128]{2,1,0} dynamic-update-slice(%q.0, %one, %q.1, %zero.1, %zero.1)
}

%body (at: (s32[], f32[8,128], f32[6,8,128])) -> (s32[], f32[8,128], f32[6,8,128]) {
  %at = (s32[], f32[8,128]{1,0}, f32[6,8,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%at), index=0
  %x = f32[8,128]{1,0SPACE} get-tuple-element(%at), index=1
  %stack = f32[6,8,128]{2,1,0} get-tuple-element(%at), index=2
  %fusion.1 = f32[8,128]{1,0} fusion(%stack, %i, %x), kind=kLoop, calls=%fused_row
  %fusion.2 = f32[6,8,128]{2,1,0} fusion(%stack, %i, %fusion.1), kind=kLoop, calls=%fused_put
  ROOT %out = (s32[], f32[8,128]{1,0}, f32[6,8,128]{2,1,0}) tuple(%i, %fusion.1, %fusion.2)
}

%cond (at.1: (s32[], f32[8,128], f32[6,8,128])) -> pred[] {
  %at.1 = (s32[], f32[8,128]{1,0}, f32[6,8,128]{2,1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (a: f32[8,128], b: f32[6,8,128], n: s32[]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %b = f32[6,8,128]{2,1,0} parameter(1)
  %n = s32[] parameter(2)
  %begun = (s32[], f32[8,128]{1,0}, f32[6,8,128]{2,1,0}) tuple(%n, %a, %b)
  %loop = (s32[], f32[8,128]{1,0}, f32[6,8,128]{2,1,0}) while(%begun), condition=%cond, \
body=%bodyTRIPS
  %end = f32[8,128]{1,0} get-tuple-element(%loop), index=1
  ROOT %last = f32[8,128]{1,0} multiply(%end, %end)
}
"""
ROW = 8 * 128 * 4
INDEX = 4
TURN = (ROW + INDEX + ROW + ROW) + (INDEX + ROW + ROW)
"""A slice of the stack, the index and x read, a row written; then the index and a row read, and a
row of the stack written in place."""
AFTER = 3 * ROW


def text(trips: str = "", space: str = "") -> str:
    return TEXT.replace("TRIPS", trips).replace("SPACE", space)


def test_a_loop_counts_as_often_as_it_runs():
    known = ', backend_config={"known_trip_count":{"n":"6"}}'
    # The stack is read and written row by row, never as a whole.
    assert traffic(text(known)).bytes == 6 * TURN + AFTER
    assert not traffic(text(known)).assumed


@pytest.mark.parametrize("turns", [1, 44])
def test_turns_that_nobody_knows_are_assumed_and_said(turns):
    moved = traffic(text(), unknown_turns=turns)
    assert moved.bytes == turns * TURN + AFTER and moved.assumed


def test_what_stays_on_the_chip_moves_nothing():
    assert traffic(text(space=":T(8,128)S(1)")).bytes == TURN - ROW + AFTER
