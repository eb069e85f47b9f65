"""Plans training and generation on TPUs that are not here: `python -m rwkvx_jax.plan --help`.

    python -m rwkvx_jax.plan --config configs/rwkvx_3b6_stage2.py --topology v5p:4x4x8

docs/plan.md says what it prints, and what the figures mean.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress as Live
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from pallas_kernels.chips import TPUS
from rwkvx_jax.cli import command_line, parse_with_overrides
from rwkvx_jax.config import Config, ConfigError
from rwkvx_jax.perf import report, sweep, topology
from rwkvx_jax.perf.advice import advise
from rwkvx_jax.perf.planner import make_plan
from rwkvx_jax.perf.programs import (
    Program,
    check_possible,
    read_program,
    read_size,
    train_program,
    train_size,
)
from rwkvx_jax.progress import Progress
from rwkvx_jax.sharding import check_fits, check_heads, make_mesh
from rwkvx_jax.storage import work_path, write_whole
from rwkvx_jax.xla_flags import apply_xla_flags

_KINDS = ("train", "prefill", "decode")


def main(argv: Sequence[str], prog: str = "python -m rwkvx_jax.plan") -> int:
    topology.on_cpu()
    with command_line(prog, argv):
        flags, config = parse_with_overrides(make_parser(prog), argv)
        generation = topology.generation(flags.topology)
        if generation not in TPUS:
            raise ConfigError(f"no peaks are known for {generation}: use one of {list(TPUS)}")
        apply_xla_flags(config.run.xla_flags, generation)
        if flags.sweep:
            return _sweep(flags, config)
        mesh = make_mesh(config.mesh, topology.topology_devices(flags.topology, flags.slices))
        check_heads(config.model, mesh.shape["tensor"])
        sizes = dict(mesh.shape)
        programs = list(_programs(flags, config, mesh, TPUS[generation].hbm * mesh.size))
        records, fits = [], True
        place = flags.topology if flags.slices == 1 else f"{flags.slices} x {flags.topology}"
        title = report.header(config, flags.config, place, sizes)
        talks = flags.json != "-"
        if talks:
            print(title, flush=True)
        for number, program in enumerate(programs, 1):
            with _progress(f"compiling {program.kind} {program.name} ({number}/{len(programs)})"):
                plan = make_plan(program, mesh, generation)
            advice = advise(plan, config, sizes)
            fits &= plan.fits
            records.append(report.record(plan, advice))
            if talks:
                print("\n" + report.text(plan, advice), flush=True)
        about = {"config": flags.config, "topology": place, "mesh": sizes}
        text = json.dumps({**about, "programs": records}, indent=1)
        if not talks:
            print(text)
        elif flags.json:
            write_whole(work_path(flags.json), f"{text}\n".encode())
        return 0 if fits else 1


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument(
        "--config", required=True, help="experiment: FILE, FILE:VARIANT, or a name in configs/"
    )
    parser.add_argument(
        "--topology", required=True, help="generation and shape in chips, such as v5p:4x4x8"
    )
    parser.add_argument(
        "--slices", type=int, default=1, help="slices of that shape, on the data-centre network"
    )
    parser.add_argument(
        "--programs",
        default="train",
        help=f"what to compile, of {','.join(_KINDS)} (default: train)",
    )
    parser.add_argument("--stage", action="append", help="only the stage of this name (repeatable)")
    parser.add_argument("--batch", type=int, default=1, help="texts of prefill and decode")
    parser.add_argument("--length", type=int, default=65536, help="rows of their cache")
    parser.add_argument("--piece", type=int, default=2048, help="tokens of one piece of prefill")
    parser.add_argument(
        "--sweep",
        metavar="FILE",
        help="try remat policies, batch sizes and meshes; FILE (JSON lines) keeps the results",
    )
    parser.add_argument(
        "--sweep-remat", action="append", choices=sweep.REMAT, help="only this policy (repeatable)"
    )
    parser.add_argument(
        "--sweep-mesh", action="append", metavar="AXES", help="only this mesh: data=2,fsdp=8"
    )
    parser.add_argument(
        "--sweep-accumulation", action="append", type=int, help="only so many parts of a batch"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print JSON instead of text; with a FILE, write it there beside the text",
    )
    return parser


def _sweep(flags: argparse.Namespace, config: Config) -> int:
    """Compiles variants of one stage's train step and prints them as a table."""
    if "://" in flags.sweep:
        raise ConfigError(f"--sweep {flags.sweep}: name a file on a disk")
    if flags.json:
        raise ConfigError("--json goes with a plan; the file that --sweep names holds its records")
    chosen = [stage for stage in config.stages if flags.stage in (None, [stage.name])]
    if len(chosen) != 1:
        names = [stage.name for stage in config.stages]
        raise ConfigError(f"--sweep varies one stage: name one of {names} with --stage")
    (stage,), place = chosen, sweep.Place(flags.topology, flags.slices)
    candidates = sweep.variants(
        config,
        stage,
        place,
        remat=flags.sweep_remat or sweep.REMAT,
        meshes=[sweep.mesh_sizes(text) for text in flags.sweep_mesh or ()],
        accumulations=flags.sweep_accumulation or (),
    )
    console = Console(stderr=True)
    with Progress(console, len(candidates), "variants", ends=True) as bar:

        def say(done: int, what: str) -> None:
            bar.describe(what)
            bar.advance(done - bar.done)

        rows = sweep.sweep(config, stage, place, candidates, Path(flags.sweep), say=say)
    print(f"stage {stage.name} of {flags.config} on {flags.topology}: estimates; nothing ran.\n")
    print(sweep.table(rows, stage.global_batch))
    best = sweep.fastest(rows)
    print(f"\nfastest by the estimate: {best['flags']}" if best else "\nno variant fits")
    return 0 if best else 1


def _programs(
    flags: argparse.Namespace, config: Config, mesh: Mesh, memory: float
) -> Iterator[Program]:
    """The programs asked for; `memory` is that of all devices together, in bytes."""
    kinds = flags.programs.split(",")
    if unknown := [kind for kind in kinds if kind not in _KINDS]:
        raise ConfigError(f"--programs names {unknown}: choose from {', '.join(_KINDS)}")
    names = [stage.name for stage in config.stages]
    if unknown := [name for name in flags.stage or () if name not in names]:
        raise ConfigError(f"no stage {unknown} in {flags.config}; it has {names}")
    if "train" in kinds:
        check_fits(config, mesh)
        for stage in config.stages:
            if not flags.stage or stage.name in flags.stage:
                check_possible(*train_size(config, stage), memory)
                yield train_program(config, stage, mesh)
    if {"prefill", "decode"} & set(kinds):
        check_possible(*read_size(config.model, flags.batch, flags.length), memory)
    if "prefill" in kinds:
        yield read_program(config, mesh, flags.batch, flags.length, flags.piece)
    if "decode" in kinds:
        yield read_program(config, mesh, flags.batch, flags.length, 1)


@contextlib.contextmanager
def _progress(text: str) -> Iterator[None]:
    """Says on stderr what is being compiled, and for how long already."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    if not console.is_terminal:
        console.print(text, soft_wrap=True)
    with Live(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(text, total=None)
        yield
