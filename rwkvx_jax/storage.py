"""Files that outlive a process: each has one writer at a time, and appears whole or not at all.

Locks are those of the operating system, through `filelock`: they hold among processes of one
machine, and on network file systems that implement flock; a process that dies frees its own. A
bucket (gs://) has none: there the caller sees to it that one job writes. A path in a bucket is an
`epath.Path`, and every failure there is an OSError, whatever the client raises.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import filelock
import tyro
from etils import epath

from rwkvx_jax.config import ConfigError

_log = logging.getLogger(__name__)

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # file systems
_COPIED_AT_ONCE = 16 << 20  # bytes


def work_path(path: str | os.PathLike) -> Path:
    """A path as given: on a disk, or an `epath.Path` of a bucket (gs://) or of the Hub (hf://)."""
    if "://" not in os.fspath(path):
        return Path(path)
    # It logs a traceback for every failure that it raises as well.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return epath.Path(path)


def in_hub(path: Path) -> bool:
    """Whether a `work_path` is one of the Hugging Face Hub, from which checkpoints are read."""
    return os.fspath(path).startswith("hf://")


def in_bucket(path: Path) -> bool:
    """Whether a `work_path` is none of a disk."""
    return not isinstance(path, Path)


WorkPath = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda texts: work_path(texts[0]),
        is_instance=lambda value: isinstance(value, Path | epath.Path),
        str_from_instance=lambda value: [os.fspath(value)],
    ),
]
"""The type of a flag that takes a path on a disk or in a bucket (pathlib would make gs:/ of it)."""


@contextlib.contextmanager
def bucket_errors(path: Path) -> Iterator[None]:
    """Makes what fails in a bucket an OSError: its clients raise what derives from Exception alone.

    Raises:
      OSError: names `path`, and says in one line what the client says. On a disk all stays as it
        is.
    """
    try:
        yield
    except ConfigError:
        raise
    except ImportError as error:
        raise OSError(f'{path} needs gcsfs: pip install "rwkvx-jax[gcs]" ({error})') from error
    except Exception as error:
        if not in_bucket(path):
            raise
        raise OSError(f"{path}: {one_line(error)}") from error


def refuse_hub(path: Path) -> None:
    """Raises OSError for a path of the Hub, which has no half-written repositories."""
    if in_hub(path):
        raise OSError(
            f"{path}: nothing is written to the Hub here; write to a folder and send it with "
            "`hf upload`"
        )


def files_below(folder: Path, suffix: str) -> list[Path]:
    """The files with a suffix in a folder and all folders in it, sorted."""
    if not in_bucket(folder):
        return sorted(folder.rglob(f"*{suffix}"))
    found = []  # epath refuses to glob so in a bucket, and its walk forgets the gs://
    for path in folder.iterdir():
        if path.is_dir():
            found += files_below(path, suffix)
        elif path.name.endswith(suffix):
            found.append(path)
    return sorted(found)


def one_line(error: BaseException) -> str:
    """The kind of an error and the beginning of what it says."""
    text = " ".join(str(error).split())
    kind = "" if type(error) is OSError and text else f"{type(error).__name__}: "
    return f"{kind}{text[:300]}".removesuffix(": ")


def make_folder(path: Path) -> None:
    """Makes a folder to write to, with those above it.

    A bucket knows no folders: an object is written there and removed again, so that a bucket that
    is not there or may not be written is told before any work.

    Raises:
      OSError: nothing can be written there.
    """
    refuse_hub(path)
    if not in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)
        return
    with bucket_errors(path):
        probe = path / f"write-test-{uuid.uuid4().hex[:8]}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
        except FileNotFoundError as error:
            raise OSError("there is no such bucket") from error
        probe.unlink()


def remove_folder(path: Path) -> None:
    """Removes a folder with everything in it, on a disk or in a bucket."""
    if in_bucket(path):
        path.rmtree()  # type: ignore[attr-defined]
    else:
        shutil.rmtree(path)


@contextlib.contextmanager
def exclusive(lock: Path, *, busy: str | None = None) -> Iterator[None]:
    """Lets one process at a time into the block.

    Args:
      lock: file that the lock is kept on; created with its folder if need be; it stays there.
      busy: the error for a lock that another process holds; None: wait for it.

    Raises:
      ConfigError: `busy`.
      OSError: the file can't be created or opened.
    """
    if in_bucket(lock):
        yield
        return
    held = filelock.FileLock(lock, timeout=-1 if busy is None else 0, fallback_to_soft=False)
    try:
        held.acquire()
    except filelock.Timeout as error:
        raise ConfigError(busy) from error
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _WITHOUT_LOCKS:
            raise  # it can't be opened: that tells nothing of who holds it
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

    For one in a bucket the block writes a temporary file, which is uploaded when it ends. A device
    or a pipe, such as /dev/stdout, is written as it is: a new file would take its place.

    Raises:
      OSError: it can't be written; nothing of it stays.
    """
    refuse_hub(path)
    if in_bucket(path):
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            file.seek(0)
            with bucket_errors(path), path.open("wb") as upload:
                shutil.copyfileobj(file, upload, _COPIED_AT_ONCE)
        return
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as file:
            yield file
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # writing knows no names
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Replaces what `path` holds by `data`, all of it or nothing, also in a bucket.

    Raises:
      OSError: it can't be written.
    """
    with new_file(path) as file:
        file.write(data)


def append(path: Path, text: str) -> None:
    """Adds text to a file, and it is on the disk when this returns.

    In a bucket, where nothing grows, all of the file is written again.

    Raises:
      OSError: it can't be written.
    """
    if in_bucket(path):
        with bucket_errors(path):
            before = path.read_bytes() if path.exists() else b""
        write_whole(path, before + text.encode())
        return
    try:
        with path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def size(path: Path) -> int:
    """Bytes of a file."""
    status = path.stat()
    return status.length if in_bucket(path) else status.st_size


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """The path itself, or that of a copy that lasts as long as the block, for readers of files.

    Of a folder in a bucket its files are copied, not the folders in it.

    Raises:
      OSError: it can't be read.
    """
    if not in_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="rwkvx-") as folder:
        with bucket_errors(path):
            copy = Path(folder, *path.parts[2:])  # so named that messages tell what it is
            folder_like = path.is_dir()
            copy.parent.mkdir(parents=True, exist_ok=True)
            if folder_like:
                copy.mkdir()
            for source in path.iterdir() if folder_like else [path]:
                if not folder_like or source.is_file():
                    target = copy / source.name if folder_like else copy
                    with source.open("rb") as remote, target.open("wb") as file:
                        shutil.copyfileobj(remote, file, _COPIED_AT_ONCE)
        yield copy
