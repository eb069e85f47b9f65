"""What is installed and attached, and whether devices, disk and training work together."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from rwkvx_jax.checkpoint import progress_record
from rwkvx_jax.checkpoint_store import Checkpoints
from rwkvx_jax.config import Config
from rwkvx_jax.doctor.findings import Failed, Values
from rwkvx_jax.storage import in_bucket
from rwkvx_jax.training.loop import fit

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_COLLECTIVE_BYTES = 1 << 22  # of each device


def versions() -> tuple[str, Values]:
    """Python, this package and those it computes with."""
    found: Values = {"python": platform.python_version(), "system": platform.platform()}
    for name in ("rwkvx-jax", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    shown = ("python", "rwkvx-jax", "jax", "libtpu", "flax")
    return ", ".join(f"{name} {found[name]}" for name in shown), found


def devices() -> tuple[str, Values]:
    """Kind, number, place in the torus and memory of the devices."""
    first = jax.devices()[0]
    stats = first.memory_stats() or {}
    values: Values = {
        "platform": first.platform,
        "kind": first.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "coordinates": [list(getattr(d, "coords", [])) for d in jax.devices()],
        "bytes_limit": stats.get("bytes_limit"),
        "bytes_in_use": stats.get("bytes_in_use"),
    }
    memory = values["bytes_limit"]
    text = f"{values['devices']} x {values['kind']} in {values['processes']} process(es)"
    return text + (f", {memory / 1e9:.1f} GB each" if memory else ""), values


def collectives() -> tuple[str, Values]:
    """Sum, gather, shift and exchange over all devices: exact results, and their bandwidth."""
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    count = mesh.size
    if count == 1:
        return "one device: nothing to exchange", {}
    spec = PartitionSpec("all")
    length = _COLLECTIVE_BYTES // 4 // count * count
    ring = [(i, (i + 1) % count) for i in range(count)]
    kinds = {
        "sum": lambda x: jax.lax.psum(x, "all"),
        "gather": lambda x: jax.lax.all_gather(x, "all", tiled=True),
        "shift": lambda x: jax.lax.ppermute(x, "all", ring),
        "exchange": lambda x: jax.lax.all_to_all(x, "all", 0, 0, tiled=True),
    }
    parts = np.arange(count * length, dtype=np.int32).reshape(count, length)
    expected = {
        "sum": np.tile(parts.sum(0, dtype=np.int32), (count, 1)),
        "gather": np.tile(parts.reshape(-1), (count, 1)),
        "shift": np.roll(parts, 1, axis=0),
        "exchange": parts.reshape(count, count, -1).swapaxes(0, 1).reshape(count, length),
    }
    x = jax.make_array_from_callback(
        (count * length,), jax.sharding.NamedSharding(mesh, spec), lambda i: parts.reshape(-1)[i]
    )
    values: Values = {}
    for name, kind in kinds.items():
        run = jax.jit(
            jax.shard_map(kind, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        )
        out = run(x)
        for shard in out.addressable_shards:
            if not np.array_equal(np.asarray(shard.data), expected[name].reshape(-1)[shard.index]):
                raise Failed(f"{name} over {count} devices gave wrong numbers on {shard.device}")
        begin = time.perf_counter()
        jax.block_until_ready(run(x))
        values[name] = length * 4 / (time.perf_counter() - begin)
    rates = ", ".join(f"{name} {rate / 1e9:.2f}" for name, rate in values.items())
    return f"exact; GB/s a device: {rates}", values


def checkpoint(config: Config, workdir: Path) -> tuple[str, Values]:
    """Writes arrays that are spread over all devices to `workdir` and reads them back."""
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("all"))
    rows = np.random.default_rng(0).standard_normal((mesh.size * 8, 4096)).astype(np.float32)
    tree = {"x": jax.make_array_from_callback(rows.shape, sharding, lambda i: rows[i])}
    with _scratch(workdir) as folder:
        begin = time.perf_counter()
        with Checkpoints(folder, keep=1) as store:
            store.save(1, tree, {"x": jnp.zeros(())}, progress_record(config, 0, 1, {}))
            store.wait()
            saved = time.perf_counter() - begin
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
            )
            empty = {"x": jax.ShapeDtypeStruct((), jnp.float32)}
            params, _ = store.restore(1, target, empty)
        for shard in params["x"].addressable_shards:
            if not np.array_equal(np.asarray(shard.data), rows[shard.index]):
                raise Failed(f"what was read back from {workdir} is not what was written")
    return f"{rows.nbytes / 1e6:.0f} MB written in {saved:.2f} s to {workdir}", {"seconds": saved}


def training(config: Config, workdir: Path, steps: int) -> tuple[str, Values]:
    """The first steps of an experiment's first stage: finite losses, tokens per second."""
    stage = dataclasses.replace(config.stages[0], steps=steps, warmup_steps=0)
    run = dataclasses.replace(
        config.run,
        eval_batches=0,
        probe_trials=0,
        eval_tasks=(),
        log_every=1,
        profile_steps="",
    )
    with _scratch(workdir) as folder, tempfile.TemporaryDirectory() as cache:
        # Tokenized text is read from a disk, wherever the work directory is.
        data = dataclasses.replace(config.data, cache_dir=config.data.cache_dir or cache)
        short = dataclasses.replace(config, stages=(stage,), run=run, data=data)
        fit(short, folder)
        losses = [record["loss"] for record in _lines(folder / "metrics.jsonl")]
        timing = _lines(folder / "timing.jsonl")
        seconds = [record["step_seconds"] for record in timing if "step_seconds" in record]
    if len(losses) != steps:
        raise Failed(f"{len(losses)} of {steps} steps were recorded")
    step = float(np.median(seconds[1:] or seconds))
    rate = stage.seq_len * stage.global_batch / step
    values = {"losses": losses, "step_seconds": seconds, "tokens_per_second": rate}
    return (
        f"{steps} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}, {rate:,.0f} tokens/s "
        f"(median step {step * 1e3:.0f} ms)"
    ), values


class _scratch:
    """A folder of its own below a work directory, removed at the end."""

    def __init__(self, workdir: Path):
        number = np.uint32(uuid.uuid4().int % 2**32)
        if jax.process_count() > 1:
            number = multihost_utils.broadcast_one_to_all(number)
        self._folder = workdir / f"doctor-{int(number):08x}"

    def __enter__(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def __exit__(self, *_) -> None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("doctor")  # all have read what they need
        if jax.process_index() > 0:
            return
        if not in_bucket(self._folder):
            shutil.rmtree(self._folder, ignore_errors=True)
        else:
            self._folder.rmtree(missing_ok=True)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
