"""Binidx files of a cache: one process writes them, whole or not at all, and the others wait.

The index appears last: whoever sees it sees a complete file, with its hashes beside it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rwkvx_jax.config import ConfigError
from rwkvx_jax.data.binidx import Binidx, binidx_file, write_index
from rwkvx_jax.data.hashes import check_hashes, hash_files, write_hashes
from rwkvx_jax.storage import new_file

STALLED = 600.0
"""Seconds without any progress of the writing process that are an error."""
_POLL = 0.5  # seconds between looks at what it writes


def open_stored(
    prefix: Path,
    make: Callable[[], None],
    *,
    writer: bool,
    full_check: bool,
    remedy: str,
    stalled: float = STALLED,
) -> Binidx:
    """A file of the cache, made now if need be, compared with its hashes.

    Args:
      prefix: path without extension.
      make: writes the files unless they are complete.
      writer: False on all but one process of a job with a common cache: waits for the writer.
      full_check: compares every byte with what was stored, not samples alone.
      remedy: what to do about files that differ.
      stalled: seconds without progress after which waiting is given up.

    Raises:
      ConfigError: a file that is not what was stored, or a writer that doesn't come forward.
    """
    if writer:
        make()
    else:
        _wait(prefix, stalled)
    stream = Binidx(prefix)
    hashes = binidx_file(prefix, "hash")
    check_hashes(prefix, hashes, full=full_check, write=False, remedy=remedy)
    return stream


def is_complete(index: Path) -> bool:
    """A cache without hashes can't be trusted, and is made again."""
    return index.exists() and index.with_suffix(".hash").exists()


def remove_old(prefix: Path) -> None:
    """To be called before new files are written: nobody may take these for the old ones."""
    for part in ("idx", "hash", "mask"):
        binidx_file(prefix, part).unlink(missing_ok=True)


def finish(prefix: Path, sizes: np.ndarray, dtype: np.dtype) -> None:
    """Writes hashes and index to the .bin and .mask files that are there.

    Args:
      prefix: path without extension.
      sizes: tokens of each document, int64.
      dtype: integer type of the .bin file.
    """
    files = {part: binidx_file(prefix, part) for part in ("bin", "mask")}
    with new_file(binidx_file(prefix, "idx")) as index:
        write_index(index, sizes, dtype)
        index.flush()
        written = {part: path for part, path in files.items() if path.exists()}
        written["idx"] = Path(index.name)
        hashes = hash_files(written, full=True, label=str(prefix))
        write_hashes(binidx_file(prefix, "hash"), hashes)


def _wait(prefix: Path, stalled: float) -> None:
    """Waits until another process has written the index."""
    index = binidx_file(prefix, "idx")
    folder, seen, since = index.with_suffix(".parts"), None, time.monotonic()
    while not is_complete(index):
        state = _state(folder, index)
        if state != seen:
            seen, since = state, time.monotonic()
        if time.monotonic() - since > stalled:
            raise ConfigError(
                f"waited {stalled:.0f} s for process 0 to write {index}: data.cache_dir must lie "
                "on storage that all hosts share; otherwise set data.cache_per_host"
            )
        time.sleep(_POLL)


def _state(folder: Path, index: Path) -> list[tuple[str, int]]:
    """Names and sizes of the files that are being written: of the parts, and where they join."""
    found = []
    for directory, beginning in ((folder, ""), (index.parent, f"{index.stem}.")):
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(directory):
                with contextlib.suppress(FileNotFoundError):
                    if entry.name.startswith(beginning):
                        found.append((entry.name, entry.stat().st_size))
    return sorted(found)
