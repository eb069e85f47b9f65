"""Several hosts that train together: joining, which rows each reads, stopping at the same step.

Every host runs the same program. Where it needs to know that it is not alone, the code is here.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from rwkvx_jax.config import ConfigError
from rwkvx_jax.records import RecordFile

_log = logging.getLogger(__name__)

_SHUTDOWN = 60  # seconds that hosts wait for each other when they end


def join_hosts(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    detect: bool,
    heartbeat_timeout: int | None = None,
) -> None:
    """Connects this process with the others of its job; to be called before anything is computed.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: processes of the job.
      process_id: number of this one; all three are given, or none.
      detect: without them, ask the environment (Cloud TPU, GKE, Slurm, Open MPI); a machine of
        no cluster stays alone.
      heartbeat_timeout: seconds without a sign of life after which a host counts as dead, which
        ends all others; None: JAX's default, 100. Too short, and a host that only was busy ends
        the job.

    Raises:
      ConfigError: only some of the three, a process_id or timeout out of range, or no connection.
    """
    if heartbeat_timeout is not None and heartbeat_timeout < 1:
        raise ConfigError(f"--heartbeat-timeout is {heartbeat_timeout}: use at least 1 second")
    heartbeat = {"heartbeat_timeout_seconds": heartbeat_timeout} if heartbeat_timeout else {}
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
            shutdown_timeout_seconds=_SHUTDOWN,
            **heartbeat,
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


def first_does(act: Callable[[], Any], failure: str) -> None:
    """Process 0 calls `act`, while the others wait for it and for how it went.

    Args:
      act: what only one process may do, such as writing a file.
      failure: what it means that the operating system refuses.

    Raises:
      ConfigError: on every process, if it failed.
    """

    def done() -> None:
        act()

    first_tells(done, failure)


def first_tells(find: Callable[[], Any], failure: str) -> Any:
    """What `find` returned on process 0, a JSON value, on every process.

    Args:
      find: what only one process may do, such as reading a file that it alone writes.
      failure: what it means that the operating system refuses.

    Raises:
      ConfigError: on every process, if it failed.
    """
    problem = value = None
    if jax.process_index() == 0:
        try:
            value = find()
        except ConfigError as error:
            problem = error
        except OSError as error:
            problem = ConfigError(f"{failure}: {error}")
        except Exception as error:  # the others wait for the outcome, whatever it is
            problem = error
    failed = problem is not None
    if jax.process_count() > 1:
        failed, value = json.loads(_told(json.dumps([failed, value]).encode()))
    if failed:
        raise problem or ConfigError(f"{failure}: the message of process 0 says why")
    return value


def _told(text: bytes) -> bytes:
    """The text of process 0, on every process."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    own = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        own[:] = np.frombuffer(text, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own)).astype(np.uint8).tobytes()


def record_file(path: Path) -> RecordFile:
    """A file of JSON lines that process 0 alone reads and writes, and tells the others of."""
    return RecordFile(path) if jax.process_count() == 1 else _FirstsFile(path)


class _FirstsFile(RecordFile):
    """See `record_file`; every process has to make the same calls."""

    @contextmanager
    def locked(self, *, busy: str | None = None) -> Iterator[None]:
        with ExitStack() as held:
            lock = super().locked(busy=busy)
            first_does(lambda: held.enter_context(lock), f"{self.path} can't be locked")
            yield

    def new(self, begins: bytes = b"") -> list[Any]:
        read = super().new
        return first_tells(lambda: read(begins), f"{self.path} can't be read")

    def append(self, values: Sequence[Any]) -> None:
        write = super().append
        first_does(lambda: write(values), f"{self.path} can't be written")


def any_process(flag: bool) -> bool:
    """Whether `flag` holds on any process; all of them have to ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


@contextmanager
def stop_signal() -> Iterator[Callable[[], str]]:
    """Yields a function that gives the name of the signal to save and stop for now, or "".

    It is to be asked after every step, and equally often by all processes. SIGTERM, SIGINT (Ctrl-C)
    and SIGHUP (the terminal has gone) are heard, but where the process was started to ignore one,
    as by nohup. The next signal ends the process at once. Among several hosts a notice to any of
    them (which is how the end of a preemptible machine is announced) makes all stop after the same
    step: JAX's preemption service agrees on a question that none has asked yet.
    """
    if threading.current_thread() is not threading.main_thread():  # the caller handles signals
        yield lambda: ""
        return
    several = jax.process_count() > 1
    # The service hears SIGTERM by itself; the others are passed on to it.
    numbers = (signal.SIGINT, signal.SIGHUP) + (() if several else (signal.SIGTERM,))
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    caught: list[str] = []
    questions, agreed = itertools.count(1), False

    def handler(number: int, _) -> None:
        caught.append(signal.Signals(number).name)
        for heard in before:
            signal.signal(heard, signal.SIG_DFL)
        # Not through sys.stderr, which may be in the middle of another message.
        os.write(2, f"{caught[0]}: saving after this step; once more ends at once\n".encode())
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def stopping() -> str:
        nonlocal agreed
        if not several:
            return caught[0] if caught else ""
        # The service says so once only.
        agreed = agreed or multihost_utils.reached_preemption_sync_point(next(questions))
        return (caught or ["SIGTERM"])[0] if agreed else ""

    try:
        for number in before:
            signal.signal(number, handler)
        yield stopping
    finally:
        for number, action in before.items():
            signal.signal(number, action)
