"""What training takes at the very least, by arithmetic, before anything is allocated."""

from __future__ import annotations

import math
import os

import jax
from jax.sharding import Mesh

from rwkvx_jax.config import ADAPTERS, Config, ConfigError, Stage
from rwkvx_jax.convert.layout import param_shapes
from rwkvx_jax.lora import thin


def parameter_counts(config: Config, stage: Stage) -> tuple[int, int]:
    """Numbers in all parameters of a stage, adapters included, and in those that train."""
    shapes: dict[str, tuple[int, ...]] = param_shapes(config.stage_model(stage))
    if stage.trainable == "lora":
        adapted = {name: shape for name, shape in shapes.items() if stage.lora.adapts(name)}
        for name, shape in adapted.items():
            for part, small in thin(shape, stage.lora.rank).items():
                shapes[f"{ADAPTERS}.{name}.{part}"] = small
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if stage.trains(name))


def describe_trainable(config: Config, stage: Stage) -> str:
    """What trains in a stage, for people."""
    parameters, trained = parameter_counts(config, stage)
    return f"{stage.trained_part} parameters ({trained:,} of {parameters:,})"


def training_bytes(config: Config, stage: Stage) -> int:
    """Bytes over all devices that a stage can't do without: a lower bound.

    Parameters in float32; gradients and two moments of those that train; the residual stream of
    one part of a batch.
    """
    parameters, trained = parameter_counts(config, stage)
    tokens = stage.seq_len * stage.global_batch // stage.accumulation
    width = {"float32": 4, "bfloat16": 2}[config.run.compute_dtype]
    return 4 * (parameters + 3 * trained) + tokens * config.model.width * width


def memory_bytes(mesh: Mesh) -> int | None:
    """Memory of all devices of a mesh; None where nobody tells.

    Devices of a CPU share the memory of their machine.
    """
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * jax.process_count()
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit and limit * mesh.size


def check_memory(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError for a stage that can't fit into the memory of the mesh."""
    available = memory_bytes(mesh)
    for stage in config.stages:
        needed = training_bytes(config, stage)
        if available is not None and needed > available:
            raise ConfigError(
                f"stage {stage.name!r} needs at least {needed / 2**30:,.1f} GiB for its "
                f"{parameter_counts(config, stage)[0]:,} parameters, with gradients and moments "
                f"of those that train, and its {stage.global_batch:,} x {stage.seq_len:,} tokens; "
                f"the memory of {mesh.size} device(s) is {available / 2**30:,.1f} GiB. Make the "
                "model or the batch smaller, or use more devices"
            )
