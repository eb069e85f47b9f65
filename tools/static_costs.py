"""Static costs of the TPU kernels, read from the TPU compiler's own dumps, with no TPU.

A TPU core is a statically scheduled machine: how many instruction bundles a kernel issues is known
when it is compiled. Each case is compiled in a process of its own (the compiler reads its dump
flags once, before jax is imported); the dumped schedule is cut into loops, and every loop's bundles
are multiplied by the trip counts around it. A loop whose trip count is not in the dump is refused,
not guessed. Bundles are not time: waiting for memory is not in them. `seconds` turns them into an
estimate, and calls it that.

    python tools/static_costs.py               compile all cases, rewrite the table, print old/new
    python tools/static_costs.py --only v5e    cases whose name contains a text; prints, no rewrite
"""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "pallas_kernels" / "static_costs.json"
_GRANULE_BYTES = 32  # unit of a DMA's size in the dump
_PIPELINE_PASSES = 2  # extra passes of a grid loop, which fill and drain its copies
_TIME_LIMIT = 600  # seconds a compilation may take

# --------------------------------------------------------------------------------------------
# Reading a schedule
# --------------------------------------------------------------------------------------------

_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*(>*)\s*\{(.*)$")
_LOOP_START = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+LB\s*:\s*(>+)\s*\{")
_REGION = re.compile(r"(?:Start|Start/End empty) region (\d+)")
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
      copied_bytes: their bytes, tile padding included.
      inner: loops directly inside.
    """

    depth: int
    trips: int
    bundles: int = 0
    copies: int = 0
    copied_bytes: int = 0
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
        sizes = re.findall(r"= dma\.(?:hbm_to_vmem|vmem_to_hbm)[^;]*?granules=\*/(\d+)", bundle[2])
        sizes = [] if "shalt.err" in bundle[2] else sizes  # the bounds check repeats the copy
        owners[-1].copies += len(sizes)
        owners[-1].copied_bytes += _GRANULE_BYTES * sum(map(int, sizes))
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
    found = re.search(rf"%(s\w+) = sphi %(s\w+), %{index}\b", start_line)
    first = found and re.search(rf"%{found[2]} = smov (?:\(!?%p\w+\), )?(-?\d+)\b", text)
    step = re.search(rf"%{index} = sadd\.s32 (?:\(!?%p\w+\), )?(\d+), %(s\w+)", text)
    if not first or not step or not _same_scalar(step[2], found[1], text):
        raise UnknownTripCount(f"the counter of the loop at bundle {where} is not a constant range")
    return max(1, math.ceil((stop - int(first[1])) / int(step[1])))


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


# --------------------------------------------------------------------------------------------
# From bundles to an estimate
# --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one core: clock (Hz) and matrix peak (bfloat16 flop/s); memory bandwidth (bytes/s).

    Peaks and bandwidths are the vendor's; clocks are inferred from peak / (matrix units * their
    size^2 * 2). A DMA is charged at least `copy_seconds`, an assumption on the safe side.
    """

    clock: float
    flops: float
    bandwidth: float
    copy_seconds: float = 2e-7


CHIPS = {
    "v5e": Chip(clock=1.5e9, flops=197e12, bandwidth=819e9),
    "v5p": Chip(clock=1.75e9, flops=459e12 / 2, bandwidth=2765e9 / 2),
    "v6e": Chip(clock=1.75e9, flops=918e12, bandwidth=1640e9),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A piece of work that must end before the next begins.

    A kernel has bundles (times trip counts), bytes moved (padding included) and DMA descriptors; a
    stage of plain XLA has flops and bytes.
    """

    name: str
    bytes: int
    bundles: int = 0
    copies: int = 0
    flops: int = 0

    def seconds(self, chip: Chip) -> float:
        """Estimated time: the slowest of issuing, computing and moving, all overlapped."""
        moving = max(self.bytes / chip.bandwidth, self.copies * chip.copy_seconds)
        return max(self.bundles / chip.clock, self.flops / chip.flops, moving)


def seconds(stages: Iterable[Stage], chip: Chip) -> float:
    """Estimated time of stages one after the other."""
    return sum(stage.seconds(chip) for stage in stages)


# --------------------------------------------------------------------------------------------
# Cases
# --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel at one size on one chip.

    Attributes:
      kernel: name of the pallas_call, as in the dump's file names.
      chip: key of `CHIPS`.
      width, time: D and T; the batch is 1.
    """

    kernel: str
    chip: str
    width: int
    time: int

    @property
    def name(self) -> str:
        return f"{self.kernel}/{self.chip}/D{self.width}/T{self.time}"

    @property
    def topology(self) -> str:
        return "v5p:2x2x1" if self.chip == "v5p" else f"{self.chip}:2x2"


def all_cases() -> list[Case]:
    """Every case in the checked-in table."""
    return [
        Case(kernel, chip, width, time)
        for kernel in BUILDERS
        for chip in CHIPS
        for width in (768, 2560)
        for time in (4096, 65536)
    ]


def case_named(name: str) -> Case:
    """The case of a name such as "wkv7_forward/v5e/D768/T4096"."""
    kernel, chip, width, time = name.split("/")
    return Case(kernel, chip, int(width[1:]), int(time[1:]))


def _wkv7(case: Case, struct):
    """Function, arguments, bytes of the contract (every input and output once, chunk states once),
    and units of work: (token, head pair)."""
    import jax.numpy as jnp

    from pallas_kernels import wkv7_tpu as kernels

    head, tile = 64, kernels.TILES[case.chip]
    packs, chunks = case.width // 128, case.time // tile.chunk
    tokens = struct((1, case.time, case.width), jnp.bfloat16)
    log_w = struct((1, case.time, case.width), jnp.float32)
    state = struct((1, packs, head, 128), jnp.float32)
    states = struct((1, chunks, packs, head, 128), jnp.float32)
    inputs = (tokens, log_w, tokens, tokens, tokens, tokens)
    contract = [*inputs, state, state, states, tokens]
    if case.kernel == "wkv7_forward":

        def function(*x):
            return kernels._forward_call(
                x[:6], x[6], head=head, tile=tile, residuals=True, interpret=False
            )

        arguments = (*inputs, state)
    else:
        inverse = struct((1, chunks, packs, tile.chunk, 2 * tile.chunk), jnp.bfloat16)

        def function(*x):
            return kernels._backward_call(
                x[:6], x[6:10], x[10], x[11], head=head, tile=tile, interpret=False
            )

        arguments = (*inputs, states, state, inverse, tokens, tokens, state)
        contract += [*inputs, state]  # and the gradients
    minimum = sum(math.prod(x.shape) * x.dtype.itemsize for x in contract)
    return function, arguments, minimum, case.time * packs


BUILDERS = {"wkv7_forward": _wkv7, "wkv7_backward": _wkv7}


def _compile(case: Case) -> dict:
    """Runs in the child: compiles a case, returns what the compiled program says of itself."""
    import time

    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from rwkvx_jax.plan import topology

    topology.on_cpu()
    mesh = topology.topology_mesh(case.topology, {"device": 1})
    everywhere = PartitionSpec()

    def struct(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, everywhere))

    function, arguments, minimum, units = BUILDERS[case.kernel](case, struct)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    start = time.process_time()  # not the wall's: other work on the machine must not count
    compiled = jax.jit(mapped).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    return {
        "compile_seconds": time.process_time() - start,
        "hbm_bytes": memory.argument_size_in_bytes + memory.output_size_in_bytes,
        "contract_bytes": minimum,
        "units": units,
        "jax": jax.__version__,
    }


def measure(case: Case) -> dict:
    """Compiles a case in a child process and reads its schedule.

    Returns:
      body: bundles of one grid step, inner loops multiplied; steps: grid steps; bundles_per_unit:
      body * steps per token and head pair (two 64-wide heads); bundles: all bundles, the passes
      that fill and drain the pipeline included though they skip most of the body; copies,
      hbm_bytes (arguments and results, padding included), contract_bytes, traffic (their ratio),
      slots, estimated_seconds, compile_seconds (of processor time).

    Raises:
      RuntimeError: the compilation failed, with the compiler's message.
      UnknownTripCount: a loop's trip count cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="static_costs_") as dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        environment = {**os.environ, "LIBTPU_INIT_ARGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, "-m", "tools.static_costs", "--child", case.name]
        child = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_TIME_LIMIT
        )
        if child.returncode:
            raise RuntimeError(f"{case.name} does not compile:\n{child.stderr[-4000:]}")
        facts = json.loads(child.stdout.splitlines()[-1])
        program = read_schedule(_dump(dump, case.kernel, "-final_bundles.txt"))
        slots = read_utilization(
            _dump(dump, case.kernel, "-final_hlo-static-per-bundle-utilization.txt")
        )
    return _account(case, program, slots, facts)


def _dump(directory: str, kernel: str, suffix: str) -> str:
    found = [
        path
        for path in Path(directory).glob(f"*{kernel}*{suffix}")
        if "schedule-analysis" not in path.name
    ]
    if len(found) != 1:
        raise RuntimeError(f"expected one dump of {kernel} ending in {suffix}, found {len(found)}")
    return found[0].read_text()


def _account(case: Case, program: Loop, slots: dict, facts: dict) -> dict:
    bundles = program.total("bundles")
    stage = Stage(case.kernel, facts["hbm_bytes"], bundles, program.total("copies"))
    grid = max(program.inner, key=lambda loop: loop.total("bundles"))
    steps = grid.trips - _PIPELINE_PASSES
    body = grid.total("bundles") // grid.trips
    return {
        "bundles": bundles,
        "bundles_per_unit": round(body * steps / facts["units"], 3),
        "body": body,
        "steps": steps,
        "copies": stage.copies,
        "hbm_bytes": facts["hbm_bytes"],
        "contract_bytes": facts["contract_bytes"],
        "traffic": round(facts["hbm_bytes"] / facts["contract_bytes"], 3),
        "slots": slots,
        "estimated_seconds": float(f"{stage.seconds(CHIPS[case.chip]):.4g}"),
        "compile_seconds": round(facts["compile_seconds"], 1),
        "jax": facts["jax"],
    }


# --------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------


def read_table() -> dict:
    """The checked-in table: case name -> result of `measure` without the compile time."""
    return json.loads(TABLE.read_text())["cases"] if TABLE.exists() else {}


def _write_table(cases: dict) -> None:
    about = (
        "Static schedules of the TPU kernels by tools/static_costs.py (make static-costs): the "
        "compiler's bundle counts and an estimate derived from them; nothing here was timed."
    )
    TABLE.write_text(json.dumps({"about": about, "cases": cases}, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this; no rewrite")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(_compile(case_named(options.child))))
        return
    cases = [case for case in all_cases() if options.only in case.name]
    if not cases:
        raise SystemExit(f"no case contains {options.only!r}; e.g. {all_cases()[0].name}")
    old, new = read_table(), {}
    print(f"{'case':40} {'per unit':>9} {'was':>9} {'traffic':>8} {'estimate':>10} {'compile':>8}")
    for case in cases:
        result = measure(case)
        was = old.get(case.name, {}).get("bundles_per_unit", "-")
        print(
            f"{case.name:40} {result['bundles_per_unit']:9} {was:>9} {result['traffic']:8} "
            f"{1e3 * result['estimated_seconds']:8.3f}ms {result.pop('compile_seconds'):7}s",
            flush=True,
        )
        new[case.name] = result
        if not options.only:
            _write_table(old | new)  # what is measured stays, should a later case fail
    if not options.only:
        _write_table(new)
        print(f"wrote {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
