"""From bundles, bytes and flops to an estimated time. Never measured; always called an estimate.

A cost is stages one after the other, each its slowest resource: bundles issued at the chip's clock,
flops at its peak, bytes at its bandwidth, and a least charge for every DMA descriptor.
"""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one core: clock (Hz) and matrix peak (bfloat16 flop/s); memory bandwidth (bytes/s).

    Peaks and bandwidths are the vendor's; clocks are inferred from peak / (matrix units * their
    size^2 * 2). A DMA is charged at least `copy_seconds`, an assumption on the safe side.
    """

    clock: float
    flops: float
    bandwidth: float
    copy_seconds: float = 2e-7


CHIPS = {
    "v5e": Chip(clock=1.5e9, flops=197e12, bandwidth=819e9),
    "v5p": Chip(clock=1.75e9, flops=459e12 / 2, bandwidth=2765e9 / 2),
    "v6e": Chip(clock=1.75e9, flops=918e12, bandwidth=1640e9),
}


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
