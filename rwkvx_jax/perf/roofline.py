"""From the work of a program to an estimate of its time on a TPU.

Two estimates, both from the vendor's peaks:

* the *floor*: all products at the matrix peak, all bytes at the memory's bandwidth, all collectives
  at the links' bandwidth, each wholly hidden behind the slowest of them. Nothing runs faster.
* the *estimate*: operations one after the other, each as long as the slowest of its products, its
  bytes and (for a Pallas kernel) the instruction bundles that the compiler scheduled; then the
  collectives and the copies to and from the host on top, as if none were hidden.

Neither was ever compared with a TPU. The vector units, and how well a product fills the matrix
unit, are in neither; nor are waiting for memory inside an operation and the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from rwkvx_jax.perf.kernel_costs import KernelCosts
from rwkvx_jax.perf.machine import Machine
from rwkvx_jax.perf.work import Work


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Totals of a program on one device, and seconds estimated from them.

    Attributes:
      flops: of matrix products and kernels.
      passes: the same as single bfloat16 passes.
      bytes: of main memory, read and written.
      ici_bytes, dcn_bytes: sent through links within a slice, between slices.
      host_bytes: copied to and from the host.
      compute, memory, network, host: seconds of each alone at its peak.
      serial: seconds of all operations one after the other, without collectives and host copies.
      collectives: seconds and bytes by kind.
      kernels: Pallas kernels: how often each runs, and whether bundles are known.
      places: seconds by place in the source, collectives included, most first.
    """

    flops: float
    passes: float
    bytes: float
    ici_bytes: float
    dcn_bytes: float
    host_bytes: float
    compute: float
    memory: float
    network: float
    host: float
    serial: float
    collectives: dict[str, dict[str, float]]
    kernels: dict[str, dict[str, float | bool]]
    places: dict[str, float]

    @property
    def floor(self) -> float:
        """Seconds below which no schedule can come."""
        return max(self.compute, self.memory, self.network, self.host)

    @property
    def seconds(self) -> float:
        """Seconds with every operation at its roofline, no collective and no host copy hidden."""
        return self.serial + self.network + self.host

    @property
    def bound(self) -> str:
        """What the floor consists of."""
        return max(("compute", "memory", "network", "host"), key=lambda part: getattr(self, part))


@dataclasses.dataclass
class _Sums:
    """What grows with every operation; fields as in `Estimate`."""

    flops: float = 0.0
    passes: float = 0.0
    bytes: float = 0.0
    host_bytes: float = 0.0
    ici_bytes: float = 0.0
    dcn_bytes: float = 0.0
    network: float = 0.0
    serial: float = 0.0
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    kernels: dict[str, dict[str, float | bool]] = dataclasses.field(default_factory=dict)
    places: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, one: Work, seconds: float, sending: float, copying: float) -> None:
        """An operation that computes, sends and copies to the host for so many seconds."""
        self.serial += one.times * seconds
        self.flops += one.times * one.flops
        self.passes += one.times * one.passes
        self.bytes += one.times * one.bytes
        self.host_bytes += one.times * one.host_bytes
        place = place_of(one.source)
        spent = one.times * (sending + seconds + copying)
        self.places[place] = self.places.get(place, 0.0) + spent

    def add_kernel(self, one: Work, bundles_known: bool) -> None:
        kernel = self.kernels.setdefault(one.kernel, {"times": 0.0, "bundles_known": True})
        kernel["times"] += one.times
        kernel["bundles_known"] &= bundles_known

    def add_collective(self, one: Work, seconds: float, crosses_slices: bool) -> None:
        collective, wire = one.collective, one.times * one.collective.wire_bytes
        if crosses_slices:
            self.dcn_bytes += wire
        else:
            self.ici_bytes += wire
        self.network += one.times * seconds
        several = collective.kind != "collective-permute"
        members = f" of {collective.group_size}" if several else ""
        name = f"{collective.kind}{members} ({'DCN' if crosses_slices else 'ICI'})"
        kind = self.collectives.setdefault(name, {"times": 0.0, "bytes": 0.0, "seconds": 0.0})
        kind["times"] += one.times
        kind["bytes"] += wire
        kind["seconds"] += one.times * seconds


def estimate(work: Iterable[Work], machine: Machine, costs: KernelCosts) -> Estimate:
    """Adds up a program's work."""
    chip, sums = machine.chip, _Sums()
    for one in work:
        seconds, sending = max(one.passes / chip.flops, one.bytes / chip.hbm_bandwidth), 0.0
        if one.kernel:
            bundles = costs.bundles(one.kernel, one.kernel_bytes, one.parallel_steps)
            seconds = max(seconds, (bundles or 0.0) / chip.clock)
            sums.add_kernel(one, bundles is not None)
        if one.collective:
            # What is fused with it; its own bytes go by while it sends.
            seconds = one.passes / chip.flops
            sending = machine.collective_seconds(one.collective)
            sums.add_collective(one, sending, machine.crosses_slices(one.collective))
        sums.add(one, seconds, sending, one.host_bytes / chip.host)
    most_first = lambda item: -item[1]
    return Estimate(
        flops=sums.flops,
        passes=sums.passes,
        bytes=sums.bytes,
        ici_bytes=sums.ici_bytes,
        dcn_bytes=sums.dcn_bytes,
        host_bytes=sums.host_bytes,
        compute=sums.passes / chip.flops,
        memory=sums.bytes / chip.hbm_bandwidth,
        network=sums.network,
        host=sums.host_bytes / chip.host,
        serial=sums.serial,
        collectives=dict(sorted(sums.collectives.items(), key=lambda item: -item[1]["seconds"])),
        kernels=sums.kernels,
        places=dict(sorted(sums.places.items(), key=most_first)),
    )


def place_of(source: Sequence[tuple[str, str]]) -> str:
    """The innermost file of this project that made an operation: "modules/mixers/rwkv7.py"."""
    for file, _ in source:
        for package in ("rwkvx_jax", "pallas_kernels"):
            _, found, inside = file.rpartition(f"/{package}/")
            if found:
                return inside if package == "rwkvx_jax" else f"{package}/{inside}"
    return "copies and others"
