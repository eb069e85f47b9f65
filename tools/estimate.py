"""From bundles, bytes and flops to an estimated time. Never measured; always called an estimate.

A cost is stages one after the other, each its slowest resource: bundles issued at the chip's clock,
flops at its peak, bytes at its bandwidth, and a least charge for every DMA descriptor.
"""

import dataclasses
from collections.abc import Iterable

from rwkvx_jax.plan import roofline


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one core: clock (Hz) and matrix peak (bfloat16 flop/s); memory bandwidth (bytes/s).

    The figures are the planner's (plan/roofline.py), whose table is of whole chips. A DMA is
    charged at least `copy_seconds`, an assumption on the safe side.
    """

    clock: float
    flops: float
    bandwidth: float
    copy_seconds: float = 2e-7


def _one_core(chip: roofline.Chip) -> Chip:
    return Chip(chip.clock, chip.flops / chip.cores, chip.hbm_bandwidth / chip.cores)


CHIPS = {name: _one_core(roofline.CHIPS[name]) for name in ("v5e", "v5p", "v6e")}


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

    def seconds(self, chip: Chip) -> float:
        """Estimated time: the slowest of issuing, computing and moving, all overlapped."""
        moving = max(self.bytes / chip.bandwidth, self.copies * chip.copy_seconds)
        return max(self.bundles / chip.clock, self.flops / chip.flops, moving)


def seconds(stages: Iterable[Stage], chip: Chip) -> float:
    """Estimated time of stages one after the other."""
    return sum(stage.seconds(chip) for stage in stages)
