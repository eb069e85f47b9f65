"""Records: JSON lines that a process appends while it works, and never a number that is not finite.

A line is appended whole, under the lock of its file, so a process that is killed leaves at most one
half line, the last. Whoever writes next cuts that off, says so, and keeps the file as it was beside
it. Python's own writer puts NaN and Infinity into files, which are then no JSON, and its reader
takes them back without a word; here the one refuses them, and the other says where they stand.
"""

from __future__ import annotations

import bisect
import contextlib
import gzip
import itertools
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rwkvx_jax.config import ConfigError
from rwkvx_jax.storage import append, bucket_errors, exclusive, in_bucket, write_whole

_log = logging.getLogger(__name__)

Record = dict[str, Any]

SUFFIX, PACKED_SUFFIX = ".jsonl", ".jsonl.gz"
NOT_FINITE_REMEDY = (
    "nothing of it is stored; the parameters are damaged, or numbers overflow in this compute dtype"
)
_REMEDY = "remove the file, or use another --output"


def not_finite(value: Any, name: str = "") -> str:
    """Name of the first number of a JSON value that is NaN or infinite, "" where there is none.

    Args:
      value: dicts, lists, tuples, strings and numbers.
      name: of the value itself; parts are named as in models[0].losses[3].
    """
    if isinstance(value, float):
        return "" if math.isfinite(value) else name or "the number"
    if isinstance(value, dict):
        parts = ((part, f"{name}.{key}".lstrip(".")) for key, part in value.items())
    elif isinstance(value, list | tuple):
        parts = ((part, f"{name}[{i}]") for i, part in enumerate(value))
    else:
        return ""
    return next(filter(None, (not_finite(*part) for part in parts)), "")


def as_text(value: Any) -> str:
    """JSON of a value, on one line.

    Raises:
      ValueError: a number that is not finite; what stores values checks them before.
    """
    return json.dumps(value, allow_nan=False)


def parse(data: bytes | str, where: str, remedy: str = "mend it") -> Any:
    """The value that JSON stands for.

    Args:
      data: the JSON.
      where: names it in errors.
      remedy: what to do about one that is damaged.

    Raises:
      ConfigError: `where` is not JSON, or holds a number that is not finite.
    """
    try:
        value = json.loads(data)
        name = not_finite(value)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON ({error}): {remedy}") from error
    if name:
        raise ConfigError(f"{where}: {name} is not finite (NaN or infinity): {remedy}")
    return value


def read(path: Path, remedy: str = _REMEDY) -> list[Any]:
    """The values of a file's lines; it may be compressed (.gz). Changes nothing.

    A half last line is left out with a warning.

    Raises:
      ConfigError: a line that is damaged.
      OSError: it can't be read.
    """
    data = read_bytes(path, remedy)
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        _log.warning("%s ends in half a line: it is left out", path)
    return list(_values(path, whole, 1, remedy))


def read_bytes(path: Path, remedy: str = _REMEDY) -> bytes:
    """What a file holds, unpacked if its name ends in .gz.

    Raises:
      ConfigError: a compressed file that is damaged.
      OSError: it can't be read.
    """
    with bucket_errors(path):
        data = path.read_bytes()
    if not path.name.endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is damaged ({error}): {remedy}") from error


def head(path: Path, size: int) -> bytes:
    """The first bytes of a file, unpacked if its name ends in .gz.

    Raises:
      ConfigError: a compressed file that is damaged.
      OSError: it can't be read.
    """
    with bucket_errors(path), path.open("rb") as file:
        if not path.name.endswith(".gz"):
            return file.read(size)
        try:
            return gzip.GzipFile(fileobj=file).read(size)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ConfigError(f"{path} is damaged ({error}): {_REMEDY}") from error


def _values(path: Path, whole: bytes, first: int, remedy: str) -> Iterator[Any]:
    for number, line in enumerate(whole.splitlines(), first):
        yield parse(line, f"{path}, line {number}", remedy)


class RecordFile:
    """A file of JSON lines to append to.

    Several processes may write one file, each under `locked`; `new` gives a process what the
    others have written meanwhile.

    Attributes:
      path: of the file.
    """

    def __init__(self, path: Path, remedy: str = _REMEDY):
        """
        Args:
          path: of the file.
          remedy: what to do about a damaged one.
        """
        self.path, self._remedy = path, remedy
        self._bytes = self._lines = 0  # read or written by this process

    @contextlib.contextmanager
    def locked(self, *, busy: str | None = None) -> Iterator[None]:
        """The only process at the file inside the block.

        Args:
          busy: the error if another one is; None: wait for it.

        Raises:
          ConfigError: `busy`.
          OSError: the lock can't be opened.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(self.path.with_name(f"{self.path.name}.lock"), busy=busy):
            yield

    def new(self, begins: bytes = b"") -> list[Any]:
        """The values of lines that this process has neither read nor written.

        Half a line at the end is cut off, as no one else writes under the lock.

        Args:
          begins: how a half line begins that is the only one: a file without any whole line that
            begins otherwise is not ours.

        Raises:
          ConfigError: a damaged line, a file of something else, or one that got shorter.
          OSError: it can't be read or cut.
        """
        data = self._unread()
        whole = data[: data.rfind(b"\n") + 1]
        rest = data[len(whole) :]
        if rest and not self._bytes and not whole and rest[: len(begins)] != begins[: len(rest)]:
            raise ConfigError(f"{self.path} exists but holds something else: {self._remedy}")
        values = list(_values(self.path, whole, self._lines + 1, self._remedy))
        self._bytes, self._lines = self._bytes + len(whole), self._lines + len(values)
        if rest:
            everything = self.path.read_bytes()
            kept = keep_aside(self.path, everything)
            write_whole(self.path, everything[: self._bytes])
            _log.warning(
                "%s ended in half a line, which is dropped; the file as it was is kept as %s",
                self.path,
                kept.name,
            )
        return values

    def _unread(self) -> bytes:
        with bucket_errors(self.path):
            if not self.path.exists():
                data, length = b"", 0
            elif in_bucket(self.path):
                everything = self.path.read_bytes()
                data, length = everything[self._bytes :], len(everything)
            else:
                with self.path.open("rb") as file:
                    length = file.seek(0, os.SEEK_END)
                    file.seek(self._bytes)
                    data = file.read()
        if length < self._bytes:
            raise ConfigError(f"{self.path} was replaced while it was in use: {self._remedy}")
        return data

    def append(self, values: Sequence[Any]) -> None:
        """Adds a line for each value.

        Raises:
          ValueError: a number that is not finite.
          OSError: it can't be written.
        """
        text = "".join(f"{as_text(value)}\n" for value in values)
        append(self.path, text)
        self._bytes, self._lines = self._bytes + len(text.encode()), self._lines + len(values)

    def upload(self, *, last: bool = False) -> None:
        """Nothing: what was appended is there (see `uploads.BucketLines`)."""


def keep_aside(path: Path, data: bytes) -> Path:
    """Keeps what a damaged file held beside it; returns the copy's path."""
    copies = (path.with_name(f"{path.name}.damaged-{n}") for n in itertools.count(1))
    copy = next(name for name in copies if not name.exists())
    write_whole(copy, data)
    return copy


def cut_back(path: Path, step: int) -> None:
    """Drops the lines of a file whose "step" is beyond `step`.

    A line that can't be read (of a full disk, or a machine that lost its power) is left out too,
    with a warning that says what is lost; the file as it was stays beside it.

    Raises:
      OSError: it can't be read or written.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    kept, lost, last = [], [], 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        found = _step_of(line)
        if found is not None and found > step:  # whole, or cut off by a kill
            continue
        if found is not None and line.endswith(b"\n") and _is_json(line):
            kept.append(line)
            last = found
        else:
            lost.append((number, last))
    if lost:
        _warn_of_lost_lines(path, data, lost, kept, step)
    if (new := b"".join(kept)) != data:
        write_whole(path, new)


def _step_of(line: bytes) -> int | None:
    """The step at the beginning of a record, whatever follows; None for anything else."""
    match = re.match(rb'\{"step": (\d+)[,}]', line)
    return None if match is None else int(match[1])


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _warn_of_lost_lines(
    path: Path, data: bytes, lost: list[tuple[int, int]], kept: list[bytes], step: int
) -> None:
    copy = keep_aside(path, data)
    steps = sorted({found for line in kept if (found := _step_of(line)) is not None} | {step + 1})
    for number, before in lost:
        after = steps[bisect.bisect_right(steps, before)]
        _log.warning(
            "%s, line %d can't be read: it is left out, and with it what it said of steps between "
            "%d and %d; the file as it was is kept as %s",
            path,
            number,
            before,
            after,
            copy.name,
        )


def last_with(path: Path, field: str) -> Record | None:
    """The last record of a file that has a field; None if there is none."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = (json.loads(line) for line in reversed(lines))
    return next((record for record in records if field in record), None)
