"""The devices of a mesh as a machine: where each lies, and how long they take for a collective."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from pallas_kernels.chips import TPUS, TpuChip
from rwkvx_jax.config import ConfigError
from rwkvx_jax.perf.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices of a mesh, in the mesh's order.

    Attributes:
      chip: what each of them is; a v4 device is one of a chip's two cores.
      coordinates: [N, axes] of the chips within their slice.
      slices: [N], the slice of each; slices are joined by the data-centre network.
      sizes: chips along each axis of a slice.
    """

    chip: TpuChip
    coordinates: np.ndarray
    slices: np.ndarray
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, generation: str, devices: Sequence) -> Machine:
        """The machine that devices of a TPU topology make.

        Raises:
          ConfigError: no figures are known for the generation.
        """
        if generation not in TPUS:
            raise ConfigError(
                f"no peaks are known for {generation}; the planner knows {', '.join(TPUS)}"
            )
        chip = TPUS[generation]
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
