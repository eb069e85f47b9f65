"""Lazy tensors: what every checkpoint format of this room reads into and is written from.

A checkpoint is a dict from names to `LazyTensor`s, so that shapes are checked before any data is
read and a conversion holds one tensor at a time, whatever the size of the file. Rows along the
first axis can be read singly, because our layout stacks the layers which the official one keeps
apart. Formats are little endian, as is every machine that jax runs on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from rwkvx_jax.config import UserError
from rwkvx_jax.storage import bucket_errors, in_bucket, new_file, refuse_hub, work_path

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}
"""Dtypes of parameters, by name."""

# Reading a description (a header, an index, a pickle) takes memory and time that grow with its
# length, by a factor that the file chooses. These limits are far above any RWKV checkpoint (the
# largest has about 3000 tensors) and keep a hostile file within seconds and tens of megabytes.
MOST_TENSORS = 1 << 15
LARGEST_JSON = 2 << 20
_MOST_DIMENSIONS = 32  # numpy has a limit as well
_LONGEST_NAME = 500


class ConversionError(UserError, ValueError):
    """A checkpoint that cannot be read, written or converted; the message says what to do."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose data is read on demand.

    Attributes:
      name: its name in the checkpoint.
      shape: sizes.
      dtype: numpy dtype; bfloat16 is `ml_dtypes.bfloat16`.
      load: reads all of it (None) or the given row along the first axis.
      by_rows: rows lie in separate places, so that reading them one by one saves memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[int | None], np.ndarray]
    by_rows: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def read(self, row: int | None = None) -> np.ndarray:
        """The data as a contiguous array: all of it, or one row along the first axis."""
        return np.asarray(self.load(row), order="C")

    def pieces(self) -> Iterator[np.ndarray]:
        """The data in order, in as many pieces as keep memory low."""
        if self.by_rows:
            yield from (self.read(row) for row in range(self.shape[0]))
        else:
            yield self.read()


def from_array(name: str, array: Any) -> LazyTensor:
    """A view of an array in memory (numpy or jax; a jax array is fetched row by row)."""

    def load(row):
        return np.asarray(array if row is None else array[row])

    by_rows = not isinstance(array, np.ndarray) and array.ndim > 1
    return LazyTensor(name, tuple(array.shape), np.dtype(array.dtype), load, by_rows)


def as_lazy(tensors: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Lazy tensors of a mapping that may hold arrays, lazy tensors or both."""
    return {
        name: value if isinstance(value, LazyTensor) else from_array(name, value)
        for name, value in tensors.items()
    }


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`array` in `dtype`.

    Raises:
      ConversionError: a finite value becomes infinite.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if np.isinf(result).any() and not np.isinf(array).any():
        raise ConversionError(
            f"{name} holds values up to {np.abs(array.astype(np.float64)).max():.3g}, too large "
            f"for {dtype.name}: choose another dtype"
        )
    return result


def in_dtype(tensors: Mapping[str, LazyTensor], dtype: np.dtype | None) -> dict[str, LazyTensor]:
    """The same tensors, cast as they are read; None leaves them as they are."""
    if dtype is None:
        return dict(tensors)

    def converted(tensor: LazyTensor) -> LazyTensor:
        def load(row):
            return cast(tensor.load(row), dtype, tensor.name)

        return dataclasses.replace(tensor, dtype=np.dtype(dtype), load=load)

    return {name: converted(tensor) for name, tensor in tensors.items()}


def tracked(
    tensors: Mapping[str, LazyTensor], seen: Callable[[str, np.ndarray], None]
) -> dict[str, LazyTensor]:
    """The same tensors; each reading calls `seen(name, array)`."""

    def track(tensor: LazyTensor) -> LazyTensor:
        def load(row):
            array = tensor.load(row)
            seen(tensor.name, array)
            return array

        return dataclasses.replace(tensor, load=load)

    return {name: track(tensor) for name, tensor in tensors.items()}


def check_tensor(name: str, shape: Sequence[int], dtype: np.dtype) -> None:
    """Checks the description of a tensor that a file gives.

    Raises:
      ConversionError: a name that can't be shown, or a shape that no memory can hold.
    """
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise ConversionError(f"a tensor has the name {name[:60]!r}, which no checkpoint uses")
    sizes = math.prod(max(1, size) for size in shape) if len(shape) <= _MOST_DIMENSIONS else None
    if sizes is None or sizes * dtype.itemsize >= 1 << 63:
        shown = tuple(shape[:8])
        raise ConversionError(f"{name} has the impossible shape {shown}: the file is damaged")


def check_count(tensors: int) -> None:
    """Raises ConversionError for more tensors than any model here has."""
    if tensors > MOST_TENSORS:
        raise ConversionError(
            f"it describes {tensors} tensors; no model that can be read here has more than "
            f"{MOST_TENSORS}"
        )


def parse_json(data: bytes, largest: int = LARGEST_JSON) -> Any:
    """The value of a JSON text from a file.

    Raises:
      ConversionError: not JSON, a key that occurs twice in one object, or more than `largest`
        bytes, which no checkpoint needs.
    """
    if len(data) > largest:
        raise ConversionError(
            f"its JSON has {len(data)} bytes; no checkpoint that can be read here needs more than "
            f"{largest}"
        )
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"its JSON can't be read ({error})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def read_json(path: Path, largest: int = LARGEST_JSON) -> Any:
    """The value of a JSON file; see `parse_json`, whose errors here name the file."""
    try:
        with path.open("rb") as file:
            return parse_json(file.read(largest + 1), largest)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror or error}") from error


def refuse_pointer(start: bytes) -> None:
    """Raises ConversionError if a file starts as a Git LFS pointer does."""
    if start.startswith(b"version https://git-lfs"):
        raise ConversionError("it is a Git LFS pointer, not the file itself: run `git lfs pull`")


@contextlib.contextmanager
def written_whole(
    path: str | os.PathLike, accept: Callable[[], None] | None = None
) -> Iterator[BinaryIO]:
    """A file opened for writing that appears under `path` only once it is complete.

    Args:
      path: the file; one that is there already stays as it is until the end.
      accept: called at the end; if it raises, the file does not appear.

    Raises:
      ConversionError: no such directory, or the file can't be written (permissions, a full disk);
        nothing of it stays.
    """
    path = work_path(path)
    if not in_bucket(path) and not path.parent.is_dir():
        raise ConversionError(f"cannot write {path}: directory {path.parent} does not exist")
    try:
        refuse_hub(path)
        with bucket_errors(path):
            taken = path.is_dir()
        if taken:
            raise ConversionError(f"cannot write {path}: it is a directory")
        with new_file(path) as file:
            yield file
            if accept is not None:
                accept()
    except OSError as error:  # of the destination: readers raise ConversionError
        raise ConversionError(f"cannot write {path}: {error.strerror or error}") from error


def write_data(file: BinaryIO, tensor: LazyTensor, digest: Any = None) -> None:
    """Writes a tensor's data, row by row where that saves memory.

    Args:
      file: open for writing.
      tensor: read once.
      digest: a hash of hashlib that the bytes written are added to.

    Raises:
      ConversionError: the data is not of the size that the tensor declared.
    """
    written = 0
    for piece in tensor.pieces():
        if piece.dtype != tensor.dtype:
            raise ConversionError(
                f"{tensor.name} was declared as {tensor.dtype} but reads as {piece.dtype}"
            )
        data = piece.reshape(-1).view(np.uint8)
        file.write(memoryview(data))
        if digest is not None:
            digest.update(memoryview(data))
        written += data.nbytes
        del piece, data  # before the next one is read
    if written != tensor.nbytes:
        raise ConversionError(f"{tensor.name} has {written} bytes instead of {tensor.nbytes}")
