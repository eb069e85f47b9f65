"""Compiles a program for devices that are not here, and says what it would need and take there."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh

from pallas_kernels.chips import GIB
from rwkvx_jax.ops.dispatch import forget_choices
from rwkvx_jax.perf import hlo, work
from rwkvx_jax.perf.kernel_costs import KernelCosts, read_costs
from rwkvx_jax.perf.machine import Machine
from rwkvx_jax.perf.programs import Program
from rwkvx_jax.perf.roofline import Estimate, estimate, place_of

_TOO_BIG = re.compile(r"RESOURCE_EXHAUSTED|Ran out of memory")
_LIMIT = re.compile(r"exceeds available HBM \(([\d.]+)([KMG])\)|of ([\d.]+)([KMG]) hbm")
_USED = re.compile(r"\(([\d.]+)([KMG])\) exceeds available HBM|Used ([\d.]+)([KMG]) of")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      arguments: parameters, moments, the batch; results that replace arguments lie there too.
      results: those that do not replace an argument.
      temporaries: the most that exists at once while it runs, as the compiler laid it out.
      program: the instructions themselves.
      available: what programs may use.
    """

    arguments: int
    results: int
    temporaries: int
    program: int
    available: int

    @property
    def used(self) -> int:
        return self.arguments + self.results + self.temporaries + self.program

    @property
    def headroom(self) -> int:
        return self.available - self.used


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found out about a program.

    Attributes:
      program: what was compiled.
      devices: number of devices.
      peak: of one of them, flop/s.
      compile_seconds: of tracing and compiling, here.
      choices: which implementation each op took, as it said.
      memory: on one device; None if the compiler refused the program.
      estimate: work and time of one device; None if the compiler refused the program.
      refusal: (bytes needed, bytes available) where the compiler said them; None if it fits.
      notes: what makes the figures less than certain.
    """

    program: Program
    devices: int
    peak: float
    compile_seconds: float
    choices: tuple[str, ...] = ()
    memory: Memory | None = None
    estimate: Estimate | None = None
    refusal: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.headroom >= 0

    def utilisation(self, seconds: float) -> float:
        """Share of the peak that the model's own products are of, in runs of `seconds`."""
        return self.program.flops / (seconds * self.devices * self.peak)

    def tokens_per_second(self, seconds: float) -> float:
        return self.program.tokens / seconds

    def days(self, seconds: float) -> float | None:
        """Days to all tokens of the stage; None for programs that are no stage."""
        if self.program.total_tokens is None:
            return None
        return self.program.total_tokens / self.tokens_per_second(seconds) / 86400


def make_plan(program: Program, mesh: Mesh, generation: str) -> Plan:
    """Compiles a program over a mesh of compile-only devices and reads what came out.

    Raises:
      ConfigError: the config can't run on this mesh (from tracing it).
    """
    machine = Machine.of(generation, list(mesh.devices.flat))
    begin = time.perf_counter()
    with _listening() as said, jax.set_mesh(mesh):
        lowered = program.lower()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not _TOO_BIG.search(str(error)):
                raise
            compiled, message = None, str(error)
    plan = Plan(
        program=program,
        devices=mesh.size,
        peak=machine.chip.flops,
        compile_seconds=time.perf_counter() - begin,
        choices=tuple(text for level, text in said if level == logging.INFO),
        notes=tuple(text for level, text in said if level > logging.INFO),
    )
    if compiled is None:
        return dataclasses.replace(plan, refusal=_refusal(message, machine))
    module = hlo.parse(compiled.as_text())
    works, loops = work.read_work(module, mesh.size)
    costs = KernelCosts(generation, read_costs(), program.variant)
    return dataclasses.replace(
        plan,
        memory=_memory(compiled, machine),
        estimate=estimate(works, machine, costs),
        notes=plan.notes + tuple(_loop_notes(loops)),
    )


def _memory(compiled: jax.stages.Compiled, machine: Machine) -> Memory:
    found = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        results=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        program=found.generated_code_size_in_bytes,
        available=int(machine.chip.hbm),
    )


def _refusal(message: str, machine: Machine) -> tuple[float, float]:
    """Bytes needed (0 if not said) and available, from the compiler's message."""

    def read(pattern: re.Pattern) -> float:
        found = pattern.search(message)
        parts = [part for part in found.groups() if part] if found else []
        return float(parts[0]) * _UNITS[parts[1]] if parts else 0.0

    return read(_USED), read(_LIMIT) or machine.chip.hbm


def _loop_notes(notes: list[work.LoopNote]) -> Iterator[str]:
    """One line for each kind of loop whose iterations are bounded or not known."""
    stated = sorted({place_of(n.source) for n in notes if n.trips.basis == "stated"})
    if stated:
        yield (
            f"loops in {', '.join(stated)} run as often as the data asks: counted with the most "
            "that they can run on average, so the figures of that part are upper bounds"
        )
    unknown = sorted({place_of(n.source) for n in notes if n.trips.basis == "unknown"})
    if unknown:
        count = sum(n.trips.basis == "unknown" for n in notes)
        yield (
            f"{count} loops in {', '.join(unknown)} run as often as the data asks, with no bound "
            "stated: counted ONCE, so flops, bytes and times are too low"
        )


@contextmanager
def _listening() -> Iterator[list[tuple[int, str]]]:
    """What this package logs in the meantime, as (level, message), each once."""
    said: list[tuple[int, str]] = []
    forget_choices()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            entry = record.levelno, record.getMessage()
            if entry not in said:
                said.append(entry)

    logger = logging.getLogger("rwkvx_jax")
    ear, level = Ear(logging.INFO), logger.level
    logger.addHandler(ear)
    logger.setLevel(logging.INFO)
    logger.propagate, before = False, logger.propagate  # the report repeats it in its place
    try:
        yield said
    finally:
        logger.removeHandler(ear)
        logger.setLevel(level)
        logger.propagate = before


def gib(size: float) -> float:
    return size / GIB
