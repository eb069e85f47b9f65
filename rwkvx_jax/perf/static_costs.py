"""Static costs of the TPU kernels, read from the TPU compiler's own dumps, with no TPU.

A TPU core is a statically scheduled machine: how many instruction bundles a kernel issues is known
when it is compiled. Each case is compiled in a process of its own, and `schedule` reads the dump.
Bundles are not time: waiting for memory is not in them. `stages` turns them into an estimate, and
calls it that.

    python -m rwkvx_jax.perf.static_costs    compiles all cases, rewrites the table, prints both

`--only v5e` takes the cases whose name contains a text and only prints them; with `--write` their
results enter the table. `--documents` prints the kernels that take packed documents, compiled with
them, beside the table's without.
"""

import argparse
import json
import re
import time
from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

from rwkvx_jax.perf import hlo, topology
from rwkvx_jax.perf.dumps import compiled_apart, read_dump
from rwkvx_jax.perf.kernel_costs import TABLE, read_costs
from rwkvx_jax.perf.schedule import Loop, read_schedule, read_utilization
from rwkvx_jax.perf.stages import CORES, Stage
from rwkvx_jax.perf.static_cases import BUILDERS, PACKED, Case, all_cases, case_named
from rwkvx_jax.perf.work import read_work

_PIPELINE_PASSES = 2  # extra passes of a grid loop, which fill and drain its copies
_TIME_LIMIT = 600  # seconds a compilation may take

# --------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------


def _compile(case: Case) -> dict:
    """Runs in the child: compiles a case, returns what the compiled program says of itself."""
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
    lowered = jax.jit(mapped).lower(*arguments)
    compiled = lowered.compile()
    works, _ = read_work(hlo.parse(compiled.as_text()), 1)
    return {
        "compile_seconds": time.process_time() - start,
        # As the planner counts them: what the kernel updates in place is argument and result.
        "hbm_bytes": next(int(work.kernel_bytes) for work in works if work.kernel == case.kernel),
        "contract_bytes": minimum,
        "units": units,
        "parallel_steps": _parallel_steps(lowered),
        "jax": jax.__version__,
    }


def _parallel_steps(lowered) -> int:
    """Steps of the kernel's grid that the cores of a chip may share."""
    return int(re.search(r'"parallel_steps\W+(\d+)', lowered.as_text().replace("\\22", '"'))[1])


def measure(case: Case) -> dict:
    """Compiles a case in a child process and reads its schedule.

    Returns:
      body: bundles of one grid step, inner loops multiplied; steps: grid steps of one core;
      parallel_steps: those that the cores of a chip share, once around; bundles_per_unit:
      body * steps per token and head pair (two 64-wide heads); bundles: all bundles, the passes
      that fill and drain the pipeline included though they skip most of the body; copies,
      hbm_bytes (arguments and results, padding included), contract_bytes, traffic (their ratio),
      slots, estimated_seconds, compile_seconds (of processor time).

    Raises:
      RuntimeError: the compilation failed, with the compiler's message.
      UnknownTripCount: a loop's trip count cannot be read.
    """
    with compiled_apart("rwkvx_jax.perf.static_costs", case.name, _TIME_LIMIT) as (facts, dumps):
        program = read_schedule(read_dump(dumps, case.kernel, "final_bundles.txt"))
        slots = read_utilization(
            read_dump(dumps, case.kernel, "final_hlo-static-per-bundle-utilization.txt")
        )
    return _account(case, program, slots, facts)


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
        "parallel_steps": facts["parallel_steps"],
        "copies": stage.copies,
        "hbm_bytes": facts["hbm_bytes"],
        "contract_bytes": facts["contract_bytes"],
        "traffic": round(facts["hbm_bytes"] / facts["contract_bytes"], 3),
        "slots": slots,
        "estimated_seconds": float(f"{stage.seconds(CORES[case.chip]):.4g}"),
        "compile_seconds": round(facts["compile_seconds"], 1),
        "jax": facts["jax"],
    }


# --------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------


def _write_table(cases: dict) -> None:
    about = (
        "Static schedules of the TPU kernels (make static-costs): the compiler's "
        "bundle counts and an estimate derived from them; nothing here was timed."
    )
    TABLE.write_text(json.dumps({"about": about, "cases": cases}, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this; no rewrite")
    parser.add_argument("--write", action="store_true", help="with --only: rewrite those cases")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument(
        "--documents", action="store_true", help="with packed documents; no rewrite"
    )
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(_compile(case_named(options.child))))
        return
    if options.documents and options.write:
        parser.error("the table has no cases of packed documents: leave --write out")
    cases = [case for case in all_cases() if options.only in case.name]
    if options.documents:
        cases = [case.with_documents() for case in cases if case.kernel in PACKED]
    if not cases:
        raise SystemExit(f"no case contains {options.only!r}; e.g. {all_cases()[0].name}")
    old, new = read_costs(), {}
    print(f"{'case':58} {'per unit':>9} {'was':>9} {'traffic':>8} {'estimate':>10} {'compile':>8}")
    for case in cases:
        result = measure(case)
        was = old.get(case.name.removesuffix("/documents"), {}).get("bundles_per_unit", "-")
        print(
            f"{case.name:58} {result['bundles_per_unit']:9} {was:>9} {result['traffic']:8} "
            f"{1e3 * result['estimated_seconds']:8.3f}ms {result.pop('compile_seconds'):7}s",
            flush=True,
        )
        new[case.name] = result
        if options.write or not (options.only or options.documents):
            _write_table(old | new)  # what is measured stays, should a later case fail
    if not (options.only or options.documents):
        _write_table(new)
        print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
