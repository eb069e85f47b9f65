"""The one table of chips: their peaks, memories and links, and the names that JAX gives them.

It stands here because kernels, training (utilisation) and the predictions of `rwkvx_jax.perf` read
it, and this package may import nothing of theirs.
"""

import dataclasses
from collections.abc import Mapping

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    Attributes:
      kinds: JAX's `device_kind` of it; of a GPU, how it begins.
      flops: peak of dense bfloat16 products, flop/s.
    """

    kinds: tuple[str, ...]
    flops: float


@dataclasses.dataclass(frozen=True)
class TpuChip(Chip):
    """One TPU chip.

    Attributes:
      hbm: memory that programs may use, bytes; less than its nominal size. As the compiler says
        when it refuses a program (libtpu 0.0.42.1).
      hbm_bandwidth: bytes/s.
      link: bandwidth of one inter-chip link in one direction, bytes/s.
      torus: axes at least this long are closed to rings; shorter ones are lines.
      dcn: share of a chip in its host's data-centre network, bytes/s.
      clock: Hz; inferred from the peak and the size and number of matrix units.
      cores: which share the parallel steps of a kernel's grid.
      host: between a chip and its host's memory (PCIe), one direction, bytes/s.
    """

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
TPUS: Mapping[str, TpuChip] = {
    "v4": TpuChip(("TPU v4",), 275e12, 30.5 * GIB, 1200e9, 50e9, 4, 6.25e9, 1.05e9, cores=2),
    "v5e": TpuChip(
        ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819e9, 50e9, 16, 3.125e9, 1.5e9
    ),
    "v5p": TpuChip(
        ("TPU v5", "TPU v5p"), 459e12, 95.74 * GIB, 2765e9, 100e9, 4, 6.25e9, 1.75e9, cores=2
    ),
    "v6e": TpuChip(
        ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GIB, 1638e9, 100e9, 16, 12.5e9, 1.75e9
    ),
}
"""TPU chips by generation, as topologies name it."""

# NVIDIA's data sheets (SXM).
GPUS: Mapping[str, Chip] = {
    "a100": Chip(("NVIDIA A100",), 312e12),
    "h100": Chip(("NVIDIA H100",), 989.4e12),
    "h200": Chip(("NVIDIA H200",), 989.4e12),
}


def name_of(kind: str) -> str | None:
    """The name of a chip, such as "v5e", by JAX's `device_kind`; None: it is not in the tables."""
    for name, chip in TPUS.items():
        if kind in chip.kinds:
            return name
    return next((name for name, chip in GPUS.items() if kind.startswith(chip.kinds)), None)


def peak_flops(kind: str) -> float | None:
    """Peak of a device by its `device_kind`, flop/s in bfloat16; None: it is not known."""
    name = name_of(kind)
    return None if name is None else (TPUS | GPUS)[name].flops
