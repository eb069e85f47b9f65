"""Hashes of binidx files: what was stored is what is read.

`NAME.hash`, JSON, holds for each of `.bin`, `.idx` and `.mask` its size, a hash of samples of it
and one of all of it. It is written with the files that this project makes. For a file of others,
its first use leaves such a record with the run's data, and later uses are compared with that.

The samples are 256 blocks of 256 KiB spread evenly over a file, the first and the last bytes among
them; a file of up to 64 MiB is hashed whole. So a check reads at most 64 MiB a file, however large
it is, and finds what was overwritten, replaced or cut in a stretch of 1/255 of the file or more.
Only the hash of everything (`data.verify="full"`) finds a single wrong byte in any file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from rwkvx_jax import progress
from rwkvx_jax.config import ConfigError
from rwkvx_jax.data.binidx import binidx_file
from rwkvx_jax.storage import new_file

_log = logging.getLogger(__name__)
_FORMAT = 1
_SAMPLES, _SAMPLE_BYTES = 256, 1 << 18
_BLOCK = 1 << 24
_PARTS = ("bin", "idx", "mask")

Hashes = dict[str, dict[str, int | str]]  # {"bin": {"bytes": ..., "samples": ..., "sha256": ...}}


def hash_files(paths: dict[str, Path], *, full: bool, label: str = "") -> Hashes:
    """Hashes of files by their part's name: "sha256" of all bytes only if `full`.

    Args:
      paths: such as {"bin": Path("x.bin")}.
      full: reads the files whole.
      label: name for a progress bar, which a long work gets.

    Raises:
      OSError: a file can't be read.
    """
    hashes: Hashes = {}
    total = sum(path.stat().st_size for path in paths.values()) if full else 0
    with progress.of_bytes(f"hashing {label}", total) as bar:
        for part, path in paths.items():
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                hashes[part] = {"bytes": size, "samples": _sha256(file.fileno(), _places(size))}
                if full:
                    everything = ((i, min(_BLOCK, size - i)) for i in range(0, size, _BLOCK))
                    hashes[part]["sha256"] = _sha256(file.fileno(), everything, bar.advance)
    return hashes


def write_hashes(path: Path, hashes: Hashes) -> None:
    """Writes a hash file.

    Raises:
      OSError: it can't be written.
    """
    with new_file(path) as file:
        file.write(json.dumps({"format": _FORMAT, "files": hashes}, indent=1).encode())


def check_hashes(prefix: Path, record: Path | None, *, full: bool, write: bool, remedy: str):
    """Compares the files of a binidx source with the hashes that were taken of them.

    Args:
      prefix: the files' path without extension.
      record: the hash file; where there is none yet, or none of all bytes, what is found is
        recorded. None: there is no place for one, and nothing to compare with.
      full: compares all bytes.
      write: whether this process may write the record.
      remedy: what to do about files that differ.

    Raises:
      ConfigError: files that are not those that were recorded, or a record that can't be read.
      OSError: a file can't be read, or the record can't be written.
    """
    if record is None:
        return
    paths = {part: binidx_file(prefix, part) for part in _PARTS}
    paths = {part: path for part, path in paths.items() if path.exists()}
    known = _read_record(record) if record.exists() else None
    if known is not None and set(known) != set(paths):
        names = sorted(binidx_file(prefix, part).name for part in set(known) ^ set(paths))
        raise ConfigError(f"{prefix}: {names[0]} appeared or went since it was stored; {remedy}")
    found = hash_files(paths, full=full, label=str(prefix))
    for part, path in paths.items() if known is not None else ():
        if any(known[part].get(name, value) != value for name, value in found[part].items()):
            raise ConfigError(
                f"{path} does not hold what was stored: its hash is another than in {record}; "
                f"{remedy}"
            )
    new = known is None or any("sha256" not in known[part] for part in found) and full
    if new and write:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_hashes(record, found)
        _log.info("%s: first use, its hashes are kept in %s", prefix, record)


def _read_record(path: Path) -> Hashes:
    try:
        record = json.loads(path.read_bytes())
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']}")
        return {part: dict(hashes) for part, hashes in record["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is no hash file ({error}): remove it if you trust the files it is of"
        ) from error


def _places(size: int) -> Iterator[tuple[int, int]]:
    """Start and length of the sampled blocks of a file."""
    if size <= _SAMPLES * _SAMPLE_BYTES:
        yield 0, size
        return
    for start in np.linspace(0, size - _SAMPLE_BYTES, _SAMPLES, dtype=np.int64):
        yield int(start), _SAMPLE_BYTES


def _sha256(
    descriptor: int,
    places: Iterator[tuple[int, int]],
    advance: Callable[[int], None] = lambda size: None,
) -> str:
    digest = hashlib.sha256()
    for start, count in places:
        while count and (data := os.pread(descriptor, min(count, _BLOCK), start)):
            digest.update(data)
            advance(len(data))
            start, count = start + len(data), count - len(data)
    return digest.hexdigest()
