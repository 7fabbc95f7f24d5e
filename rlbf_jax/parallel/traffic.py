"""Bytes that a compiled program moves to and from memory, read off its HLO text.

XLA's own `cost_analysis()` counts the body of a loop once; here every instruction counts as often
as it runs. An instruction reads its operands and writes its result once, with these exceptions:
what is sliced or gathered is read where the slice lies, what is updated in place is written where
the update lies, parts of a fusion hand on what they compute without memory, and buffers that a TPU
keeps on the chip move nothing.
"""

from __future__ import annotations

import dataclasses

from rlbf_jax.parallel.executed import Executed, executed
from rlbf_jax.parallel.hlo import Computation, Instruction, Program, Shape, parse

_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
    "add-dependency",
}  # fmt: skip
"""Opcodes that move nothing themselves."""
_SLICES = {"dynamic-slice", "slice", "gather"}
_HANDS_ON = {"bitcast", "copy", "convert", "reshape", "transpose"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes to and from the memory of one device."""

    bytes: int
    """Of all instructions; one inside a loop of unknown turns counts as often as was assumed."""
    assumed: bool
    """Whether a loop's turns were assumed."""


def traffic(text: str, unknown_turns: int = 1) -> Traffic:
    """Bytes moved by a compiled program.

    Args:
      unknown_turns: turns of a loop whose end the data decide; loops of that kind inside of it
        count as one turn.
    """
    program, total, assumed = parse(text), 0, False
    for at in executed(program, unknown_turns):
        if at.fused or at.instruction.opcode in _NOTHING:
            continue
        if at.instruction.opcode.endswith(("-done", "-update")):
            continue
        assumed |= at.assumed
        total += moved(program, at) * (at.trips or 0)
    return Traffic(total, assumed)


def moved(program: Program, at: Executed) -> int:
    """Bytes that one trip of an instruction reads and writes."""
    instruction, computation = at.instruction, at.computation
    if instruction.opcode == "fusion":
        return _of_fusion(program, instruction, computation)
    operands = [computation.by_name.get(name) for name in instruction.operands]
    if instruction.opcode in _SLICES:
        return 2 * _bytes(instruction.shapes)
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        update = operands[-1 if instruction.opcode == "scatter" else 1]
        return 2 * _bytes(update.shapes) if update else 0
    if instruction.opcode.endswith("-start") and len(instruction.parts) > 1:
        # (result, operand, handle) of a copy, (operand, result) of exchanges.
        return _bytes(instruction.parts[0]) + _bytes(instruction.parts[1])
    return _bytes(instruction.shapes) + sum(_bytes(o.shapes) for o in operands if o)


def _bytes(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes if shape.space == 0)


def _of_fusion(program: Program, fusion: Instruction, computation: Computation) -> int:
    called = [name for how, name in fusion.called() if how == "calls"]
    inner = program.computations.get(called[0]) if called else None
    if inner is None:
        return _bytes(fusion.shapes)
    root = _behind(inner, inner.root)
    roots = (
        [_behind(inner, inner.by_name[name]) for name in root.operands]
        if (root.opcode == "tuple")
        else [root]
    )
    written = sum(
        _written(inner, part, shapes) for part, shapes in zip(roots, fusion.parts, strict=False)
    )
    users = _users(inner)
    read = 0
    for part in inner.instructions:
        if part.opcode == "parameter":
            source = computation.by_name.get(fusion.operands[int(part.operands[0])])
            read += _read(inner, part, source, users)
    return read + written


def _written(inner: Computation, root: Instruction, shapes: tuple[Shape, ...]) -> int:
    """What a result of a fusion writes: an update in place, the update alone."""
    if root.opcode == "dynamic-update-slice" and _bytes(shapes):
        return sum(shape.bytes for shape in inner.by_name[root.operands[1]].shapes)
    return _bytes(shapes)


def _read(
    inner: Computation,
    parameter: Instruction,
    source: Instruction | None,
    users: dict[str, list[Instruction]],
) -> int:
    """What a fusion reads of an operand: slices of it where nothing else is wanted."""
    if source is None or not _bytes(source.shapes):
        return 0
    wanted = 0
    for user in users.get(parameter.name, ()):
        if user.opcode in _SLICES and user.operands[0] == parameter.name:
            wanted += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue
        elif user.opcode == "bitcast":
            wanted += _read(inner, user, source, users)
        else:
            return _bytes(source.shapes)
    return min(wanted, _bytes(source.shapes))


def _users(inner: Computation) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = {}
    for part in inner.instructions:
        if part.opcode not in ("parameter", "constant"):
            for name in set(part.operands):
                users.setdefault(name, []).append(part)
    return users


def _behind(inner: Computation, instruction: Instruction) -> Instruction:
    """What an instruction is another view of."""
    while instruction.opcode in _HANDS_ON and instruction.operands:
        source = inner.by_name.get(instruction.operands[0])
        if source is None:
            break
        instruction = source
    return instruction
