"""Text files of others: which of them a path means, and what they say.

A path that exists is taken as it is, whatever characters its name has; else it is read as a glob.
Below a folder, and in a glob, each file counts once, hidden ones do not count, and what is left out
is said. Paths may be local or of any storage that etils.epath knows (gs://, s3://).
"""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from etils import epath

from rwkvx_jax.config import ConfigError

_log = logging.getLogger(__name__)
BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"


def find_files(path: str | os.PathLike, suffix: str, *, what: str = "data") -> list[epath.Path]:
    """The files that a path means, in the order of their paths.

    Args:
      path: a file; a folder, for all files below it that end in `suffix`, in upper or lower case;
        or a glob.
      suffix: such as ".txt".
      what: what the files are for, in messages.

    Raises:
      ConfigError: there are none.
    """
    root, left_out = epath.Path(path), _LeftOut()
    if "**" in str(path) and not _is_local(root):
        raise ConfigError(f'"**" does not work in {path}: name its directory instead')
    try:
        is_folder = root.is_dir()
    except ImportError as error:  # the package of a storage
        raise ConfigError(f"{path} can't be read: {error}") from error
    if is_folder:
        found, wanted = _below(root, suffix, left_out), f"*{suffix} below {path}"
    elif root.exists():
        return [root]
    elif _is_glob(str(path)):
        found, wanted = _matching(str(path), left_out), str(path)
    else:
        raise ConfigError(f"{what} file {path} does not exist: name a file, a folder or a pattern")
    files = _once(found, left_out)
    if not files:
        raise ConfigError(f"no {what} file matches {wanted}{left_out}")
    if left_out.examples:
        _log.warning("%s: %d files%s", path, len(files), left_out)
    return files


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors put before it.

    Raises:
      ConfigError: not UTF-8 (with the byte).
      OSError: it can't be read.
    """
    return decode(epath.Path(path).read_bytes(), path)


def decode(data: bytes, path: str | os.PathLike, begin: int = 0) -> str:
    """Text of the bytes of a file from `begin` on, as `read_text` gives it.

    Raises:
      ConfigError: not UTF-8 (with the byte).
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not valid UTF-8: {error.reason} at byte {begin + error.start}"
        ) from error
    return text.removeprefix(BYTE_ORDER_MARK) if begin == 0 else text


class _LeftOut:
    """Files that were passed over: how many for each reason, and the first of them."""

    def __init__(self):
        self.examples: dict[str, epath.Path] = {}
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, reason: str, path: epath.Path) -> None:
        self._counts[reason] += 1
        self.examples.setdefault(reason, path)

    def __str__(self) -> str:
        """Such as "; left out: 2 hidden (as a/.b)", or ""."""
        parts = [f"{n} {why} (as {self.examples[why]})" for why, n in self._counts.items()]
        return f"; left out: {', '.join(parts)}" if parts else ""


def _below(folder: epath.Path, suffix: str, left_out: _LeftOut) -> Iterator[epath.Path]:
    """Files of a folder and the folders in it; a folder that links lead to again is read once."""
    seen, folders = set(), [folder]
    while folders:
        folder = folders.pop()
        if (place := _place(folder)) in seen:
            continue
        seen.add(place)
        deeper, linked = [], []
        for entry in sorted(folder.iterdir()):
            matches = entry.suffix.lower() == suffix
            if entry.name.startswith("."):
                left_out.add("hidden", entry)
            elif matches and _is_file(entry):
                yield entry
            elif entry.is_dir():
                (linked if Path(entry).is_symlink() else deeper).append(entry)
            else:
                left_out.add("no file" if matches else f"not {suffix}", entry)
        # Links come last: files keep their own names.
        folders = [*reversed(linked), *folders, *reversed(deeper)]


def _matching(pattern: str, left_out: _LeftOut) -> Iterator[epath.Path]:
    """Files that match a glob; a folder before the first wildcard may have any name."""
    base = epath.Path(pattern)
    pattern = str(base)
    while _is_glob(str(base)) and not (_is_local(base) and base.is_dir()):
        base = base.parent
    if str(base) != ".":
        pattern = pattern.removeprefix(str(base)).lstrip("/")
    try:
        found = list(Path(base).glob(pattern) if _is_local(base) else base.glob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"{base}/{pattern} is no pattern of files: {error}") from error
    for path in map(epath.Path, found):
        if path.is_dir():
            continue
        if any(part.startswith(".") for part in path.relative_to(base).parts):
            left_out.add("hidden", path)
        elif _is_file(path):
            yield path
        else:
            left_out.add("no file", path)


def _is_glob(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def _once(files: Iterable[epath.Path], left_out: _LeftOut) -> list[epath.Path]:
    """Sorted, each file under its first name."""
    places: dict[str, epath.Path] = {}
    for file in sorted(files):
        if places.setdefault(_place(file), file) != file:
            left_out.add("linked again", file)
    return list(places.values())


def _is_local(path: epath.Path) -> bool:
    return "://" not in str(path)


def _is_file(path: epath.Path) -> bool:
    """False for pipes, devices and links to nowhere; a bucket, which has none, is not asked."""
    return not _is_local(path) or os.path.isfile(path)


def _place(path: epath.Path) -> str:
    return os.path.realpath(path) if _is_local(path) else str(path)
