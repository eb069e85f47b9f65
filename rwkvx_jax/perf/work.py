"""What a compiled program does: products, bytes, kernels and collectives of each operation.

Operations are taken as the compiler left them: a fusion is one operation, which reads its operands
and writes its results once. Arrays count as they lie in memory, tile padding included; what lies on
the chip counts nothing. Products are counted by the entries that exist (a padded or dilated window
meets zeros that are not multiplied), and again in passes of the matrix unit, of which a float32
product at higher precision needs several. A Pallas kernel counts as its own cost estimate says.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from rwkvx_jax.perf import collectives
from rwkvx_jax.perf.collectives import Collective
from rwkvx_jax.perf.hlo import Array, Computation, Instruction, Module
from rwkvx_jax.perf.loops import Frame, Loops, Trips

# bfloat16 passes of a float32 product, by its precision.
_PASSES = {"highest": 6, "high": 3}
# Moves nothing, or is the second half of something counted at its first.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "add-dependency",
    "partition-id",
    "replica-id",
    "optimization-barrier",
    "domain",
}
_READS_PART = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}
"""Operations that change a part of their first operand in place; the operand with the new part."""
_RENAMES = ("bitcast", "reshape", "transpose", "copy", "convert")


@dataclasses.dataclass(frozen=True)
class Work:
    """One operation of the program.

    Attributes:
      name: of the instruction.
      times: how often it runs.
      flops: of its matrix products, once; those of a kernel by the kernel's estimate.
      passes: the same in flops of single bfloat16 passes.
      bytes: read from and written to main memory, once.
      host_bytes: moved between main memory and the host's, once.
      kernel: name of the Pallas kernel, or None.
      kernel_bytes: arguments and results of the kernel, wherever they lie.
      parallel_steps: steps of the kernel's grid that cores may share (see
        `pallas_kernels.common.grid_options`); None where the kernel does not say.
      collective: what it exchanges, or None.
      source: (file, function) of the Python calls that made it, innermost first.
    """

    name: str
    times: float
    flops: float = 0.0
    passes: float = 0.0
    bytes: float = 0.0
    host_bytes: float = 0.0
    kernel: str | None = None
    kernel_bytes: float = 0.0
    parallel_steps: int | None = None
    collective: Collective | None = None
    source: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class LoopNote:
    """A loop whose number of iterations is not a constant of the program."""

    trips: Trips
    source: tuple[tuple[str, str], ...]


def read_work(module: Module, devices: int) -> tuple[list[Work], list[LoopNote]]:
    """All operations of a program for `devices` devices, each as one of them runs it."""
    reader = _Reader(module, devices)
    return list(reader.run(reader.loops.entry, 1.0)), reader.notes


class _Reader:
    def __init__(self, module: Module, devices: int):
        self.module, self.devices = module, devices
        self.loops = Loops(module)
        self.notes: list[LoopNote] = []
        self.channels: dict[str, set[str]] = {}  # by name of a computation: see `_started`

    def run(self, frame: Frame, times: float) -> Iterator[Work]:
        """Operations of a computation that runs `times` times."""
        for instruction in frame.computation.instructions.values():
            yield from self._instruction(frame, instruction, times)

    def _instruction(self, frame: Frame, instruction: Instruction, times: float):
        opcode = instruction.opcode
        if opcode == "while":
            trips = self.loops.trips(frame, instruction)
            if trips.basis != "constant":
                source = tuple(self.module.source(instruction))
                self.notes.append(LoopNote(trips, source))
            yield from self.run(self.loops.body(frame, instruction), times * trips.mean)
        elif opcode == "conditional":
            yield from self._heaviest_branch(frame, instruction, times)
        elif opcode in ("call", "call-start", "async-start"):
            attribute = "calls" if instruction.called("calls") else "to_apply"
            yield from self.run(self.loops.frame(frame, instruction, attribute), times)
        elif opcode not in _FREE and not opcode.endswith(("-done", "-update")):
            yield self._operation(frame.computation, instruction, times)

    def _heaviest_branch(self, frame: Frame, instruction: Instruction, times: float):
        branches = self.loops.branches(frame, instruction)
        found = [list(self.run(branch, times)) for branch in branches]
        yield from max(found, key=lambda works: sum(w.times * (w.bytes + w.passes) for w in works))

    def _operation(self, computation: Computation, instruction: Instruction, times: float) -> Work:
        flops, passes, collective, kernel, kernel_bytes = 0.0, 0.0, None, None, 0.0
        parallel_steps = None
        if instruction.opcode == "custom-call":
            flops = passes = _estimated_flops(instruction)
            if is_kernel(instruction):
                kernel = instruction.name.split(".")[0]
                given = (a for x in computation.operands(instruction) for a in x.arrays)
                kernel_bytes = sum(a.bytes for a in (*given, *instruction.arrays))
                steps = re.search(r'"parallel_steps":"(\d+)"', instruction.attributes)
                parallel_steps = int(steps[1]) if steps else None
        elif instruction.opcode == "fusion":
            inner = self.module.computations[instruction.called("calls")]
            flops, passes = self._products(inner)
            collective = self._fused_collective(computation, instruction)
        else:
            flops, passes = _product(computation, instruction)
            if collectives.kind_of(instruction):
                collective = collectives.read(instruction, computation, self.devices)
        crossing = _crosses_to_host(computation.operands(instruction), instruction)
        return Work(
            name=instruction.name,
            times=times,
            flops=flops,
            passes=passes,
            bytes=self._bytes(computation, instruction),
            host_bytes=getattr(crossing, "bytes", 0),
            kernel=kernel,
            kernel_bytes=kernel_bytes,
            parallel_steps=parallel_steps,
            collective=collective,
            source=tuple(self.module.source(instruction)),
        )

    def _products(self, computation: Computation) -> tuple[float, float]:
        """Flops and passes of all products in a fused computation."""
        total = np.zeros(2)
        for instruction in computation.instructions.values():
            if instruction.opcode == "fusion":
                inner = self.module.computations[instruction.called("calls")]
                total += self._products(inner)
            else:
                total += _product(computation, instruction)
        return tuple(total)

    def _fused_collective(self, computation: Computation, fusion: Instruction) -> Collective | None:
        """The collective inside a fusion: TPU programs fuse what follows an all-reduce into it.

        An asynchronous one is in several fusions of its computation: the one that starts it, those
        whose products run beside it, and the one that ends it. It counts in the first alone.
        """
        inner = self.module.computations[fusion.called("calls")]
        for instruction in inner.instructions.values():
            if collectives.kind_of(instruction):
                channel = instruction.attribute("channel_id")
                if channel in self._started(computation) and not starts(fusion):
                    return None
                found = collectives.read(instruction, inner, self.devices)
                if found and found.kind == "all-reduce" and "scatter" in inner.name:
                    return collectives.scattered(found)
                return found
        return None

    def _started(self, computation: Computation) -> set[str]:
        """Channels of the asynchronous collectives that fusions of a computation start."""
        if computation.name not in self.channels:
            fusions = filter(starts, computation.instructions.values())
            inner = (self.module.computations[x.called("calls")] for x in fusions)
            found = (x.attribute("channel_id") for y in inner for x in y.instructions.values())
            self.channels[computation.name] = {channel for channel in found if channel}
        return self.channels[computation.name]

    # What an operation reads and writes in main memory.

    def _bytes(self, computation: Computation, instruction: Instruction) -> float:
        opcode, operands = instruction.opcode, computation.operands(instruction)
        if crossing := _crosses_to_host(operands, instruction):
            return float(crossing.bytes)
        if opcode in ("copy-start", "slice-start"):
            moved = _moved(instruction)
            source = operands[0].array
            return moved.hbm_bytes + (moved.bytes if source.space == 0 else 0)
        if opcode == "custom-call" and not is_kernel(instruction):
            return 0.0  # the compiler's own markers: buffers, index checks
        if opcode.endswith("-start"):
            return sum(x.array.hbm_bytes for x in operands) * 2.0
        if opcode == "fusion":
            inner = self.module.computations[instruction.called("calls")]
            reads = sum(
                self._read(inner, inner.parameters[number]) if operand.array.space == 0 else 0.0
                for number, operand in enumerate(operands)
            )
            return reads + self._written(inner, instruction)
        if opcode in _UPDATES:
            part = operands[_UPDATES[opcode]].array
            given = operands[1:] if opcode == "scatter" else operands[1:2]  # else scalars follow
            return sum(x.array.hbm_bytes for x in given) + _smaller(instruction.array, part)
        writes = sum(array.hbm_bytes for array in instruction.arrays)
        if opcode in _READS_PART:
            return writes + _smaller(operands[0].array, instruction.array)
        return writes + sum(a.hbm_bytes for x in operands for a in x.arrays)

    def _read(self, computation: Computation, value: Instruction) -> float:
        """Bytes that a fused computation reads of one of its parameters."""
        whole = float(sum(array.bytes for array in value.arrays))
        total = 0.0
        for user in computation.users[value.name]:
            first = user.operands[0] == value.name
            if user.opcode in _READS_PART and first:
                total += user.array.bytes
            elif user.opcode in _UPDATES and first:
                total += 0.0  # updated in place
            elif user.opcode in _RENAMES and user is not computation.root:
                total += self._read(computation, user)
            elif user.opcode == "fusion":
                inner = self.module.computations[user.called("calls")]
                for number, name in enumerate(user.operands):
                    if name == value.name:
                        total += self._read(inner, inner.parameters[number])
            else:
                return whole
        return min(whole, total)

    def _written(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes that a fusion writes; one that updates a part in place writes that part."""
        root = computation.root
        roots = computation.operands(root) if root.opcode == "tuple" else [root]
        if len(roots) != len(instruction.arrays):
            return float(sum(array.hbm_bytes for array in instruction.arrays))
        total = 0.0
        for array, value in zip(instruction.arrays, roots, strict=True):
            while value.opcode in ("bitcast", "reshape") and value.operands:
                value = computation.instructions[value.operands[0]]
            if value.opcode in _UPDATES:
                part = computation.operands(value)[_UPDATES[value.opcode]]
                total += _smaller(array, part.array)
            else:
                total += array.hbm_bytes
        return total


def _moved(instruction: Instruction) -> Array:
    """The array that a copy-start or slice-start makes: the first of a copy's tuple; the second of
    a slice's, whose first is the input."""
    first, *rest = instruction.arrays
    if instruction.opcode == "copy-start" or not rest:
        return first
    return min((first, rest[0]), key=lambda array: array.bytes)


def _crosses_to_host(operands: list[Instruction], instruction: Instruction) -> Array | None:
    """The array that a copy moves between the memories of device and host; None for others."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode not in ("copy", "slice", "dynamic-slice", "dynamic-update-slice"):
        return None
    moved = [x.array for x in operands[: 2 if opcode == "dynamic-update-slice" else 1]]
    results = [a for a in instruction.arrays if len(a.dims) == len(moved[0].dims)]
    if not any(array.on_host for array in (*moved, *results)):
        return None
    return min((*moved, *results), key=lambda array: array.bytes)


def _smaller(place: Array, part: Array) -> float:
    """Bytes of `part` of an array that lies where `place` does."""
    return float(min(place.bytes, part.bytes)) if place.space == 0 else 0.0


def _estimated_flops(instruction: Instruction) -> float:
    """Flops by the `pl.CostEstimate` of a kernel; 0 where it gives none."""
    estimate = re.search(r'"cost_estimate":\{"flops":"?(\d+)', instruction.attributes)
    return float(estimate[1]) if estimate else 0.0


def _product(computation: Computation, instruction: Instruction) -> tuple[float, float]:
    """Flops and passes of a dot or convolution; zeros for anything else."""
    if instruction.opcode == "dot":
        flops = _dot_flops(computation, instruction)
    elif instruction.opcode == "convolution":
        flops = _convolution_flops(computation, instruction)
    else:
        return 0.0, 0.0
    wide = all(x.array.dtype == "f32" for x in computation.operands(instruction))
    precision = re.search(r"operand_precision=\{(\w+)", instruction.attributes)
    return flops, flops * (_PASSES.get(precision[1], 1) if wide and precision else 1)


def _dot_flops(computation: Computation, instruction: Instruction) -> float:
    left = computation.operands(instruction)[0].array
    contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    over = [left.dims[int(i)] for i in contracting[1].split(",") if i] if contracting else []
    return 2.0 * instruction.array.elements * math.prod(over)


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    left, right = (x.array for x in computation.operands(instruction)[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    window = _window(instruction.attributes)
    size_of = lambda array, names, name: array.dims[names.index(name)]
    pairs = 1
    for axis in range(sum(name.isdigit() for name in labels[1])):
        pairs *= _window_pairs(
            size_of(left, labels[1], str(axis)),
            size_of(instruction.array, labels[3], str(axis)),
            {key: values[axis] for key, values in window.items()},
        )
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = size_of(instruction.array, labels[3], "b") // (int(groups[1]) if groups else 1)
    features = size_of(right, labels[2], "i") * size_of(instruction.array, labels[3], "f")
    return 2.0 * batch * features * pairs


def _window(attributes: str) -> dict[str, list]:
    """Window of a convolution: a list over its dimensions for each of its fields."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in text[1].split()) if text else {}
    if not fields:
        return {}
    sizes = [int(n) for n in fields["size"].split("x")]
    listed = lambda name, default: (
        [int(n) for n in fields[name].split("x")] if name in fields else [default] * len(sizes)
    )
    pads = [part.split("_") for part in fields["pad"].split("x")] if "pad" in fields else []
    return {
        "size": sizes,
        "stride": listed("stride", 1),
        "low": [int(pad[0]) for pad in pads] or [0] * len(sizes),
        "input": listed("lhs_dilate", 1),
        "kernel": listed("rhs_dilate", 1),
    }


def _window_pairs(inputs: int, outputs: int, window: dict[str, int]) -> int:
    """Pairs (output, kernel entry) of one dimension that meet an input entry, not a padding."""
    if not window:
        return outputs
    place = np.arange(outputs, dtype=np.int64)[:, None] * window["stride"] - window["low"]
    total = 0
    for start in range(0, window["size"], 1024):  # in parts, as windows may be large
        entry = np.arange(start, min(start + 1024, window["size"]), dtype=np.int64)[None]
        at = place + entry * window["kernel"]
        meets = (at >= 0) & (at % window["input"] == 0) & (at // window["input"] < inputs)
        total += int(meets.sum())
    return total


def is_kernel(instruction: Instruction) -> bool:
    """Whether it is a Pallas kernel."""
    return instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.attributes


def starts(instruction: Instruction) -> bool:
    """Whether it is a fusion that starts an asynchronous collective, as libtpu names them."""
    return instruction.opcode == "fusion" and instruction.name.startswith("async-collective-start")
