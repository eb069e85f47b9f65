"""From bundles, bytes and flops to an estimated time. Never measured; always called an estimate.

A cost is stages one after the other, each its slowest resource: bundles issued at the chip's clock,
flops at its peak, bytes at its bandwidth, and a least charge for every DMA descriptor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from pallas_kernels.chips import TPUS, TpuChip


@dataclasses.dataclass(frozen=True)
class Core:
    """One core of a chip: clock (Hz), matrix peak (bfloat16 flop/s), memory bandwidth (bytes/s).

    A DMA is charged at least `copy_seconds`, an assumption on the safe side.
    """

    clock: float
    flops: float
    bandwidth: float
    copy_seconds: float = 2e-7

    @classmethod
    def of(cls, chip: TpuChip) -> Core:
        """One core's share of a chip."""
        return cls(chip.clock, chip.flops / chip.cores, chip.hbm_bandwidth / chip.cores)


CORES = {name: Core.of(TPUS[name]) for name in ("v5e", "v5p", "v6e")}
"""Cores of the chips that the kernels are made for."""


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

    def seconds(self, core: Core) -> float:
        """Estimated time: the slowest of issuing, computing and moving, all overlapped."""
        moving = max(self.bytes / core.bandwidth, self.copies * core.copy_seconds)
        return max(self.bundles / core.clock, self.flops / core.flops, moving)


def total_seconds(stages: Iterable[Stage], core: Core) -> float:
    """Estimated time of stages one after the other."""
    return sum(stage.seconds(core) for stage in stages)
