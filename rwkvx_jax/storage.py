"""Files that outlive a process: each has one writer at a time, and appears whole or not at all.

Locks are those of the operating system, through `filelock`: they hold among processes of one
machine, and on network file systems that implement flock; a process that dies frees its own. A
bucket (gs://) has none: there the caller sees to it that one job writes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import filelock

from rwkvx_jax.config import ConfigError

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def exclusive(lock: Path, *, busy: str | None = None) -> Iterator[None]:
    """Lets one process at a time into the block.

    Args:
      lock: file that the lock is kept on; created with its folder if need be; it stays there.
      busy: the error for a lock that another process holds; None: wait for it.

    Raises:
      ConfigError: `busy`.
      OSError: the file can't be created.
    """
    if not isinstance(lock, Path):  # in a bucket
        yield
        return
    held = filelock.FileLock(lock, timeout=-1 if busy is None else 0, fallback_to_soft=False)
    try:
        held.acquire()
    except filelock.Timeout as error:
        raise ConfigError(busy) from error
    except (NotImplementedError, OSError) as error:
        if not lock.exists():  # it could not even be created
            raise
        _warn_without_lock(lock, str(error))
    try:
        yield
    finally:
        held.release()


@functools.cache
def _warn_without_lock(lock: Path, error: str) -> None:
    _log.warning("%s can't be locked (%s): start one process only", lock, error)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when the block ends without error, and is complete then.

    Raises:
      OSError: it can't be written; nothing of it stays.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Replaces what `path` holds by `data`, all of it or nothing, also in a bucket.

    Raises:
      OSError: it can't be written.
    """
    if not isinstance(path, Path):  # an object of a bucket appears when it is complete
        path.write_bytes(data)
        return
    with new_file(path) as file:
        file.write(data)
