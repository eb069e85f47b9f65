"""Reads compiled programs: the optimised HLO text of XLA, as `compiled.as_text()` prints it.

The text is what the compiler will run, after partitioning, fusion and assignment of memories, so
that everything the planner reports is read off it and nothing is modelled. Only the structure is
kept: computations, instructions, array shapes with their layouts, and attributes as text, which
`loops` and `work` take apart where they need them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # other types carry their width in the name
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
# Of a Pallas kernel: the one attribute that takes several lines.
_METADATA = re.compile(r"kernel_metadata=\{\n.*?\n\}\}", re.DOTALL)
_REFERENCE = re.compile(r"%([\w.\-]+)")
_HOST_SPACE = 5  # pinned memory of the host, as layouts of TPU programs number it
_STACK_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


class HloError(ValueError):
    """The text is not the HLO that this reader knows."""


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape of one array.

    Attributes:
      dtype: XLA's name, such as "bf16".
      dims: sizes.
      layout: text inside the layout's braces, such as "1,0:T(8,128)(2,1)S(1)"; "" if none.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def itemsize(self) -> float:
        """Bytes of an element; 4-bit types have half of one."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            width = re.search(r"\d+", self.dtype)
            if width is None:
                raise HloError(f"unknown element type {self.dtype!r}")
            bits = int(width[0])
        return bits / 8

    @property
    def bytes(self) -> int:
        """Bytes in memory: the minor dimensions are padded to the layout's first tile."""
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        order = re.match(r"[\d,]+", self.layout)
        if not tile or not order:
            return int(self.elements * self.itemsize)
        sizes = [self.dims[int(i)] for i in order[0].strip(",").split(",")]  # minor to major
        tiles = [int(n) for n in reversed(tile[1].split(","))]
        sizes += [1] * (len(tiles) - len(sizes))
        padded = [-(-s // t) * t for s, t in zip(sizes, tiles, strict=False)]
        return int(math.prod(padded + sizes[len(tiles) :]) * self.itemsize)

    @property
    def space(self) -> int:
        """Number of the memory that the array lies in; 0 is the device's main memory."""
        space = re.search(r"S\((\d+)\)", self.layout)
        return int(space[1]) if space else 0

    @property
    def on_host(self) -> bool:
        """Whether the array lies in the host's memory."""
        return self.space == _HOST_SPACE

    @property
    def hbm_bytes(self) -> int:
        """`bytes` of an array in the device's main memory, 0 of one elsewhere."""
        return self.bytes if self.space == 0 else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the leading "%".
      opcode: such as "fusion".
      arrays: result; the leaves of a tuple in order.
      operands: names of other instructions of the same computation.
      literal: text between the operand parentheses, for constants and parameters.
      attributes: text after the operands.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str

    def attribute(self, name: str) -> str | None:
        """Text of an attribute such as "index" or "dim_labels"; None where it is not given."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|\"[^\"]*\"|[^\s,]+)", self.attributes)
        return found and found[1]

    def called(self, name: str) -> str | None:
        """Name of the computation in an attribute such as "calls" or "body"."""
        text = self.attribute(name)
        return text and text.lstrip("%")

    @property
    def op_name(self) -> str:
        """Path of the JAX operation that the instruction comes from; "" if there is none."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def array(self) -> Array:
        """The result of an instruction with one result."""
        return self.arrays[0]


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the module; `instructions` by name, in order."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read each instruction."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: Computation
    frames: dict[int, tuple[str, str, int]]  # stack frame -> (file, function, parent frame)

    def source(self, instruction: Instruction) -> Iterator[tuple[str, str]]:
        """(file, function) of the Python calls that made an instruction, innermost first."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        frame, seen = int(found[1]) if found else 0, set()
        while frame in self.frames and frame not in seen:
            seen.add(frame)
            file, function, parent = self.frames[frame]
            yield file, function
            frame = parent


def parse(text: str) -> Module:
    """The module of an HLO text.

    Raises:
      HloError: no entry computation, or a line that is not understood.
    """
    lines = _METADATA.sub(lambda found: found[0].replace("\n", " "), text).splitlines()
    if not lines or not lines[0].startswith("HloModule "):
        raise HloError("not HLO text: the first line does not begin with 'HloModule'")
    computations, entry, current = {}, None, None
    for line in lines[1:]:
        if current is None:
            header = _HEADER.match(line)
            if header:
                current, instructions, root = header[2], {}, None
                entry = current if header[1] else entry
        elif line.startswith("}"):
            if root is None:
                raise HloError(f"computation {current} has no root")
            computations[current] = Computation(current, instructions, root)
            current = None
        else:
            is_root, instruction = _instruction(line)
            instructions[instruction.name] = instruction
            root = instruction if is_root else root
    if entry is None:
        raise HloError("the HLO text has no ENTRY computation")
    return Module(computations, computations[entry], _stack_frames(lines))


def _instruction(line: str) -> tuple[bool, Instruction]:
    head = _NAME.match(line)
    if head is None:
        raise HloError(f"not an instruction: {line[:120]!r}")
    end = _shape_end(line, head.end())
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        raise HloError(f"no opcode in {line[:120]!r}")
    close = _closing(line, opcode.end() - 1)
    inner = line[opcode.end() : close]
    # A literal (of a constant) and parameter numbers name no other instruction.
    names = () if opcode[1] in ("constant", "parameter") else tuple(_REFERENCE.findall(inner))
    return bool(head[1]), Instruction(
        name=head[2],
        opcode=opcode[1],
        arrays=tuple(arrays(line[head.end() : end])),
        operands=names,
        literal=inner,
        attributes=_without_body(line[close + 1 :]),
    )


def arrays(text: str) -> Iterator[Array]:
    """All array shapes in a text, in order."""
    for dtype, dims, layout in _ARRAY.findall(text):
        yield Array(dtype, tuple(int(d) for d in dims.split(",") if d), layout)


def _without_body(attributes: str) -> str:
    """Attributes without the code of a custom kernel, which may be long."""
    return re.sub(r'"body":"[^"]*"', '"body":""', attributes)


def _shape_end(line: str, start: int) -> int:
    """Index after the shape that begins at `start`."""
    if line[start] == "(":
        return _closing(line, start) + 1
    return line.index(" ", start)


def _closing(line: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise HloError(f"unbalanced parentheses in {line[:120]!r}")


def _stack_frames(lines: list[str]) -> dict[int, tuple[str, str, int]]:
    """Stack frames by number, from the tables before the first computation."""
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] | None = None
    for line in lines[1:]:
        if _HEADER.match(line):
            break
        if line in _STACK_TABLES:
            table = tables.setdefault(line, {})
        elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
            table[int(row[1])] = row[2].strip('"')
    if set(tables) != set(_STACK_TABLES):
        return {}
    number = lambda key, text: int(re.search(rf"\b{key}=(\d+)", text)[1])
    frames = {}
    for frame, text in tables["StackFrames"].items():
        location = tables["FileLocations"][number("file_location_id", text)]
        file = tables["FileNames"][number("file_name_id", location)]
        function = tables["FunctionNames"][number("function_name_id", location)]
        frames[frame] = (file, function, number("parent_frame_id", text) if "parent" in text else 0)
    return frames
