"""Facts of a compiled program, read off its HLO text: what devices exchange, how often, and which
products they compute.

    text = jax.jit(f).lower(*shapes).compile().as_text()
    for c in collectives(text):
        print(c.kind, c.shapes, c.bytes, c.group_size, c.trips, c.where)

Shapes and bytes are those of one device. Trips are the product of the turns of the loops around a
place; inside a loop whose end the data decide they are None.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from rlbf_jax.parallel.executed import Executed, executed
from rlbf_jax.parallel.hlo import Instruction, Program, Shape, parse

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_OTHER_NAMES = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "collective-permute"}

_REDUCE_SCATTER = "all-reduce-scatter"
"""How TPU programs name a fusion that is a reduce-scatter."""

_LISTED = re.compile(r"\breplica_groups=\{\{([^}]*)\}")
_EMPTY = re.compile(r"\breplica_groups=\{\}")
_IOTA = re.compile(r"\breplica_groups=\[([\d,]+)\]<=")
_MESH = re.compile(r"\breplica_groups=(?:@?\w+)?\[([^\]]*)\][^{]*\{([^}]*)\}")
_AXIS = re.compile(r"'?([\w.\-]+)'?=(\d+)")
_SUBAXIS = re.compile(r"'?([\w.\-]+)'?(?::\(\d+\)(\d+))?")
_PAIRS = re.compile(r"\bsource_target_pairs=\{(.*?)\}\}")
_PARTITIONS = re.compile(r"\bnum_partitions=(\d+)")
_REPLICAS = re.compile(r"\breplica_count=(\d+)")
_CONTRACTED = re.compile(r"\blhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"\bdim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")
_TARGET = re.compile(r'\bcustom_call_target="([^"]*)"')
_PRODUCT_CALL = re.compile(r"matmul|gemm|\bdot\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices."""

    kind: str
    """One of `KINDS`; the -start of an asynchronous one stands for it."""
    shapes: tuple[Shape, ...]
    """Arrays of the result, as one device has them: several where exchanges were combined."""
    group_size: int | None
    """Devices that take part in one exchange; None where the text does not say."""
    trips: int | None
    """How often it runs; None inside a loop whose turns are not known."""
    where: str
    """The traced operation that it was made for (`op_name`); empty where the text says none."""
    name: str = ""
    """Of the instruction."""

    @property
    def bytes(self) -> int:
        """Result bytes of one device in one trip."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def total_bytes(self) -> int | None:
        """Result bytes of one device in all trips; None where they are not known."""
        return None if self.trips is None else self.bytes * self.trips

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends in one trip, by the ring algorithms (Thakur, Rabenseifner and
        Gropp, Int. J. High Perform. Comput. Appl. 19, 2005): with g devices a group and n result
        bytes, all-gather and all-to-all n (g - 1) / g, all-reduce 2 n (g - 1) / g,
        reduce-scatter n (g - 1), collective-permute n. Groups that the text does not say count as
        large ones."""
        if self.kind == "collective-permute":
            return float(self.bytes)
        if self.kind == "reduce-scatter":
            return float(self.bytes * ((self.group_size or 2) - 1))
        share = 1.0 if self.group_size is None else 1 - 1 / self.group_size
        return (2.0 if self.kind == "all-reduce" else 1.0) * share * self.bytes


@dataclasses.dataclass(frozen=True)
class Loop:
    """One `while`."""

    name: str
    turns: int | None
    """Of one run of it."""
    trips: int | None
    """How often it is begun."""
    where: str


@dataclasses.dataclass(frozen=True)
class Dot:
    """One product of matrices: a `dot`, a `convolution` (as TPU programs have them), or a call of a
    library's product."""

    operands: tuple[Shape, ...]
    result: Shape
    flops: int | None
    """Multiplications and additions of one trip on one device; None for a library's call whose
    contraction the text does not say."""
    trips: int | None
    where: str


def collectives(text: str, unknown_turns: int | None = None) -> list[Collective]:
    """What devices exchange, one entry a place in the program. Raises ValueError for a text that is
    no compiled program.

    Args:
      unknown_turns: what is assumed of loops whose turns are not known, see `executed`.
    """
    devices, program = _devices(text), parse(text)
    found = []
    for at in executed(program, unknown_turns):
        instruction = at.instruction
        inside = instruction
        kind = kind_of(instruction.opcode)
        if at.computation.name.startswith(_REDUCE_SCATTER):
            continue  # counted where it is called
        if (scattered := _scattered(program, instruction)) is not None:
            kind, inside = "reduce-scatter", scattered
        if kind is None:
            continue
        size = group_size(inside.attributes, devices)
        where = instruction.where or inside.where
        shapes = _exchanged(instruction, kind)
        found.append(Collective(kind, shapes, size, at.trips, where, instruction.name))
    return found


def while_loops(text: str) -> list[Loop]:
    """The loops that a program runs, outer ones before what they hold."""
    return [
        Loop(i.name, at.turns, at.trips, i.where)
        for at in executed(parse(text))
        if (i := at.instruction).opcode == "while"
    ]


def dots(text: str, unknown_turns: int | None = None) -> list[Dot]:
    """The products of matrices that a program computes, those inside fusions too."""
    places = executed(parse(text), unknown_turns)
    return [dot for at in places if (dot := dot_of(at)) is not None]


def kind_of(opcode: str) -> str | None:
    """The kind of an opcode's exchange, None for what is none and for the end of one."""
    name = opcode.removesuffix("-start")
    name = _OTHER_NAMES.get(name, name)
    return name if name in KINDS else None


def _scattered(program: Program, instruction: Instruction) -> Instruction | None:
    """The exchange inside a TPU's fusion of an all-reduce and the slice of it that a device keeps,
    which is one reduce-scatter."""
    for _, name in instruction.called() if instruction.opcode == "fusion" else ():
        if name.startswith(_REDUCE_SCATTER) and name in program.computations:
            parts = program.computations[name].instructions
            return next((part for part in parts if kind_of(part.opcode) == "all-reduce"), None)
    return None


def _exchanged(instruction: Instruction, kind: str) -> tuple[Shape, ...]:
    """Arrays of the result. A -start also gives its operands, in front, and handles, behind."""
    if not instruction.opcode.endswith("-start") or kind == "all-reduce":
        return instruction.shapes
    return instruction.parts[1] if len(instruction.parts) > 1 else instruction.shapes


def group_size(attributes: str, devices: int | None = None) -> int | None:
    """Devices of one group, whichever way the groups are written: `{{0,1},{2,3}}`,
    `[2,4]<=[8]`, `mesh['x'=2,'y'=4] {'y'}`, or `{}`, which means all `devices`."""
    if match := _LISTED.search(attributes):
        return len([device for device in match.group(1).split(",") if device.strip()])
    if match := _IOTA.search(attributes):
        return int(match.group(1).split(",")[-1])
    if match := _MESH.search(attributes):
        sizes = {name: int(size) for name, size in _AXIS.findall(match.group(1))}
        axes = [_SUBAXIS.fullmatch(axis.strip()) for axis in match.group(2).split(",")]
        parts = [int(axis.group(2) or sizes[axis.group(1)]) for axis in axes if axis]
        return math.prod(parts)
    if _PAIRS.search(attributes):
        return 2
    return devices if _EMPTY.search(attributes) else None


def _devices(text: str) -> int | None:
    head = text[: text.find("\n")]
    counts = [pattern.search(head) for pattern in (_PARTITIONS, _REPLICAS)]
    known = [int(count.group(1)) for count in counts if count]
    return math.prod(known) if known else None


# Products -----------------------------------------------------------------------------------------


def dot_of(at: Executed) -> Dot | None:
    """The product that an instruction computes, None where it is none."""
    instruction = at.instruction
    if instruction.opcode == "custom-call":
        target = _TARGET.search(instruction.attributes)
        if target is None or not _PRODUCT_CALL.search(target.group(1)):
            return None
    elif instruction.opcode not in ("dot", "convolution"):
        return None
    inputs = [at.computation.by_name.get(name) for name in instruction.operands]
    operands = tuple(i.shapes[0] for i in inputs if i is not None and i.shapes)[:2]
    result = instruction.shapes[0]
    return Dot(operands, result, _flops(instruction, operands, result), at.trips, instruction.where)


def _flops(instruction: Instruction, operands: tuple[Shape, ...], result: Shape) -> int | None:
    if len(operands) < 2:
        return None
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction.attributes, operands[1], result, operands[0])
    match = _CONTRACTED.search(instruction.attributes)
    if match is None:
        return None
    contracted = [operands[0].dims[int(d)] for d in match.group(1).split(",") if d]
    return 2 * result.size * math.prod(contracted)


def _convolution_flops(attributes: str, kernel: Shape, result: Shape, signal: Shape) -> int | None:
    """2 x (products that meet an element of the signal). Batched products of matrices stand in TPU
    programs as windows over dilated signals, of which most positions meet padding."""
    labels = _LABELS.search(attributes)
    if labels is None:
        return None
    lhs, rhs, out = labels.groups()
    met = result.dims[out.index("b")] * result.dims[out.index("f")] * kernel.dims[rhs.index("i")]
    window = _window(attributes)
    for axis in sorted(set(out) - {"b", "f"}):
        number = int(axis)
        met *= _met(
            result.dims[out.index(axis)],
            signal.dims[lhs.index(axis)],
            kernel.dims[rhs.index(axis)],
            {name: values[number] for name, values in window.items() if number < len(values)},
        )
    return 2 * met


def _window(attributes: str) -> dict[str, list[str]]:
    match = _WINDOW.search(attributes)
    pairs = (part.partition("=") for part in match.group(1).split()) if match else ()
    return {name: value.split("x") for name, _, value in pairs}


def _met(outputs: int, signal: int, kernel: int, window: dict[str, str]) -> int:
    """Pairs (output, tap) of one spatial axis that meet an element of the signal."""
    stride, between, spread = (
        int(window.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    low = int(window.get("pad", "0_0").split("_")[0])
    last = (signal - 1) * between
    return sum(_taps(o * stride - low, kernel, spread, between, last) for o in range(outputs))


def _taps(first: int, kernel: int, spread: int, between: int, last: int) -> int:
    places: Iterator[int] = (first + tap * spread for tap in range(kernel))
    return sum(0 <= place <= last and place % between == 0 for place in places)
