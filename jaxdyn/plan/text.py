"""A compiled program's text, read: its computations and their instructions."""

import math
import re
from typing import NamedTuple

WIDTHS = {"pred": 1, "token": 0, "opaque": 0, "bf16": 2, "c64": 8, "c128": 16}
COLLECTIVES = {
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
}

Number = int | float


class Array(NamedTuple):
    """An array type: its dimensions, its bytes, and whether it lies in the device's main memory."""

    dims: tuple[int, ...]
    nbytes: Number
    main: bool


class Instruction(NamedTuple):
    """A line of a computation; `opcode` is without the "-start" of an asynchronous one.

    A parameter's number and a constant's value are its `attributes`.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    started: bool
    operands: tuple[str, ...]
    attributes: str


class Computation(NamedTuple):
    """Instructions by name, in order, the last of which is the result unless `root` says else."""

    instructions: dict[str, Instruction]
    root: str


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the entry's name."""
    found: dict[str, Computation] = {}
    name, entry, root = "", "", ""
    lines: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line.startswith("}"):
            found[name] = Computation(lines, root or next(reversed(lines)))
        elif line.endswith("{") and not line.startswith((" ", "HloModule")):
            header = re.match(r"(ENTRY )?%?([^\s(]+)", line)
            name, root, lines = header[2], "", {}  # type: ignore[index]
            entry = name if header[1] else entry  # type: ignore[index]
        elif " = " in line and line.startswith(" "):
            one = parse_line(line)
            lines[one.name] = one
            root = one.name if line.lstrip().startswith("ROOT ") else root
    return found, entry


def parse_line(line: str) -> Instruction:
    """One instruction: `%name = type opcode(operands), attributes`."""
    name, rest = line.strip().removeprefix("ROOT ").removeprefix("%").split(" = ", 1)
    end = closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    arrays, rest = arrays_of(rest[:end]), rest[end:].lstrip()
    opens = rest.index("(")
    closes = closing(rest, opens)
    opcode, started = rest[:opens], rest[:opens].endswith("-start")
    operands = tuple(re.findall(r"%([^\s,()]+)", rest[opens:closes]))
    inside = opcode in ("parameter", "constant")
    attributes = rest[opens + 1 : closes] if inside else rest[closes + 1 :]
    return Instruction(name, arrays, opcode.removesuffix("-start"), started, operands, attributes)


def closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    raise ValueError(f"no closing bracket in {text[:80]!r}")


def arrays_of(kind: str) -> tuple[Array, ...]:
    """The arrays of a type, of a tuple in order."""
    found = []
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?", kind):
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        main = space is None or space[1] == "0"
        found.append(Array(sizes, math.prod(sizes) * width(dtype), main))
    return tuple(found)


def width(dtype: str) -> Number:
    """Bytes an element."""
    if dtype in WIDTHS:
        return WIDTHS[dtype]
    return int(re.search(r"\d+", dtype)[0]) / 8  # type: ignore[index]


def results_of(one: Instruction) -> tuple[Array, ...]:
    """The arrays that an instruction makes; the type of one that is started has its operands too.

    (operands, results, ...) for most, (result, operand, ...) for a copy, and results alone for an
    all-reduce.
    """
    if not one.started or one.opcode == "all-reduce":
        return one.arrays
    if one.opcode == "copy":
        return one.arrays[:1]
    count = len(one.operands)
    return one.arrays[count : 2 * count if one.opcode in COLLECTIVES else count + 1]


def called_by(one: Instruction, name: str) -> list[str]:
    """The computations that an attribute names, one or {several}."""
    found = re.search(rf"\b{name}=(\{{[^}}]*\}}|%[^\s,]+)", one.attributes)
    return re.findall(r"%([^\s,{}]+)", found[1]) if found else []


def parameters_of(computation: Computation) -> list[str]:
    """The parameters' names, in the order of the operands."""
    found = [x for x in computation.instructions.values() if x.opcode == "parameter"]
    return [x.name for x in sorted(found, key=lambda x: int(x.attributes))]


def numbers(one: Instruction, name: str) -> list[int]:
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", one.attributes)
    return [int(x) for x in found[1].split(",") if x] if found else []
