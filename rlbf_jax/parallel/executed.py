"""Which instructions of a compiled program run, and how often.

CPU and GPU texts say a loop's turns (`known_trip_count`). TPU texts do not: there they follow from
the loop itself, where its counter starts at a constant, is compared with one and goes up by one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from rlbf_jax.parallel.hlo import Computation, Instruction, Program

_TRIPS = re.compile(r'"?known_trip_count"?:\{"?n"?:"?(\d+)"?\}')
_DIRECTION = re.compile(r"\bdirection=(\w+)")
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier")
"""Instructions that hand their operand on."""
_INTEGER = re.compile(r"-?\d+")


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction that a program runs, and how often."""

    instruction: Instruction
    computation: Computation
    trips: int | None
    """Product of the trip counts of the loops around it; None where one of them is not known."""
    fused: bool
    """Whether it is a part of a fusion, whose results between its parts stay out of memory."""
    turns: int | None = None
    """Of one run of a `while`, as far as they are known."""
    assumed: bool = False
    """Whether `trips` rests on turns that were assumed."""


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A computation, and the instruction that calls it."""

    computation: Computation
    caller: Instruction | None = None
    parent: _Frame | None = None

    def operand(self, instruction: Instruction, number: int) -> Instruction | None:
        """The instruction whose result is an operand."""
        names = instruction.operands
        return self.computation.by_name.get(names[number]) if number < len(names) else None


def executed(program: Program, unknown_turns: int | None = None) -> Iterator[Executed]:
    """Every instruction that runs, from ENTRY on; one that several callers share comes once for
    each. Conditional branches count as if all were taken.

    Args:
      unknown_turns: what is assumed of a loop whose turns are not known; such loops inside of it
        count as one turn. None: nothing, and trips inside of it are None.
    """
    frame = _Frame(program.computations[program.entry])
    yield from _walk(program, frame, _Place(1, unknown_turns))


@dataclasses.dataclass(frozen=True)
class _Place:
    """How often a computation runs."""

    trips: int | None
    unknown_turns: int | None
    fused: bool = False
    assumed: bool = False

    def inside(self, loop: Instruction, turns: int | None, how: str) -> _Place:
        """The place of what an instruction calls."""
        if loop.opcode != "while":
            return dataclasses.replace(self, fused=self.fused or loop.opcode == "fusion")
        assumed = turns is None and self.unknown_turns is not None
        turns = self.unknown_turns if assumed else turns
        # The condition is asked once more than the body runs.
        more = 1 if how == "condition" else 0
        known = self.trips is not None and turns is not None
        trips = self.trips * (turns + more) if known else None  # type: ignore[operator]
        left = 1 if assumed else self.unknown_turns
        return _Place(trips, left, self.fused, self.assumed or assumed)


def _walk(program: Program, frame: _Frame, place: _Place) -> Iterator[Executed]:
    for instruction in frame.computation.instructions:
        turns = turns_of(program, frame, instruction) if instruction.opcode == "while" else None
        yield Executed(
            instruction, frame.computation, place.trips, place.fused, turns, place.assumed
        )
        if instruction.opcode.endswith(("-done", "-update")):
            continue  # names the computation of its -start again
        for how, name in instruction.called():
            if name in program.computations:
                called = _Frame(program.computations[name], instruction, frame)
                yield from _walk(program, called, place.inside(instruction, turns, how))


def turns_of(program: Program, frame: _Frame, loop: Instruction) -> int | None:
    """Turns of one run of a `while`; None where they are not said and do not follow."""
    if match := _TRIPS.search(loop.attributes):
        return int(match.group(1))
    called = dict(loop.called())
    if not {"body", "condition"} <= set(called):
        return None
    body, condition = (
        _Frame(program.computations[called[how]], loop, frame) for how in ("body", "condition")
    )
    asked = _trace(program, condition, condition.computation.root)
    if asked is None or asked[1].opcode != "compare" or not _says_less(asked[1]):
        return None
    counter, bound = (_traced_operand(program, asked, number) for number in (0, 1))
    if counter is None or counter[1].opcode != "get-tuple-element" or counter[0] != condition:
        return None
    index = counter[1].index
    start = _constant(_element(program, frame, frame.operand(loop, 0), index))
    end, step = _constant(bound), _step(program, body, index)
    if start is None or end is None or not step or step < 0:
        return None
    return max(0, -(-(end - start) // step))


def _says_less(compare: Instruction) -> bool:
    match = _DIRECTION.search(compare.attributes)
    return match is not None and match.group(1) == "LT"


_Traced = tuple[_Frame, Instruction]
"""An instruction, and the frame that it stands in."""


def _traced_operand(program: Program, at: _Traced, number: int) -> _Traced | None:
    return _trace(program, at[0], at[0].operand(at[1], number))


def _trace(program: Program, frame: _Frame, instruction: Instruction | None) -> _Traced | None:
    """What an instruction hands on: through copies, fusions, tuples, and what loops carry
    unchanged."""
    if instruction is None:
        return None
    opcode = instruction.opcode
    if opcode in _SAME:
        return _trace(program, frame, frame.operand(instruction, 0))
    if opcode == "fusion" and len(instruction.parts) == 1:
        computation = program.computations[dict(instruction.called())["calls"]]
        inner = _Frame(computation, instruction, frame)
        return _trace(program, inner, computation.root)
    if opcode == "parameter" and frame.parent and frame.caller and frame.caller.opcode != "while":
        place = int(instruction.operands[0])
        return _trace(program, frame.parent, frame.parent.operand(frame.caller, place))
    if opcode == "get-tuple-element":
        source = frame.operand(instruction, 0)
        return _element(program, frame, source, instruction.index) or (frame, instruction)
    return frame, instruction


def _element(
    program: Program, frame: _Frame, source: Instruction | None, index: int
) -> _Traced | None:
    """What a tuple's element is; None where it is what a loop changes."""
    at = _trace(program, frame, source)
    if at is None:
        return None
    frame, source = at
    if source.opcode == "tuple":
        return _trace(program, frame, frame.operand(source, index))
    if source.opcode == "while" and _is_carried(program, source, index):
        return _element(program, frame, frame.operand(source, 0), index)
    caller, parent = frame.caller, frame.parent
    if source.opcode == "parameter" and caller and parent and caller.opcode == "while":
        if _is_carried(program, caller, index):
            return _element(program, parent, parent.operand(caller, 0), index)
    return None


def _is_carried(program: Program, loop: Instruction, index: int) -> bool:
    """Whether a loop hands an element of its tuple on as it is."""
    body = program.computations[dict(loop.called())["body"]]
    if body.root.opcode != "tuple" or index >= len(body.root.operands):
        return False
    instruction = body.by_name.get(body.root.operands[index])
    while instruction is not None and instruction.opcode in _SAME:
        instruction = body.by_name.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "get-tuple-element":
        return False
    source = body.by_name.get(instruction.operands[0])
    return instruction.index == index and source is not None and source.opcode == "parameter"


def _step(program: Program, body: _Frame, index: int) -> int | None:
    """What a loop's body adds to an integer that it carries."""
    root = body.computation.root
    added = _trace(program, body, body.operand(root, index)) if root.opcode == "tuple" else None
    if added is None or added[1].opcode != "add":
        return None
    parts = [_traced_operand(program, added, number) for number in (0, 1)]
    if not any(part and part[0] == body and part[1].index == index for part in parts):
        return None
    steps = [step for part in parts if (step := _constant(part)) is not None]
    return steps[0] if len(steps) == 1 else None


def _constant(at: _Traced | None) -> int | None:
    if at is None or at[1].opcode != "constant" or not at[1].operands:
        return None
    text = at[1].operands[0]
    return int(text) if _INTEGER.fullmatch(text) else None
