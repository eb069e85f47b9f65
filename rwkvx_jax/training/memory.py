"""What training takes at the very least, by arithmetic, before anything is allocated."""

from __future__ import annotations

import os

import jax
from jax.sharding import Mesh

from rwkvx_jax.config import Config, ConfigError, Stage


def training_bytes(config: Config, stage: Stage) -> int:
    """Bytes over all devices that a stage can't do without: a lower bound.

    Parameters in float32; gradients and two moments of those that train; the residual stream of
    one part of a batch.
    """
    model = config.stage_model(stage)
    parameters = trained = model.num_parameters
    if stage.trainable == "attention":
        trained -= model.without_attention().num_parameters
    tokens = stage.seq_len * stage.global_batch // stage.accumulation
    width = {"float32": 4, "bfloat16": 2}[config.run.compute_dtype]
    return 4 * (parameters + 3 * trained) + tokens * model.width * width


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
                f"{config.stage_model(stage).num_parameters:,} parameters with gradients and "
                f"moments, and its {stage.global_batch:,} x {stage.seq_len:,} tokens; the memory "
                f"of {mesh.size} device(s) is {available / 2**30:,.1f} GiB. Make the model or the "
                "batch smaller, or use more devices"
            )
