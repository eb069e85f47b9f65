"""Sparse attention against JAX's splash attention on TPUs that are not here: static estimates.

    python -m benchmarks.tpu_static --output tpu_static.json

Both are compiled for the chip and accounted alike, stage by stage (see `rwkvx_jax.perf.stages`): a
kernel costs the bundles of its schedule, the bytes of its arguments and results and a least time
for every DMA descriptor, whichever takes longest; an operation of plain XLA its flops and bytes,
padding included. The sparse side is the whole op: gate, routing, attention, merge. **Nothing here
was timed**: waiting for memory within a kernel is not in a schedule.

Sparse attention, "worst": every tile that the static plan makes room for is full. "uniform": tiles
in use when every query chooses its chunks at random, empty ones free. Splash attention is charged
for the blocks that its causal mask leaves, none for the rest; heads of 64, tiles 512 x 1024.
With --group N, N query heads share a key head in both, and a choice of chunks.
"""

import argparse
import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import block_sparse_tpu
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.full_attention import full_attention
from rwkvx_jax.ops.selection import Selector
from rwkvx_jax.perf import hlo, topology, work
from rwkvx_jax.perf.dumps import compiled_apart, read_dumps
from rwkvx_jax.perf.schedule import read_schedule
from rwkvx_jax.perf.stages import CORES, Core, Stage, total_seconds

HEAD = 64
SPLASH_LENGTH = 8192  # splash's body does not depend on the length: it is compiled at this one
_TIME_LIMIT = 1800


@dataclasses.dataclass(frozen=True)
class Point:
    """One program: `op` "sparse" or "splash", forward alone or with its gradient."""

    op: str
    backward: bool
    chip: str
    length: int
    heads: int
    chunk: int = 0
    top_k: int = 0
    group: int = 1

    @property
    def topology(self) -> str:
        return topology.smallest(self.chip)


def main() -> None:
    options = parse_options()
    rows, splash = [], {}
    columns = ("splash", "worst", "uniform", "times", "times", "memory")
    print(f"{'chip':5}{'T':>8} {'chunk/k':>9}{'pass':>5}", *(f"{x:>9}" for x in columns))
    for chip in options.chips:
        for backward in (False, True):
            point = Point("splash", backward, chip, SPLASH_LENGTH, options.heads)
            splash[chip, backward] = run(dataclasses.replace(point, group=options.group))
        for length in options.lengths:
            for chunk, top_k in options.sparse:
                for backward in (False, True):
                    sizes = options.heads, chunk, top_k, options.group
                    point = Point("sparse", backward, chip, length, *sizes)
                    rows.append(compare(point, splash[chip, backward]))
                    print(line(rows[-1]), flush=True)
                    if options.output:
                        report = {"about": __doc__, "rows": rows}
                        options.output.write_text(json.dumps(report, indent=1) + "\n")


def parse_options() -> argparse.Namespace:
    numbers = lambda text: [int(x) for x in text.split(",")]
    pairs = lambda text: [tuple(int(x) for x in one.split(":")) for one in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    lengths = "8192,16384,32768,65536,131072,524288"
    parser.add_argument("--lengths", type=numbers, default=lengths)
    parser.add_argument("--chips", type=lambda text: text.split(","), default="v5e,v5p")
    parser.add_argument("--sparse", type=pairs, default="2048:3,128:16", help="chunk:top-k, ...")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--group", type=int, default=1, help="query heads of a key head")
    parser.add_argument("--output", type=Path, help="JSON file, with every stage")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_compile(Point(**json.loads(options.child)))))
        sys.exit()
    return options


def compare(point: Point, splash: dict) -> dict:
    """Estimated seconds of a sparse program and of splash at the same length."""
    found = run(point)
    core = CORES[point.chip]
    worst = [Stage(**stage) for stage in found["stages"]]
    used = tiles_in_use(point)
    uniform = [_scaled(x, used) if "past" in x.name else x for x in worst]
    dense = splash_stages(splash, point)
    return {
        **dataclasses.asdict(point),
        "splash": total_seconds(dense, core),
        "worst": total_seconds(worst, core),
        "uniform": total_seconds(uniform, core),
        "tiles_in_use": used,
        "temporary_bytes": found["temporary_bytes"],
        "qkv_bytes": 2 * point.length * (point.heads + 2 * point.heads // point.group) * HEAD,
        "compile_seconds": found["compile_seconds"],
        "stages": _stages(worst, core),
        "splash_stages": _stages(dense, core),
    }


def line(row: dict) -> str:
    names = ("splash", "worst", "uniform")
    cells = [f"{1e3 * row[x]:.2f}ms" for x in names]
    cells += [f"{row['splash'] / row[x]:.2f}x" for x in names[1:]]
    cells.append(f"{row['temporary_bytes'] / row['qkv_bytes']:.2f}x")
    sizes = f"{row['chunk']}/{row['top_k']}"
    direction = "f+b" if row["backward"] else "f"
    start = f"{row['chip']:5}{row['length']:8} {sizes:>9}{direction:>5}"
    return " ".join([start, *(f"{x:>9}" for x in cells)])


def _stages(stages: list[Stage], core: Core) -> list[dict]:
    return [{**dataclasses.asdict(x), "seconds": x.seconds(core)} for x in stages]


def _scaled(stage: Stage, share: float) -> Stage:
    return dataclasses.replace(
        stage, bundles=int(stage.bundles * share), copies=int(stage.copies * share)
    )


def splash_stages(found: dict, point: Point) -> list[Stage]:
    """Splash's stages at the point's length: its steps counted, all else linear in the length."""
    linear = point.length / SPLASH_LENGTH
    quadratic = _causal_blocks(point.length) / found["grid"]
    stages = []
    for stage in found["stages"]:
        grows = quadratic if "splash" in stage["name"] else linear
        stages.append(
            Stage(
                name=stage["name"],
                bytes=int(stage["bytes"] * linear),
                bundles=int(stage["bundles"] * grows),
                copies=int(stage["copies"] * grows),
                flops=int(stage["flops"] * linear),
            )
        )
    return stages


def _causal_blocks(length: int, rows: int = 512, columns: int = 1024) -> int:
    return sum(-(-(i + 1) * rows // columns) for i in range(length // rows))


def tiles_in_use(point: Point) -> float:
    """Share of the plan's tiles that hold pairs when chunks are chosen at random."""
    tokens = lambda heads: jax.ShapeDtypeStruct((1, point.length, heads, HEAD), jnp.bfloat16)
    q, k = tokens(point.heads), tokens(point.heads // point.group)
    slots, tile = point.top_k - 1, block_sparse_tpu.TILES[point.chip]
    plan = block_sparse_tpu._plan_of(q, k, slots, point.chunk, 1.0, 0, tile).routing
    if plan is None:
        return 1.0
    rng, used = np.random.default_rng(0), 0
    for start in range(0, point.length, plan.segment):
        counts = np.zeros(point.length // point.chunk, int)
        for own in range(start // point.chunk, (start + plan.segment - 1) // point.chunk + 1):
            low, high = (x * point.chunk for x in (own, own + 1))
            queries = min(high, start + plan.segment, point.length) - max(low, start)
            if own and queries > 0:
                pairs = queries * min(plan.slots, own)
                counts[:own] += rng.multinomial(pairs, np.full(own, 1 / own))
        used += int((-(-counts // plan.rows)).sum())
    return used / plan.all_tiles


# --------------------------------------------------------------------------------------------
# Compiling
# --------------------------------------------------------------------------------------------


def run(point: Point) -> dict:
    """Compiles a program in a process of its own (the compiler reads its flags once).

    Returns:
      stages, temporary_bytes, compile_seconds, and for splash the grid's steps.

    Raises:
      RuntimeError: the compilation failed, with the compiler's message.
    """
    argument = json.dumps(dataclasses.asdict(point))
    with compiled_apart("benchmarks.tpu_static", argument, _TIME_LIMIT) as (found, dumps):
        kernels: dict[str, list[dict]] = {}
        for stage in found["stages"]:
            if stage.pop("kernel"):
                kernels.setdefault(stage["name"], []).append(stage)
        for name, stages in kernels.items():
            programs = [read_schedule(x) for x in read_dumps(dumps, name, "final_bundles.txt")]
            if len(programs) == 1:
                programs *= len(stages)
            for stage, program in zip(stages, programs, strict=True):
                stage["bundles"] = stage["calls"] * program.total("bundles")
                stage["copies"] = stage["calls"] * program.total("copies")
    for stage in found["stages"]:
        del stage["calls"]
    return found


def _compile(point: Point) -> dict:
    topology.on_cpu()
    mesh = topology.topology_mesh(point.topology, {"device": 1})
    everywhere = PartitionSpec()

    def tokens(heads):  # as projections lay them out; a model's reshape into heads costs nothing
        shape = 1, point.length, heads * HEAD
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, everywhere))

    x, keys = tokens(point.heads), tokens(point.heads // point.group)

    def attend(q, k, v):
        q, k, v = (x.reshape(*x.shape[:2], -1, HEAD) for x in (q, k, v))
        return heads(q, k, v).reshape(*x.shape[:2], -1)

    def heads(q, k, v):
        if point.op == "splash":
            return full_attention(q, k, v, implementation="splash")
        selector = Selector(together=point.group)
        chunking = dict(chunk_size=point.chunk, top_k=point.top_k, selector=selector)
        return sparse_attention(q, k, v, implementation="pallas", **chunking)

    def gradients(q, k, v, cotangent):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(cotangent)

    qkv = x, keys, keys
    function, arguments = (gradients, (*qkv, x)) if point.backward else (attend, qkv)
    start = time.process_time()
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(function, in_specs=everywhere, out_specs=everywhere, check_vma=False)
        compiled = jax.jit(mapped).lower(*arguments).compile()
    spent = time.process_time() - start
    return {
        "stages": _stages_of(compiled.as_text()),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": spent,
        "grid": (SPLASH_LENGTH // 512) * (SPLASH_LENGTH // 1024),
    }


def _stages_of(text: str) -> list[dict]:
    """Stages of a program, kernels without their schedules but with how often each runs."""
    # Splash's metadata, which holds braces and line breaks, is no part of the program.
    metadata = r", frontend_attributes=\{kernel_metadata=\{.*?\n\}\}"
    text = re.sub(metadata, "", text, flags=re.DOTALL)
    works, _ = work.read_work(hlo.parse(text), 1)
    stages = []
    for one in works:
        name = one.kernel or one.name
        stages.append(
            dict(
                name=name,
                kernel=bool(one.kernel),
                calls=int(one.times),
                bytes=int(one.times * one.bytes),
                flops=0 if one.kernel else int(one.times * one.passes),
            )
        )
    stages = [x for x in stages if x["kernel"] or x["bytes"] or x["flops"]]
    for stage in stages:
        stage.setdefault("bundles", 0)
        stage.setdefault("copies", 0)
    return stages


if __name__ == "__main__":
    main()
