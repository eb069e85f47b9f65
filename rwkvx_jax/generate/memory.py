"""Memory: what a cache takes, and what is left, known before anything is allocated."""

from __future__ import annotations

from pathlib import Path

import jax

from rwkvx_jax.cache import CachePolicy, cache_bytes
from rwkvx_jax.config import ConfigError
from rwkvx_jax.model import RWKVX
from rwkvx_jax.sharding import mesh_in_force


def memory_left(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that all devices of the mesh in force, or the first device (on a CPU: the machine),
    still have; None where nobody tells. Each counts as much as the fullest of this process."""
    mesh = mesh_in_force()
    devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in own for own in stats):
        least = min(own["bytes_limit"] - own.get("bytes_in_use", 0) for own in stats)
        return least * (1 if mesh is None else mesh.size)
    if jax.default_backend() == "cpu" and meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return None


def rows_that_fit(
    model: RWKVX, most: int, max_length: int, policy: CachePolicy | None, free: int | None
) -> int:
    """How many texts side by side have a cache in `free` bytes (None: not known), from 1 to
    `most`."""
    if free is None:
        return most
    return max(1, min(most, free // cache_bytes(model.config, model.dtype, 1, max_length, policy)))


def check_memory(model: RWKVX, batch: int, max_length: int, policy: CachePolicy | None) -> None:
    """Refuses a cache that does not fit into the memory that is left.

    Raises:
      ConfigError: says how much is needed.
    """
    needed = cache_bytes(model.config, model.dtype, batch, max_length, policy)
    free = memory_left()
    if free is not None and needed > free:
        texts = "1 text" if batch == 1 else f"{batch:,} texts"
        raise ConfigError(
            f"a cache of {max_length:,} tokens for {texts} needs {needed / 1e9:,.1f} GB, and "
            f"{free / 1e9:,.1f} GB are free: ask for shorter texts or fewer at "
            "once, or bound the cache with a policy"
        )
