"""Reading a kernel's static schedule from the TPU compiler's dumps: loops, trip counts, unit use.

Every loop's bundles are multiplied by the trip counts around it. A loop whose trip count is not in
the dump is refused, not guessed.
"""

import dataclasses
import math
import re

_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*(>*)\s*\{(.*)$")
_LOOP_START = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+LB\s*:\s*(>+)\s*\{")
_REGION = re.compile(r"(?:Start|Start/End empty) region (\d+)")
_COPY = re.compile(r"= dma\.(?:hbm_to_vmem|vmem_to_hbm)[^;]*?granules=\*/(?:\d+)")
_EXIT_TEST = re.compile(
    r"%(p\w+) = scmp\.ge\.s32\.totalorder (?:\(!?%p\w+\), )?%(s\w+), (-?\d+) /\* loop exit test \*/"
)
_BRANCH_BACK = re.compile(r"sbr\.rel \(!%(p\w+)\) target = \$region(\d+)")


class UnknownTripCount(ValueError):
    """A loop's trip count cannot be read from the schedule."""


@dataclasses.dataclass
class Loop:
    """One loop of a schedule; the outermost "loop" is the program itself.

    Attributes:
      depth: nesting, 0 for the program.
      trips: iterations each time it is entered.
      bundles: bundles of the body outside inner loops.
      copies: DMA descriptors issued by the body outside inner loops.
      inner: loops directly inside.
    """

    depth: int
    trips: int
    bundles: int = 0
    copies: int = 0
    inner: list["Loop"] = dataclasses.field(default_factory=list)

    def total(self, field: str) -> int:
        """`field` summed over the loop and all inside it, times the trip counts."""
        return self.trips * (getattr(self, field) + sum(x.total(field) for x in self.inner))


def read_schedule(text: str) -> Loop:
    """Parses a final-bundles dump.

    Raises:
      UnknownTripCount: a loop is not a counted loop with constant bounds.
    """
    program = Loop(depth=0, trips=1)
    open_loops = [program]
    for line in text.splitlines():
        bundle = _BUNDLE.match(line)
        if bundle is None:
            continue
        depth = len(bundle[1])
        if _LOOP_START.match(line):
            open_loops = [x for x in open_loops if x.depth < depth]
            loop = Loop(depth=depth, trips=_trip_count(line, text))
            open_loops[-1].inner.append(loop)
            open_loops.append(loop)
        # A bundle in a branch's delay slots may belong to an outer loop: go by its own depth.
        owners = [x for x in open_loops if x.depth <= depth]
        owners[-1].bundles += 1
        if "shalt.err" not in bundle[2]:  # the bounds check repeats the copy
            owners[-1].copies += len(_COPY.findall(bundle[2]))
    if not program.bundles and not program.inner:
        raise ValueError("no bundles found: not a final-bundles dump?")
    return program


def _trip_count(start_line: str, text: str) -> int:
    tests = {predicate: (index, int(n)) for predicate, index, n in _EXIT_TEST.findall(text)}
    regions = set(_REGION.findall(start_line))
    exits = [tests.get(p) for p, region in _BRANCH_BACK.findall(text) if region in regions]
    where = start_line.split("{")[0].strip()
    if len(exits) != 1 or exits[0] is None:
        raise UnknownTripCount(f"the loop at bundle {where} has no exit test against a constant")
    index, stop = exits[0]
    copies = re.findall(rf"%(s\w+) = smov %{index}\b", text)
    names = "|".join([index, *copies])
    found = re.search(rf"%(s\w+) = sphi %(s\w+), %(?:{names})\b", start_line)
    first = found and re.search(rf"%{found[2]} = smov (?:\(!?%p\w+\), )?(-?\d+)\b", text)
    step = re.search(rf"%{index} = sadd\.s32 (?:\(!?%p\w+\), )?(\d+), %(s\w+)", text)
    if not found and step:
        kept = _kept_counter(index, int(step[1]), step[2], start_line, text)
        if kept is not None:
            return max(1, math.ceil((stop - kept) / int(step[1])))
    if not first or not step or not _same_scalar(step[2], found[1], text):
        raise UnknownTripCount(f"the counter of the loop at bundle {where} is not a constant range")
    return max(1, math.ceil((stop - int(first[1])) / int(step[1])))


def _kept_counter(index: str, step: int, previous: str, start_line: str, text: str) -> int | None:
    """First value of a counter that is kept in memory from pass to pass, not in a register.

    The slot that `index`, or the same sum computed once more, is stored to must be one that
    `previous` was loaded from (through other slots, maybe), and hold a constant before the loop.
    """
    before, _, inside = text.partition(start_line)
    for slot in _slots(previous, text):
        stored = re.findall(rf"sst \[smem:\[{slot}\]\] %(s\w+)", start_line + inside)
        same = [
            name
            for name in stored
            for other in re.findall(rf"%{name} = sadd\.s32 {step}, %(s\w+)", text)
            if slot in _slots(other, text)
        ]
        if index in stored or same:
            first = re.findall(rf"sst \[smem:\[{slot}\]\] %(s\w+)", before)
            value = first and re.search(rf"%{first[-1]} = smov (-?\d+)\b", before)
            return int(value[1]) if value else None
    return None


def _slots(name: str, text: str) -> list[str]:
    """Slots of memory that a scalar was loaded from, one after the other, through copies."""
    slots: list[str] = []
    while True:
        while copied := re.search(rf"%{name} = smov %(s\w+)", text):
            name = copied[1]
        loaded = re.search(rf"%{name} = sld \[smem:\[(#\w+_spill)\]\]", text)
        if not loaded or loaded[1] in slots:
            return slots
        slots.append(loaded[1])
        stored = re.search(rf"sst \[smem:\[{loaded[1]}\]\] %(s\w+)", text)
        if not stored:
            return slots
        name = stored[1]


def _same_scalar(name: str, original: str, text: str) -> bool:
    """Whether `name` is `original`, or was loaded from the slot `original` was spilled to."""
    if name == original:
        return True
    slot = re.search(rf"%{name} = sld \[smem:\[(#\w+_spill)\]\]", text)
    return bool(slot) and f"sst [smem:[{slot[1]}]] %{original}" in text


def read_utilization(text: str) -> dict[str, float]:
    """Share of each unit's issue slots in use over the whole program, from the dump of it."""
    header, body = text.split("== UTILIZATION:\n")
    names_line, capacity_line = header.strip().splitlines()[-2:]
    names = [x.strip() for x in names_line.split(",")]
    capacity = [int(x) for x in capacity_line.split()]
    rows = [[int(x) for x in line.split()] for line in body.splitlines() if line.strip()]
    return {
        name: round(sum(row[i] for row in rows) / (len(rows) * capacity[i]), 3)
        for i, name in enumerate(names)
    }
