"""Which TPU a program is compiled for, and how a grid is shared by the cores of a chip."""

import math

import jax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import name_of

SCALAR_WORDS = 9 << 14
"""Words of scalar memory for the tables and scalar blocks of a kernel.

It has 2^18, but the compiler keeps its own scalars there too, and moves them to main memory and
back where tables leave no room: at 183,000 words it did, at 145,000 not.
"""


def current_chip() -> str | None:
    """A name in `chips.TPUS` or `chips.GPUS` by the mesh in force, else the default backend; None:
    another device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return name_of(kind)


def grid_options(grid: tuple[int, ...], parallel: int, vmem_limit_bytes: int | None = None) -> dict:
    """Arguments of a `pallas_call` whose grid has independent steps along its first axes.

    The cores of a chip that is one device (v5p has two) halve the steps of these axes, all of them
    taken as one row: an odd number leaves one core idle in the end, and one step a core altogether.
    That number stands beside the kernel in the compiled program, where `rwkvx_jax.perf` reads it.

    Args:
      grid: of the call.
      parallel: how many axes, from the first, may run in any order; the others run in order.
      vmem_limit_bytes: VMEM the compiler may use; None: its default.
    """
    order = ("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel)
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=order, vmem_limit_bytes=vmem_limit_bytes
        ),
        "metadata": {"parallel_steps": str(math.prod(grid[:parallel]))},
    }
