"""Reads and writes torch's checkpoint files (`torch.save`) without torch.

Such a file is a zip archive: a pickle that describes the objects, and one entry of raw bytes for
each storage, none of them compressed. The pickle is read as data (see `pickled.py`), so nothing in
a file is ever executed. Data is read lazily, one tensor at a time.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkvx_jax.convert.pickled import Global, PickleError, read_pickle
from rwkvx_jax.convert.tensors import (
    DTYPES,
    ConversionError,
    LazyTensor,
    as_lazy,
    check_count,
    check_tensor,
    refuse_pointer,
    write_data,
    written_whole,
)

_STORAGES = {
    "FloatStorage": DTYPES["float32"],
    "BFloat16Storage": DTYPES["bfloat16"],
    "HalfStorage": DTYPES["float16"],
    "DoubleStorage": DTYPES["float64"],
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGES.items()}
_LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # pickled magic number
_ALIGNMENT = 64  # torch aligns storages to this, so that it can map the file into memory
_LOCAL_HEADER = 30  # bytes of a zip entry's header without its name and extra field
_READ_BYTES = 1 << 20
_ROOT = "archive"
# A torch pickle takes about 200 bytes for a tensor, and the archive about 80 for its entry.
_LARGEST_PICKLE = 8 << 20
_LARGEST_DIRECTORY = 3 << 20
_UNREADABLE_FLAGS = 0x61  # of a zip entry: encrypted, patched, strongly encrypted


class _Storage(NamedTuple):
    dtype: np.dtype
    entry: str  # name in the archive
    size: int  # elements


class _View(NamedTuple):
    """A tensor as the pickle describes it: a strided view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def row(self, index: int) -> _View:
        return _View(
            self.storage,
            self.offset + index * self.strides[0],
            self.shape[1:],
            self.strides[1:],
        )

    @property
    def extent(self) -> int:
        """Elements from the first to the last one that the view touches."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(v) is int and v >= 0 for v in values)


def _rebuild_tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, meta=None):
    del requires_grad, hooks, meta
    if not (isinstance(storage, _Storage) and _whole_numbers((offset,))):
        raise PickleError("a tensor without a valid storage and offset")
    if not (_whole_numbers(shape) and _whole_numbers(strides) and len(shape) == len(strides)):
        raise PickleError("a tensor of shape or strides that are not whole numbers, one for each")
    check_tensor("a tensor", shape, storage.dtype)
    view = _View(storage, offset, shape, strides)
    if math.prod(shape) > storage.size:
        raise PickleError(
            f"a tensor of shape {shape} repeats its storage of {storage.size} elements: save it "
            "after .contiguous()"
        )
    if offset + view.extent > storage.size:
        raise PickleError(
            f"a tensor of shape {shape}, strides {strides} at offset {offset} does not fit into "
            f"its storage of {storage.size} elements"
        )
    return view


def _rebuild_parameter(data, requires_grad=False, hooks=None):
    del requires_grad, hooks
    if not isinstance(data, _View):
        raise PickleError("a parameter that is not a tensor")
    return data


def _ordered_dict():
    return {}


_CALLABLE = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}
_OPAQUE = {f"torch.{name}" for name in _STORAGES}


def _storage(archive: zipfile.ZipFile, root: str, pid: Any) -> _Storage:
    """The storage that a persistent id of a pickle means."""
    valid = isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"
    if not (valid and isinstance(pid[1], Global) and isinstance(pid[2], str)):
        raise PickleError("an unknown kind of storage")
    dtype = _STORAGES.get(pid[1].name.removeprefix("torch."))
    entry, size = f"{root}/data/{pid[2]}", pid[4]
    if dtype is None or not _whole_numbers((size,)):
        raise PickleError(f"a storage of type {pid[1].name} and {size!r:.60} elements")
    found = archive.NameToInfo.get(entry)
    if found is None:
        raise ConversionError(f"its entry {entry!r:.200} is missing: the file is incomplete")
    if found.file_size != size * dtype.itemsize:
        raise ConversionError(
            f"its entry {entry} has {found.file_size} bytes, but {size} elements of {dtype} "
            f"need {size * dtype.itemsize}: the file is damaged"
        )
    return _Storage(dtype, entry, size)


def open_pth(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """Lazy tensors of a torch checkpoint (a zip that holds one dict of tensors).

    Strided views, offsets, shared storages and `torch.nn.Parameter`s are understood. Nothing in
    the file is executed.

    Args:
      path: a file written by `torch.save` since torch 1.6.

    Returns:
      Tensors by name, in the file's order.

    Raises:
      ConversionError: not such a file, damaged, or holding anything but tensors.
    """
    path = Path(path)
    with _named_errors(path):
        archive = _open_archive(path)
        root = _archive_root(archive)
        if _small_entry(archive, f"{root}/byteorder", 16) not in (None, b"little"):
            raise ConversionError("it was written on a big-endian machine: re-save it on another")
        description = _small_entry(archive, f"{root}/data.pkl", _LARGEST_PICKLE)
        content = read_pickle(
            description, _CALLABLE, _OPAQUE, lambda pid: _storage(archive, root, pid)
        )
        views = _checked_content(content)
        _check_total(views, path.stat().st_size)
        return {name: _lazy(path, archive, name, view) for name, view in views.items()}


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Says in every error which file is meant."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, EOFError, ValueError, struct.error, NotImplementedError) as error:
        raise ConversionError(
            f"{path}: {error}. It is truncated or damaged (or was saved with torch's crc32 option "
            "off); fetch or save it again"
        ) from error


class _Bounded(io.BufferedReader):
    """A file for zipfile, which reads its whole list of entries at once, however long."""

    largest_read = _LARGEST_DIRECTORY

    def read(self, size: int = -1, /) -> bytes:
        if size > self.largest_read:
            raise ConversionError(
                f"its list of entries has {size} bytes; no checkpoint that can be read here needs "
                f"more than {_LARGEST_DIRECTORY}"
            )
        return super().read(size)


def _open_archive(path: Path) -> zipfile.ZipFile:
    """The archive, its entries checked: each once, whole, and neither compressed nor encrypted."""
    with path.open("rb") as file:
        start = file.read(64)
        size = os.fstat(file.fileno()).st_size
    refuse_pointer(start)
    if start.startswith(_LEGACY_START):
        raise ConversionError(
            "it is in torch's format of before version 1.6: where torch is installed, re-save it "
            "with torch.save(torch.load(path, weights_only=True), path)"
        )
    if not zipfile.is_zipfile(path):
        truncated = "it starts as a zip archive but has no end: it is truncated"
        other = "it is not a zip archive, hence no torch checkpoint"
        raise ConversionError(truncated if start.startswith(b"PK\x03\x04") else other)
    file = _Bounded(io.FileIO(path))
    archive = zipfile.ZipFile(file)
    file.largest_read = sys.maxsize
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _UNREADABLE_FLAGS:
            raise ConversionError(
                f"its entry {entry.filename[:60]!r} is compressed or encrypted, which torch never "
                "does: re-save it with torch.save"
            )
        sizes = {entry.file_size, entry.compress_size}
        if len(sizes) > 1 or not 0 <= entry.header_offset <= size - entry.file_size:
            raise ConversionError(f"its entry {entry.filename[:60]!r} is truncated or damaged")
    if len(archive.NameToInfo) != len(archive.infolist()):
        raise ConversionError("two of its entries have the same name: the file is damaged")
    return archive


def _small_entry(archive: zipfile.ZipFile, name: str, limit: int) -> bytes | None:
    """The bytes of an entry that is read whole; None if there is none."""
    entry = archive.NameToInfo.get(name)
    if entry is None:
        return None
    if entry.file_size > limit:
        raise ConversionError(
            f"its entry {name} has {entry.file_size} bytes; no checkpoint that can be read here "
            f"needs more than {limit}"
        )
    with archive.open(entry) as file:
        return file.read()


def _archive_root(archive: zipfile.ZipFile) -> str:
    roots = [n.removesuffix("/data.pkl") for n in archive.namelist() if n.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ConversionError("it is a zip archive but no torch checkpoint (no data.pkl in it)")
    return roots[0]


def _checked_content(content: Any) -> dict[str, _View]:
    if not isinstance(content, dict):
        raise ConversionError(f"it holds a {type(content).__name__}, not a dict of tensors")
    wrong = [
        f"{key!r:.60}: {type(value).__name__}"
        for key, value in content.items()
        if not (isinstance(key, str) and isinstance(value, _View))
    ]
    if wrong:
        shown = ", ".join(wrong[:8]) + (", ..." if len(wrong) > 8 else "")
        raise ConversionError(
            f"it holds more than tensors ({shown}): save the plain state_dict by itself"
        )
    check_count(len(content))
    for name, view in content.items():
        check_tensor(name, view.shape, view.storage.dtype)
    return content


def _check_total(views: Mapping[str, _View], size: int) -> None:
    """Tensors may share a storage (tied embeddings do), but not all of them one and the same."""
    total = sum(math.prod(view.shape) * view.storage.dtype.itemsize for view in views.values())
    if total > 2 * size:
        raise ConversionError(
            f"its tensors have {total} bytes in all, but the file {size}: too many of them share "
            "their storage; save copies of them"
        )


def _lazy(path: Path, archive: zipfile.ZipFile, name: str, view: _View) -> LazyTensor:
    def load(row):
        with _named_errors(path):
            return _read_view(archive, view if row is None else view.row(row))

    return LazyTensor(name, view.shape, view.storage.dtype, load)


def _read_view(archive: zipfile.ZipFile, view: _View) -> np.ndarray:
    """Reads the part of the storage that the view spans; zipfile checks the sum of a whole one."""
    dtype = view.storage.dtype
    data = np.empty(view.extent * dtype.itemsize, np.uint8)
    with archive.open(view.storage.entry) as file:
        file.seek(view.offset * dtype.itemsize)
        done = 0
        while done < data.size:
            piece = file.read(min(_READ_BYTES, data.size - done))
            if not piece:
                raise EOFError(f"entry {view.storage.entry} ends too early")
            data[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)
    strides = tuple(s * dtype.itemsize for s in view.strides)
    if view.extent == 0:
        return np.empty(view.shape, dtype)
    return np.lib.stride_tricks.as_strided(data.view(dtype), view.shape, strides)


def write_pth(
    path: str | os.PathLike, tensors: Mapping[str, Any], accept: Callable[[], None] | None = None
) -> None:
    """Writes a dict of tensors that `torch.load(path, weights_only=True)` reads.

    Tensors are read and written one at a time; the file appears only when it is complete.

    Args:
      path: destination.
      tensors: arrays or lazy tensors by name.
      accept: called when all is written; if it raises, the file does not appear.

    Raises:
      ConversionError: a dtype that torch's plain storages lack, or an unwritable destination.
    """
    tensors = as_lazy(tensors)
    for tensor in tensors.values():
        if tensor.dtype not in _STORAGE_NAMES:
            raise ConversionError(f"{path}: {tensor.name} is {tensor.dtype}: cast it to float32")
    with (
        written_whole(path, accept) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        _write_entry(archive, "byteorder", b"little")
        for key, tensor in enumerate(tensors.values()):
            with archive.open(_aligned(file.tell(), f"data/{key}", tensor.nbytes), "w") as entry:
                write_data(entry, tensor)
        _write_entry(archive, "data.pkl", _pickle(tensors))
        _write_entry(archive, "version", b"3\n")


def _write_entry(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(f"{_ROOT}/{name}"), data)


def _aligned(position: int, name: str, size: int) -> zipfile.ZipInfo:
    """Entry header whose padding lets the data start at a multiple of the alignment."""
    info = zipfile.ZipInfo(f"{_ROOT}/{name}")
    info.file_size = size  # lets zipfile choose the 64-bit header where it is needed
    wide_header = 20 if size * 1.05 > zipfile.ZIP64_LIMIT else 0
    start = position + _LOCAL_HEADER + len(info.filename) + wide_header + 4
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return info


def _pickle(tensors: Mapping[str, LazyTensor]) -> bytes:
    """The description of the tensors, as protocol 2 opcodes (torch's classes are only named)."""
    parts = [pickle.PROTO + b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for key, (name, tensor) in enumerate(tensors.items()):
        strides = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
        parts += [
            _constant(name),
            _global("torch._utils", "_rebuild_tensor_v2"),
            pickle.MARK,
            pickle.MARK,
            _constant("storage"),
            _global("torch", _STORAGE_NAMES[tensor.dtype]),
            _constant(str(key)) + _constant("cpu") + _constant(tensor.size),
            pickle.TUPLE + pickle.BINPERSID,
            _constant(0) + _constant(tensor.shape) + _constant(strides) + _constant(False),
            _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
            pickle.TUPLE + pickle.REDUCE,
        ]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _constant(value: Any) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]  # without the protocol mark and the stop


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
