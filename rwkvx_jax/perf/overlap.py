"""Which collectives of a compiled train step run beside matrix products.

    python -m rwkvx_jax.perf.overlap --config FILE --topology v5e:2x4 --run.xla-flags auto

compiles the train step of each stage for TPUs that are not here, and prints a table of what a
device sends. It judges the order that the compiler chose, not times. Programs with the same digest
are the same, byte for byte.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax

from rwkvx_jax.cli import command_line, parse_with_overrides
from rwkvx_jax.perf import collectives, hlo, topology
from rwkvx_jax.perf.hlo import Computation, Instruction, Module
from rwkvx_jax.perf.programs import train_program
from rwkvx_jax.perf.work import is_kernel, read_work, starts
from rwkvx_jax.sharding import check_fits, make_mesh
from rwkvx_jax.xla_flags import apply_xla_flags


@dataclasses.dataclass
class Overlap:
    """What one device sends by collectives of one kind.

    Attributes:
      times: how many run.
      bytes: that the device must send for them (`Collective.wire_bytes`).
      asynchronous: of these bytes, those of collectives that start and end as two instructions.
      beside_products: of these again, those with a matrix product, a kernel or a loop scheduled
        between start and end, or fused with a part of the collective.
    """

    times: float = 0.0
    bytes: float = 0.0
    asynchronous: float = 0.0
    beside_products: float = 0.0


def read_overlap(module: Module, devices: int) -> Mapping[str, Overlap]:
    """Overlaps by kind of collective (`collectives.KINDS`), largest first, of a program whose text
    stands in the order of its schedule, as compiled ones do."""
    places = {x.name: c for c in module.computations.values() for x in c.instructions.values()}
    wrapped = {  # computations that one collective makes, by what starts them
        x.called("calls"): x.name
        for computation in module.computations.values()
        for x in computation.instructions.values()
        if x.opcode == "async-start"
    }
    found: dict[str, Overlap] = {}
    for one in read_work(module, devices)[0]:
        if one.collective is None:
            continue
        name = wrapped.get(places[one.name].name, one.name)
        computation = places[name]
        start = computation.instructions[name]
        size = one.times * one.collective.wire_bytes
        total = found.setdefault(one.collective.kind, Overlap())
        total.times += one.times
        total.bytes += size
        if starts(start) or start.opcode.endswith("-start"):
            total.asynchronous += size
            beside = any(_multiplies(module, x) for x in _between(module, computation, start))
            total.beside_products += size * beside
    return dict(sorted(found.items(), key=lambda item: -item[1].bytes))


def _between(module: Module, computation: Computation, start: Instruction) -> Iterator[Instruction]:
    """Instructions that run while a collective is under way."""
    order = list(computation.instructions.values())
    if start.opcode == "fusion":  # the fusions that hold a part of it share its channel
        channels = _channels(module, start)
        yield from (x for x in order if x is not start and channels & _channels(module, x))
        return
    ends = [x for x in computation.users[start.name] if x.opcode.endswith("-done")]
    if ends:
        yield from order[order.index(start) + 1 : order.index(ends[0])]


def _channels(module: Module, fusion: Instruction) -> set[str]:
    if fusion.opcode != "fusion":
        return set()
    inner = module.computations[fusion.called("calls")].instructions.values()
    channels = (x.attribute("channel_id") for x in inner if collectives.kind_of(x))
    return {channel for channel in channels if channel}


def _multiplies(module: Module, instruction: Instruction) -> bool:
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")]
        return any(_multiplies(module, x) for x in inner.instructions.values())
    return instruction.opcode in ("dot", "convolution", "while") or is_kernel(instruction)


def table(overlaps: Mapping[str, Overlap]) -> str:
    """The overlaps as a Markdown table, with a row for all."""
    fields = [field.name for field in dataclasses.fields(Overlap)]
    total = Overlap(*(sum(getattr(x, field) for x in overlaps.values()) for field in fields))
    lines = [
        "| collective | times | MB | MB asynchronous | MB beside products |",
        "|---|---|---|---|---|",
    ]
    for kind, x in {**overlaps, "all": total}.items():
        share = lambda part, x=x: f"{part / 1e6:.1f} ({part / (x.bytes or 1):.0%})"
        parts = f"{x.bytes / 1e6:.1f} | {share(x.asynchronous)} | {share(x.beside_products)}"
        lines.append(f"| {kind} | {x.times:.0f} | {parts} |")
    return "\n".join(lines)


def overlap_parser(prog: str) -> argparse.ArgumentParser:
    """Flags beside those of a config."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--config", required=True, help="experiment, as of `rwkvx plan`")
    parser.add_argument("--topology", required=True, help="such as v5e:2x4")
    return parser


def main(argv: Sequence[str], prog: str = "python -m rwkvx_jax.perf.overlap") -> int:
    topology.on_cpu()
    with command_line(prog, argv):
        flags, config = parse_with_overrides(overlap_parser(prog), argv)
        apply_xla_flags(config.run.xla_flags, topology.generation(flags.topology))
        mesh = make_mesh(config.mesh, topology.topology_devices(flags.topology))
        check_fits(config, mesh)
        for stage in config.stages:
            with jax.set_mesh(mesh):
                text = train_program(config, stage, mesh).lower().compile().as_text()
            digest = hashlib.sha256(text.encode()).hexdigest()[:16]
            print(f"{stage.name}, program {digest}:\n")
            print(table(read_overlap(hlo.parse(text), mesh.size)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
