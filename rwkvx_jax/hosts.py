"""Several hosts that train together: joining, which rows each reads, stopping at the same step.

Every host runs the same program. Where it needs to know that it is not alone, the code is here.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from rwkvx_jax.config import ConfigError

_log = logging.getLogger(__name__)

# Seconds without a sign of life after which a host counts as dead, which ends all others, and that
# hosts wait for each other when they end.
_HEARTBEAT = 30
_SHUTDOWN = 60


def join_hosts(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    detect: bool,
) -> None:
    """Connects this process with the others of its job; to be called before anything is computed.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: processes of the job.
      process_id: number of this one; all three are given, or none.
      detect: without them, ask the environment (Cloud TPU, GKE, Slurm, Open MPI); a machine of
        no cluster stays alone.

    Raises:
      ConfigError: only some of the three, a process_id out of range, or no connection.
    """
    given = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ConfigError(f"{', '.join(missing)} missing: give all of {', '.join(given)}, or none")
    if missing and not detect:
        return
    if not missing and not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process-id is {process_id}: it must be one of 0 to {num_processes - 1}, as "
            f"--num-processes is {num_processes}"
        )
    if not missing and not coordinator.rpartition(":")[2].isdecimal():
        raise ConfigError(f"--coordinator is {coordinator!r}: write HOST:PORT, as 10.0.0.2:8476")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except (ValueError, OSError) as error:
        if not missing:
            raise
        _log.info("no cluster found around this machine (%s): running on it alone", error)
    except RuntimeError as error:
        where = "the cluster that its environment tells of" if missing else f"{coordinator}"
        raise ConfigError(
            f"this process can't join {where}: {error}\nTo run on this machine alone: "
            "--coordinator localhost:8476 --num-processes 1 --process-id 0"
        ) from error
    if jax.process_index() > 0:
        logging.getLogger("rwkvx_jax").setLevel(logging.ERROR)  # process 0 says it for all


def check_joined() -> None:
    """Raises ConfigError on one of several hosts that were never connected."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f"this is one of {jax.process_count()} hosts, which were not connected: call "
            "hosts.join_hosts before anything else, or start train.py with --coordinator, "
            "--num-processes and --process-id"
        )


def host_rows(sharding: NamedSharding, rows: int) -> list[int]:
    """Which rows of a batch of `rows` lie on devices of this host, ascending.

    No row is left out by all hosts. Two hosts share rows only where their devices hold parts of the
    same sequences.
    """
    cuts = sharding.addressable_devices_indices_map((rows, 1)).values()
    return sorted({row for cut in cuts for row in range(*cut[0].indices(rows))})


def global_batch(
    sharding: NamedSharding, batch: dict[str, np.ndarray], rows: int
) -> dict[str, jax.Array]:
    """Arrays over all hosts, of a batch of `rows` rows, from this host's `host_rows`."""
    place = {row: i for i, row in enumerate(host_rows(sharding, rows))}

    def one(local: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, end, _ = index[0].indices(rows)
            return local[place[first] : place[end - 1] + 1, index[1]]

        return jax.make_array_from_callback((rows, *local.shape[1:]), sharding, part)

    return {name: one(local) for name, local in batch.items()}


def place(tree: Any, shardings: Any) -> Any:
    """`jax.device_put` of arrays that every host holds whole, or that are spread out already."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, shardings)


@contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Yields a function (steps done) -> whether to save and stop now, because of SIGTERM.

    It is to be asked after every step. Among several hosts a notice to any of them (which is how
    the end of a preemptible machine is announced) makes all stop after the same step: JAX's
    preemption service agrees on one that none has passed. A second SIGTERM to a single process
    ends it at once.
    """
    if jax.process_count() > 1:  # the service has its own handler
        yield multihost_utils.reached_preemption_sync_point
        return
    caught = []

    def handler(*_) -> None:
        caught.append(True)
        signal.signal(signal.SIGTERM, before)

    try:
        before = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main thread: the caller handles signals
        yield lambda _: False
        return
    try:
        yield lambda _: bool(caught)
    finally:
        signal.signal(signal.SIGTERM, before)
