"""Collective operations of a compiled program: how much they move, between which devices."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from rwkvx_jax.perf.hlo import Computation, HloError, Instruction

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_EXPLICIT = re.compile(r"replica_groups=(\{\{.*?\}\}|\{\})")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=(?:@\w+)?mesh\[(?P<axes>[^\]]*)\]"
    r"(?:, device_ids=\((?:\[(?P<iota>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?|(?P<ids>[\d,]+))\))?"
    r" \{(?P<over>[^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: one of `KINDS`.
      bytes: what one device holds: the larger of its input and its result.
      groups: device numbers, one row a group; for a permutation one row (source, target) a pair.
    """

    kind: str
    bytes: int
    groups: np.ndarray

    @property
    def group_size(self) -> int:
        return self.groups.shape[1]

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device must send, by the algorithm that sends least."""
        n = self.group_size
        share = (n - 1) / n
        return {
            "all-gather": share,
            "reduce-scatter": share,
            "all-reduce": 2 * share,
            "all-to-all": share,
            "ragged-all-to-all": share,
            "collective-permute": 1.0,
            "collective-broadcast": 1.0,
        }[self.kind] * self.bytes


def kind_of(instruction: Instruction) -> str | None:
    """The kind of a collective instruction, or of the first half of an asynchronous one."""
    name = instruction.opcode.removesuffix("-start")
    return name if name in KINDS else None


def read(instruction: Instruction, computation: Computation, devices: int) -> Collective | None:
    """The collective that an instruction is; None for one among single devices.

    Args:
      instruction: one with a `kind_of`.
      computation: the one it stands in.
      devices: number of devices the program runs on.
    """
    kind = kind_of(instruction)
    groups = replica_groups(instruction.attributes, devices)
    if groups.shape[1] < 2:
        return None
    given = sum(a.bytes for x in computation.operands(instruction) for a in x.arrays)
    results = sum(array.bytes for array in instruction.arrays)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        results = max(array.bytes for array in instruction.arrays)  # the tuple holds inputs too
        given = min(given, results) if kind == "all-gather" else given
    size = results if kind == "all-gather" else given
    return Collective(kind, size, groups)


def scattered(collective: Collective) -> Collective:
    """An all-reduce of which each device keeps its own part, which is a reduce-scatter."""
    return dataclasses.replace(collective, kind="reduce-scatter")


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """Devices of each group, from any of the notations of HLO; pairs of a permutation."""
    if pairs := _PAIRS.search(attributes):
        return _rows(pairs[1])
    if mesh := _MESH.search(attributes):
        return _mesh_groups(mesh)
    if iota := _IOTA.search(attributes):
        shape, dims = _numbers(iota[1]), _numbers(iota[2])
        order = _numbers(iota[3]) if iota[3] else range(len(dims))
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order)
        return ids.reshape(shape if len(shape) == 2 else (-1, shape[-1]))
    explicit = _EXPLICIT.search(attributes)
    if explicit is None:
        raise HloError(f"no replica groups in {attributes[:120]!r}")
    return _rows(explicit[1]) if explicit[1] != "{}" else np.arange(devices)[None]


def _mesh_groups(mesh: re.Match) -> np.ndarray:
    """Groups written as a mesh of named axes, and the axes that a group spans."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh["axes"])}
    if mesh["ids"]:
        ids = np.array(_numbers(mesh["ids"]))
    else:
        dims = _numbers(mesh["iota"]) if mesh["iota"] else list(axes.values())
        order = _numbers(mesh["order"]) if mesh["order"] else range(len(dims))
        ids = np.arange(math.prod(axes.values())).reshape(dims).transpose(order)
    # An axis may be named in part, as 'a':(before)size: then it counts as three.
    over, sizes, chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh["over"]), [], []
    for name, size in axes.items():
        parts = [(int(p), int(n)) for axis, p, n in over if axis == name and p]
        whole = any(axis == name and not p for axis, p, _ in over)
        done = 1  # 'before' counts from the start of the axis
        for before, part in sorted(parts):
            sizes += [before // done, part]
            chosen += [False, True]
            size //= before // done * part
            done = before * part
        sizes.append(size)
        chosen.append(whole)
    ids = ids.reshape(sizes)
    inside = [i for i, is_chosen in enumerate(chosen) if is_chosen]
    outside = [i for i, is_chosen in enumerate(chosen) if not is_chosen]
    return ids.transpose(outside + inside).reshape(-1, math.prod(sizes[i] for i in inside))


def _rows(text: str) -> np.ndarray:
    return np.array([_numbers(row) for row in re.findall(r"\{([\d,]+)\}", text)])


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
