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
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rwkvx_jax.config import ConfigError
from rwkvx_jax.plan.collectives import Collective
from rwkvx_jax.plan.work import Work
from rwkvx_jax.training.model_flops import PEAK_FLOPS

GIB = 2**30
_COSTS = Path(__file__).parents[2] / "pallas_kernels" / "static_costs.json"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip.

    Attributes:
      flops: peak of bfloat16 products, flop/s.
      hbm: memory that programs may use, bytes; less than its nominal size. As the compiler says
        when it refuses a program (libtpu 0.0.42.1).
      hbm_bandwidth: bytes/s.
      link: bandwidth of one inter-chip link in one direction, bytes/s.
      torus: axes at least this long are closed to rings; shorter ones are lines.
      dcn: share of a chip in its host's data-centre network, bytes/s.
      host: between a chip and its host's memory (PCIe), one direction, bytes/s.
      clock: Hz; inferred from the peak and the size and number of matrix units.
      cores: which share the parallel steps of a kernel's grid.
    """

    flops: float
    hbm: float
    hbm_bandwidth: float
    link: float
    torus: int
    dcn: float
    clock: float
    cores: int = 1
    host: float = 15e9


# Peaks, memory bandwidths and interconnects: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, read in
# 2026. Clocks are inferred from peak / (matrix units * their size^2 * 2). A link's bandwidth is the
# chip's total ("bidirectional", both directions added) over twice its ports: 400 GB/s / 8 on v5e,
# 1200 / 12 on v5p, 800 / 8 on v6e; v4 from its 2400 Gbit/s one way over 6 ports. Data-centre
# network a chip: 50 Gbit/s (v5p), 6.4 Tbit/s over 256 chips (v5e); that of v6e and v4 is not on
# those pages: v6e is taken as four times v5e's, v4 as v5p's. PCIe is not on
# those pages either: 15 GB/s a chip, the figure of "How to Scale Your Model"
# (jax-ml.github.io/scaling-book).
CHIPS: Mapping[str, Chip] = {
    "v4": Chip(PEAK_FLOPS["TPU v4"], 30.5 * GIB, 1200e9, 50e9, 4, 6.25e9, 1.05e9, cores=2),
    "v5e": Chip(PEAK_FLOPS["TPU v5 lite"], 15.75 * GIB, 819e9, 50e9, 16, 3.125e9, 1.5e9),
    "v5p": Chip(PEAK_FLOPS["TPU v5"], 95.74 * GIB, 2765e9, 100e9, 4, 6.25e9, 1.75e9, cores=2),
    "v6e": Chip(PEAK_FLOPS["TPU v6 lite"], 31.25 * GIB, 1638e9, 100e9, 16, 12.5e9, 1.75e9),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices of a mesh, in the mesh's order.

    Attributes:
      chip: what each of them is; a v4 device is one of a chip's two cores.
      coordinates: [N, axes] of the chips within their slice.
      slices: [N], the slice of each; slices are joined by the data-centre network.
      sizes: chips along each axis of a slice.
    """

    chip: Chip
    coordinates: np.ndarray
    slices: np.ndarray
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, generation: str, devices: Sequence) -> Machine:
        """The machine that devices of a TPU topology make.

        Raises:
          ConfigError: no figures are known for the generation.
        """
        if generation not in CHIPS:
            raise ConfigError(
                f"no peaks are known for {generation}; the planner knows {', '.join(CHIPS)}"
            )
        chip = CHIPS[generation]
        coordinates = np.array([device.coords for device in devices])
        slices = np.array([getattr(device, "slice_index", 0) or 0 for device in devices])
        places = np.concatenate([slices[:, None], coordinates], axis=1)
        share = len(devices) / len(np.unique(places, axis=0))  # devices a chip
        if share > 1:
            chip = dataclasses.replace(
                chip,
                flops=chip.flops / share,
                hbm=chip.hbm / share,
                hbm_bandwidth=chip.hbm_bandwidth / share,
                link=chip.link / share,
                dcn=chip.dcn / share,
                host=chip.host / share,
                cores=1,
            )
        sizes = tuple(int(n) + 1 for n in coordinates.max(axis=0))
        return cls(chip, coordinates, slices, sizes)

    def crosses_slices(self, collective: Collective) -> bool:
        """Whether a collective leaves the slice, and so uses the data-centre network."""
        slices = self.slices[collective.groups]
        return bool((slices != slices[:, :1]).any())

    def collective_seconds(self, collective: Collective) -> float:
        """Time of a collective at the bandwidth of the links that its groups can use.

        Along each axis of the torus on which a group's members differ, two links serve it (one
        where the axis is an open line), shared with the groups that lie between its members. An
        all-to-all crosses a quarter of the longest ring on average; a permutation, the distance of
        its farthest pair.
        """
        if self.crosses_slices(collective):
            return float(collective.wire_bytes / self.chip.dcn)
        places = self.coordinates[collective.groups[0]]
        distances = np.ptp(places, axis=0)
        if collective.kind == "collective-permute":
            pairs = self.coordinates[collective.groups]
            hops = np.abs(pairs[:, 0] - pairs[:, 1])
            around = np.array([n if n >= self.chip.torus else 2 * n for n in self.sizes])
            hops = np.minimum(hops, around - hops).sum(axis=1).max()
            return float(collective.wire_bytes * max(1, int(hops)) / self.chip.link)
        bandwidth, longest = 0.0, 2
        for axis, distance in enumerate(distances):
            members = len(np.unique(places[:, axis]))
            if members > 1:
                sharing = (distance + 1) / members
                closed = self.sizes[axis] >= self.chip.torus and distance + 1 == self.sizes[axis]
                bandwidth += (2 if closed else 1) * self.chip.link / sharing
                longest = max(longest, members)
        if not bandwidth:  # two devices of one chip
            return 0.0
        hops = longest / 4 if "all-to-all" in collective.kind else 1.0
        return float(collective.wire_bytes * max(1.0, hops) / bandwidth)


class KernelCosts:
    """Bundles of Pallas kernels, from the checked-in table of the compiler's schedules."""

    def __init__(
        self,
        generation: str,
        table: Mapping[str, Mapping] | None = None,
        variant: tuple[str, ...] = (),
    ):
        """
        Args:
          generation: of the TPU.
          table: cases by name "kernel/generation/..."; None reads `static_costs.json`.
          variant: parts of names such as "C2048" (chunk size) and "K3" (top-k); cases that name
            another chunk size or top-k are another kernel's.
        """
        if table is None:
            table = json.loads(_COSTS.read_text())["cases"] if _COSTS.exists() else {}
        self._cores = CHIPS[generation].cores if generation in CHIPS else 1
        self._cases: dict[str, list[Mapping]] = {}
        for name, case in table.items():
            kernel, chip, *parts = name.split("/")
            own = {part for part in parts if part[0] in "CK"}
            if chip == generation and own <= set(variant):
                self._cases.setdefault(kernel, []).append(case)

    def bundles(self, kernel: str, size: float, parallel_steps: int | None = None) -> float | None:
        """Bundles that the busiest core issues in one call.

        Those of the case nearest in size, scaled by the bytes and by the share of the grid that a
        core gets.

        Args:
          kernel: its name.
          size: bytes of its arguments and results.
          parallel_steps: see `Work`.

        Returns:
          None where the table has no case.
        """
        cases = self._cases.get(kernel)
        if not cases or not size:
            return None
        near = min(cases, key=lambda case: abs(math.log(case["hbm_bytes"] / size)))
        share = self._share(parallel_steps) / self._share(near.get("parallel_steps"))
        return near["bundles"] * size / near["hbm_bytes"] * share

    def _share(self, steps: int | None) -> float:
        """Part of a grid that the busiest core runs; an equal one where the steps are not known."""
        return 1 / self._cores if steps is None else -(-steps // self._cores) / steps


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
      place_flops: flops by place in the source.
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
    place_flops: dict[str, float]

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


def estimate(work: Iterable[Work], machine: Machine, costs: KernelCosts) -> Estimate:
    """Adds up a program's work."""
    chip = machine.chip
    summed = "flops", "passes", "bytes", "host_bytes"
    total = dict.fromkeys((*summed, "ici", "dcn", "network", "serial"), 0.0)
    kinds: dict[str, dict[str, float]] = {}
    kernels: dict[str, dict[str, float | bool]] = {}
    places: dict[str, float] = {}
    place_flops: dict[str, float] = {}
    for one in work:
        seconds = max(one.passes / chip.flops, one.bytes / chip.hbm_bandwidth)
        if one.kernel:
            bundles = costs.bundles(one.kernel, one.kernel_bytes, one.parallel_steps)
            seconds = max(seconds, (bundles or 0.0) / chip.clock)
            kernel = kernels.setdefault(one.kernel, {"times": 0.0, "bundles_known": True})
            kernel["times"] += one.times
            kernel["bundles_known"] &= bundles is not None
        if one.collective:
            wire = one.collective.wire_bytes
            spent = machine.collective_seconds(one.collective)
            where = "dcn" if machine.crosses_slices(one.collective) else "ici"
            total[where] += one.times * wire
            total["network"] += one.times * spent
            name = f"{one.collective.kind} of {one.collective.group_size} ({where.upper()})"
            if one.collective.kind == "collective-permute":
                name = f"collective-permute ({where.upper()})"
            kind = kinds.setdefault(name, {"times": 0.0, "bytes": 0.0, "seconds": 0.0})
            kind["times"] += one.times
            kind["bytes"] += one.times * wire
            kind["seconds"] += one.times * spent
            # What is fused with it; its own bytes go by while it sends.
            seconds = one.passes / chip.flops
        else:
            spent = 0.0
        total["serial"] += one.times * seconds
        for name in summed:
            total[name] += one.times * getattr(one, name)
        place = place_of(one.source)
        copying = one.host_bytes / chip.host
        places[place] = places.get(place, 0.0) + one.times * (spent + seconds + copying)
        place_flops[place] = place_flops.get(place, 0.0) + one.times * one.flops
    by_seconds = lambda item: -item[1]
    return Estimate(
        flops=total["flops"],
        passes=total["passes"],
        bytes=total["bytes"],
        ici_bytes=total["ici"],
        dcn_bytes=total["dcn"],
        host_bytes=total["host_bytes"],
        compute=total["passes"] / chip.flops,
        memory=total["bytes"] / chip.hbm_bandwidth,
        network=total["network"],
        host=total["host_bytes"] / chip.host,
        serial=total["serial"],
        collectives=dict(sorted(kinds.items(), key=lambda item: -item[1]["seconds"])),
        kernels=kernels,
        places=dict(sorted(places.items(), key=by_seconds)),
        place_flops=place_flops,
    )


def place_of(source: Sequence[tuple[str, str]]) -> str:
    """The innermost file of this project that made an operation, such as "modules/time_mix.py"."""
    for file, _ in source:
        for package in ("rwkvx_jax", "pallas_kernels"):
            _, found, inside = file.rpartition(f"/{package}/")
            if found:
                return inside if package == "rwkvx_jax" else f"{package}/{inside}"
    return "copies and others"
