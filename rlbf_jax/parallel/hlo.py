"""A compiled program's HLO text as computations of instructions.

The text is what `jax.stages.Compiled.as_text()` gives, of the CPU, GPU and TPU backends alike:
`%name = TYPE opcode(%operand, ...), attribute=value, ...`, one instruction a line.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s.*\{\s*$")
_NAME = re.compile(r"^\s+(?:ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$")
_OPCODE = re.compile(r"^\s*([\w\-]+)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{[^}]*?S\((\d+)\)\})?")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_INDEX = re.compile(r"\bindex=(\d+)")
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_COMMENT = re.compile(r"/\*.*?\*/")
_OPEN, _CLOSE = "([{", ")]}"

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of a program, as one device holds it."""

    dtype: str
    """XLA's name: f32, bf16, s32, pred, ..."""
    dims: tuple[int, ...]
    space: int = dataclasses.field(default=0, compare=False)
    """Where it lies: 0 the device's memory; on TPU others are on the chip."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without the padding of a layout."""
        return -(-self.size * bits(self.dtype) // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Arrays of the result; those of a tuple in their order, nested tuples flattened."""
    parts: tuple[tuple[Shape, ...], ...]
    """Elements of a tuple, each flattened; the result itself where it is no tuple."""
    operands: tuple[str, ...]
    """Names of instructions of the same computation."""
    attributes: str
    """What stands behind the operands, as it is."""
    root: bool = False
    """Whether its result is the computation's."""

    @property
    def where(self) -> str:
        """The traced operation that it was made for (`op_name`), empty where it says none."""
        match = _OP_NAME.search(self.attributes)
        return match.group(1) if match else ""

    @property
    def index(self) -> int:
        """Place in the tuple of a `get-tuple-element`."""
        match = _INDEX.search(self.attributes)
        return int(match.group(1)) if match else 0

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(shape.bytes for shape in self.shapes)

    def called(self) -> Iterator[tuple[str, str]]:
        """(how, computation) of the computations that it runs."""
        for how, name in _CALLED.findall(self.attributes):
            yield how, name
        for names in _BRANCHES.findall(self.attributes):
            for name in names.split(","):
                yield "branch", name.strip().removeprefix("%")


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in their order."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next((i for i in self.instructions if i.root), self.instructions[-1])


@dataclasses.dataclass(frozen=True)
class Program:
    """A module of computations."""

    computations: dict[str, Computation]
    entry: str


def bits(dtype: str) -> int:
    """Bits of one element of XLA's `dtype`. Raises ValueError for a name that is none."""
    if dtype in _BITS:
        return _BITS[dtype]
    match = re.fullmatch(r"[suf](\d+)(?:e\d\w*)?", dtype)
    if match is None:
        raise ValueError(f"{dtype}: no element type of HLO")
    return int(match.group(1))


@functools.lru_cache(maxsize=8)
def parse(text: str) -> Program:
    """The program of an HLO text. Raises ValueError for a text without an ENTRY computation."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    lines: list[Instruction] = []
    for line in text.splitlines():
        if not line.startswith((" ", "\t", "}")):
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                name, lines = header.group(2), []
                entry = name if header.group(1) else entry
        elif line.startswith("}"):
            if name and lines:
                computations[name] = Computation(name, tuple(lines))
            name = ""
        elif name and (instruction := _instruction(line)) is not None:
            lines.append(instruction)
    if entry not in computations:
        raise ValueError("no ENTRY computation; expected the text of a compiled program")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    match = _NAME.match(line)
    if match is None:
        return None
    name, rest = match.groups()
    if "/*" in rest:
        rest = _COMMENT.sub("", rest)
    end = _end(rest, 0) if rest.startswith("(") else rest.find(" ")
    if end < 0:
        return None
    kind, rest = rest[:end], rest[end:]
    opcode = _OPCODE.match(rest)
    if opcode is None:
        return None
    close = _end(rest, opcode.end() - 1)
    operands = [text.split()[-1] for text in split(rest[opcode.end() : close - 1]) if text.strip()]
    parts = split(kind[1:-1]) if kind.startswith("(") else [kind]
    shapes = tuple(tuple(arrays(part)) for part in parts)
    return Instruction(
        name,
        opcode.group(1),
        tuple(shape for part in shapes for shape in part),
        shapes,
        tuple(operand.removeprefix("%") for operand in operands),
        rest[close:],
        line.lstrip().startswith("ROOT "),
    )


def arrays(text: str) -> Iterator[Shape]:
    """Arrays that a type names, in order; layouts are left out."""
    for dtype, dims, space in _ARRAY.findall(text):
        sizes = [int(part.strip(" <=")) for part in dims.split(",") if part.strip(" <=")]
        yield Shape(dtype, tuple(sizes), int(space or 0))


def _end(text: str, start: int) -> int:
    """Behind the bracket that closes the one at `start`; -1 where none does."""
    depth = 0
    for at in range(start, len(text)):
        if text[at] in _OPEN:
            depth += 1
        elif text[at] in _CLOSE:
            depth -= 1
            if depth == 0:
                return at + 1
    return -1


def split(text: str) -> list[str]:
    """Parts between commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        if letter in _OPEN:
            depth += 1
        elif letter in _CLOSE:
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]
