"""Compiles a train step in many variants and says which is fastest within the device's memory.

A variant is a remat policy, a number of samples at once (by accumulation: the samples of a step
belong to the recipe and stay) and a mesh. Each is compiled in a process of its own and leaves a
line in a file, so that an interrupted sweep goes on where it stopped, and one that crashes the
compiler costs only its own line. "Fastest" is by the planner's estimate; nothing runs.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from pallas_kernels.chips import GIB
from rwkvx_jax.config import Config, ConfigError, MeshConfig, Stage
from rwkvx_jax.perf import report, topology
from rwkvx_jax.perf.planner import make_plan
from rwkvx_jax.perf.programs import train_program
from rwkvx_jax.records import RecordFile
from rwkvx_jax.sharding import check_fits, make_mesh

REMAT = ("block", "offload", "save_projections", "none")
"""Policies, in the order in which they are tried."""
_SAMPLES = (1, 2, 4)  # of one device at once
_SPREAD = ("data", "fsdp", "context")  # axes between which the default meshes move devices
_ROOT = Path(__file__).parents[2]
_REMEDY = "delete the line, or give another file"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a sweep compiles for: a topology name and the number of such slices."""

    topology: str
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is varied: the policy, parts of a batch, devices along each mesh axis."""

    remat: str
    accumulation: int
    mesh: tuple[tuple[str, int], ...]

    def apply(self, config: Config, stage: Stage) -> tuple[Config, Stage]:
        """The config and its stage in this variant."""
        changed = dataclasses.replace(stage, accumulation=self.accumulation)
        run = dataclasses.replace(config.run, remat=self.remat)
        mesh = dataclasses.replace(config.mesh, **dict(self.mesh))
        stages = tuple(changed if s is stage else s for s in config.stages)
        return dataclasses.replace(config, run=run, mesh=mesh, stages=stages), changed

    def flags(self, number: int) -> str:
        """The overrides that make this variant of stage `number`."""
        axes = " ".join(f"--mesh.{axis} {size}" for axis, size in self.mesh)
        return f"--run.remat {self.remat} --stages.{number}.accumulation {self.accumulation} {axes}"

    def record(self) -> dict:
        return {"remat": self.remat, "accumulation": self.accumulation, "mesh": dict(self.mesh)}

    def lighter(self, other: Variant) -> bool:
        """Whether this variant needs no more memory than `other`, on the same mesh."""
        order = ("offload", "block", "save_projections", "none")
        return (
            self.mesh == other.mesh
            and self.accumulation >= other.accumulation
            and order.index(self.remat) <= order.index(other.remat)
        )


def variants(
    config: Config,
    stage: Stage,
    place: Place,
    *,
    remat: Sequence[str] = REMAT,
    meshes: Sequence[Mapping[str, int]] = (),
    accumulations: Sequence[int] = (),
) -> list[Variant]:
    """All variants of a stage that its mesh and model allow.

    Args:
      config: the experiment.
      stage: one of its stages.
      place: the TPUs.
      remat: policies.
      meshes: sizes of the mesh axes; none given: the config's own, and those that differ from it
        by a factor of 2 moved from one of the axes data, fsdp and context to another.
      accumulations: parts of a batch; none given: those with 1, 2 or 4 samples a device at once.

    Raises:
      ConfigError: no variant is possible; says why the last one is not.
    """
    devices = topology.topology_devices(place.topology, place.slices)
    own = dict(make_mesh(config.mesh, devices).shape)
    found, problem = [], ""
    for sizes in meshes or _neighbours(own):
        filled = {**dict.fromkeys(own, 1), **sizes}
        ways = filled["data"] * filled["fsdp"]
        wanted = accumulations or [stage.global_batch // (ways * n) for n in _SAMPLES]
        for parts in wanted:
            if parts < 1 or stage.global_batch % parts or stage.global_batch // parts % ways:
                problem = problem or (
                    f"{stage.global_batch} samples in {parts} parts don't fit {ways} devices"
                )
                continue
            for policy in remat:
                variant = Variant(policy, parts, tuple(filled.items()))
                changed, _ = variant.apply(config, stage)
                try:
                    check_fits(changed, make_mesh(changed.mesh, devices))
                except ConfigError as error:
                    problem = str(error)
                    continue
                if variant not in found:
                    found.append(variant)
    if not found:
        raise ConfigError(f"no variant of stage {stage.name!r} is possible on {place}: {problem}")
    return found


def _neighbours(sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    yield dict(sizes)
    for source in _SPREAD:
        for target in _SPREAD:
            if source != target and sizes[source] % 2 == 0:
                moved = {source: sizes[source] // 2, target: sizes[target] * 2}
                yield {**sizes, **moved}


def sweep(
    config: Config,
    stage: Stage,
    place: Place,
    candidates: Sequence[Variant],
    path: Path,
    *,
    say: Callable[[int, str], None],
) -> list[dict]:
    """Compiles the candidates that `path` has no line of yet, and returns a row of each.

    Args:
      config: the experiment.
      stage: one of its stages.
      place: the TPUs.
      candidates: what to try.
      path: JSON lines; made, or appended to. A line's key is a digest of the config, the place,
        the versions of jax and libtpu and this project's source, so that no line outlives what it
        was made from.
      say: called before each candidate with how many are done and what comes next.

    Returns:
      Rows {"key", "variant", "flags", and "record" of the program, or "error", or "skipped": why
      it was not compiled}, in the order of the candidates.

    Raises:
      ConfigError: another sweep writes to `path`, or a line of it is damaged.
    """
    busy = f"another sweep writes to {path}: wait for it, or give another file"
    number = config.stages.index(stage)
    file = RecordFile(path, _REMEDY)
    with file.locked(busy=busy):
        known, rows, too_big, fits = _known(file), [], [], []
        for done, variant in enumerate(candidates):
            say(done, variant.flags(number))
            changed, changed_stage = variant.apply(config, stage)
            base = {
                "key": _key(changed, changed_stage, place),
                "variant": variant.record(),
                "flags": variant.flags(number),
            }
            row = known.get(base["key"])
            if row is None and (reason := _pointless(variant, too_big, fits)):
                rows.append(base | {"skipped": reason})
                continue
            if row is None:
                row = base | _compile_apart(changed, changed_stage, place)
                file.append([row])
            rows.append(row)
            if "record" in row:
                (fits if row["record"]["fits"] else too_big).append(variant)
    return rows


def _pointless(variant: Variant, too_big: list[Variant], fits: list[Variant]) -> str | None:
    """Why compiling a variant would tell nothing new; None where it would."""
    for other in too_big:
        if other.lighter(variant):
            return f"{other.remat} with {other.accumulation} parts does not fit already"
    if variant.remat == "offload" and dataclasses.replace(variant, remat="block") in fits:
        return "block fits, and is the same with no copies to the host"
    return None


def _key(config: Config, stage: Stage, place: Place) -> str:
    """A digest of all that the compiled program and its figures depend on."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    source = hashlib.sha256()
    for package in ("rwkvx_jax", "pallas_kernels"):
        for file in sorted((_ROOT / package).rglob("*")):
            if file.suffix in (".py", ".json"):
                source.update(file.read_bytes())
    surroundings = {name: os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")}
    parts = {
        "environment": surroundings,
        "config": dataclasses.asdict(config),
        "stage": stage.name,
        "place": dataclasses.asdict(place),
        "versions": versions,
        "source": source.hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _known(file: RecordFile) -> dict[str, dict]:
    """Rows by key, without those whose compiler died: it may not die again."""
    rows = {}
    for number, row in enumerate(file.new(b"{"), 1):
        if not isinstance(row, dict) or "key" not in row:
            raise ConfigError(f"{file.path}, line {number} is no row of a sweep: {_REMEDY}")
        if not row.get("died"):
            rows[row["key"]] = row
    return rows


def _compile_apart(config: Config, stage: Stage, place: Place) -> dict:
    """{"record": ...} of a train step compiled in a child process, or {"error": ...}."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return {"record": pool.submit(_compile, config, stage, place).result()}
        except BrokenProcessPool:
            return {"error": "the compiler's process died", "died": True}
        except Exception as error:  # whatever a compiler or tracing raises: it ends this row only
            return {"error": f"{type(error).__name__}: {error}"[:500]}


def _compile(config: Config, stage: Stage, place: Place) -> dict:
    """Runs in the child."""
    topology.on_cpu()
    devices = topology.topology_devices(place.topology, place.slices)
    mesh = make_mesh(config.mesh, devices)
    plan = make_plan(train_program(config, stage, mesh), mesh, topology.generation(place.topology))
    return report.record(plan, [])


def table(rows: Sequence[dict], global_batch: int) -> str:
    """Rows as Markdown, fastest first, those without an estimate last."""
    lines = [
        "| remat | mesh | samples a device at once | memory a device, GiB | step, s (estimate) "
        "| model-flops utilisation: estimate, at the floor | tokens/s (estimate) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=_seconds):
        variant, record = row["variant"], row.get("record")
        sizes = variant["mesh"]
        mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        ways = variant["accumulation"] * sizes["data"] * sizes["fsdp"]
        cells = [variant["remat"], mesh or "1 device", f"{global_batch / ways:g}"]
        if record is None:
            cells += [row.get("skipped") or row["error"], "", "", ""]
        elif "memory" not in record:
            needed = f"{record['needed'] / GIB:.1f}" if record["needed"] else "more than"
            cells += [f"does not fit: {needed} of {record['available'] / GIB:.2f}", "", "", ""]
        else:
            memory, found, floor = record["memory"], record["estimate"], record["floor"]
            used = (memory["available"] - memory["headroom"]) / GIB
            cells += [
                f"{'' if record['fits'] else 'does not fit: '}{used:.1f} of "
                f"{memory['available'] / GIB:.2f}",
                f"{found['seconds']:.3g}",
                f"{found['utilisation']:.1%}, {floor['utilisation']:.1%}",
                f"{found['tokens_per_second']:,.0f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fastest(rows: Sequence[dict]) -> dict | None:
    """The row with the shortest estimated step of those that fit."""
    fitting = [row for row in rows if _seconds(row) < float("inf")]
    return min(fitting, key=_seconds, default=None)


def _seconds(row: dict) -> float:
    record = row.get("record")
    return record["estimate"]["seconds"] if record and record["fits"] else float("inf")


def mesh_sizes(text: str) -> dict[str, int]:
    """Sizes of mesh axes from "data=2,fsdp=8".

    Raises:
      ConfigError: not of that form, or no axis of a mesh.
    """
    sizes = {}
    for part in text.split(","):
        axis, equals, size = part.partition("=")
        if axis not in MeshConfig().sizes or not equals or not size.isdecimal() or int(size) < 1:
            raise ConfigError(
                f'--sweep-mesh "{text}": write axes and sizes as data=2,fsdp=8,context=4; axes are '
                f"{', '.join(MeshConfig().sizes)}"
            )
        sizes[axis] = int(size)
    return sizes
