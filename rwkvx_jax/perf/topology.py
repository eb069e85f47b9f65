"""Compile-only devices: a mesh of TPUs (or a GPU) not attached, to compile and plan on a CPU.

The TPU compiler ships as a library (libtpu, `pip install "jax[tpu]"`) and needs no device, only a
description of one. Every place that compiles for absent hardware (the planner, the static kernel
costs, the compile tests) takes its devices from here, so that the environment libtpu insists on is
written once.
"""

import importlib.util
import math
import os
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from pallas_kernels.chips import TPUS
from rwkvx_jax.config import ConfigError
from rwkvx_jax.xla_flags import LIBTPU_ENVIRONMENT

_GENERATIONS = (*TPUS, "tpu7x")
_NAME = re.compile(r"^(?P<generation>[a-z0-9]+):(?P<shape>\d+(x\d+)*)$")
_MOST_CHIPS = 2**16  # descriptions of more take minutes to make, and nobody has them

# XLA's public description of the device, and the platform it belongs to.
_GPUS: Mapping[str, str] = {
    "h100": """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
""",
}


def generation(name: str) -> str:
    """The TPU generation of a topology name: "v5e" for "v5e:2x2".

    Raises:
      ConfigError: the name is not GENERATION:AxBxC, or the generation is unknown.
    """
    match = _NAME.match(name)
    if match is None or match["generation"] not in _GENERATIONS:
        raise ConfigError(
            f"topology {name!r} is not understood; write GENERATION:SHAPE with a generation of "
            f"{', '.join(_GENERATIONS)} and a shape such as 2x2 or 4x4x8, e.g. 'v5e:2x2'"
        )
    return match["generation"]


def smallest(generation: str) -> str:
    """The smallest topology of a generation that libtpu describes."""
    return f"{generation}:2x2x1" if generation in ("v4", "v5p") else f"{generation}:2x2"


def is_available() -> bool:
    """True if the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def topology_devices(name: str, slices: int = 1) -> list:
    """Compile-only devices of a topology.

    Args:
      name: generation and shape in chips, e.g. "v5e:2x2", "v5p:2x2x1", "v5p:4x4x8", "v6e:2x2"; or
        "h100", one GPU, which needs jax's CUDA plugin and `ptxas`.
      slices: TPU slices of this shape, joined by the data-centre network; with more than one, each
        device has a `slice_index`.

    Returns:
      The devices, in the topology's order. Their number is the product of the shape for every
      generation with one device a chip.

    Raises:
      ConfigError: the name is not understood, libtpu refuses the shape, or libtpu (for a GPU: the
        CUDA plugin) is not installed.
    """
    if name in _GPUS:
        return _gpu_devices(name)
    generation(name)
    if slices < 1:
        raise ConfigError(f"{slices} slices of {name}: there must be at least 1")
    chips = slices * math.prod(map(int, _NAME.match(name)["shape"].split("x")))
    if chips > _MOST_CHIPS:
        raise ConfigError(
            f"{slices} x {name} are {chips:,} chips: this plans for at most {_MOST_CHIPS:,}"
        )
    if not is_available():
        raise ConfigError(
            f"compiling for {name} needs the TPU compiler: pip install 'jax[tpu]' (no TPU needed)"
        )
    for key, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        several = {"num_slices": slices} if slices > 1 else {}
        description = topologies.get_topology_desc(name, "tpu", **several)
    except Exception as error:  # jax raises its own runtime error types, depending on the version
        raise ConfigError(f"the TPU compiler does not know topology {name!r}: {error}") from error
    return list(description.devices)


def _gpu_devices(name: str) -> list:
    try:
        description = topologies.get_topology_desc(
            topology_name=name, platform="cuda", target_config=_GPUS[name], topology="1x1x1"
        )
    except Exception as error:  # jax raises its own runtime error types, depending on the version
        raise ConfigError(
            f"compiling for {name} needs jax's CUDA plugin of the same version as jax (pip install "
            f"--no-deps jax-cuda13-plugin jax-cuda13-pjrt; no GPU needed): {error}"
        ) from error
    return list(description.devices)


def topology_mesh(
    name: str,
    axes: Mapping[str, int] | None = None,
) -> Mesh:
    """A mesh over the compile-only devices of a TPU topology.

    Args:
      name: see `topology_devices`.
      axes: axis sizes in order, e.g. {"data": 1, "fsdp": 32, "tensor": 4}. Their product may be
        smaller than the topology: the first devices are used. Default: one axis "devices".

    Returns:
      A mesh with axes of type Auto. Arguments for lowering are
      `jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))`.

    Raises:
      ConfigError: as `topology_devices`, or the axes need more devices than there are.
    """
    devices = topology_devices(name)
    axes = {"devices": len(devices)} if axes is None else dict(axes)
    count = math.prod(axes.values())
    if not 1 <= count <= len(devices):
        raise ConfigError(f"mesh axes {axes} need {count} devices; {name} has {len(devices)}")
    grid = np.array(devices[:count]).reshape(tuple(axes.values()))
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def on_cpu() -> None:
    """Keeps jax itself on the CPU. To be called before any jax computation by programs that only
    compile, since with libtpu installed jax would otherwise look for attached TPUs first."""
    jax.config.update("jax_platforms", "cpu")
