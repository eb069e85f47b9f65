"""Lazy tensors: what every checkpoint format of this room reads into and is written from.

A checkpoint is a dict from names to `LazyTensor`s, so that shapes are checked before any data is
read and a conversion holds one tensor at a time, whatever the size of the file. Rows along the
first axis can be read singly, because our layout stacks the layers which the official one keeps
apart. Formats are little endian, as is every machine that jax runs on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from rwkvx_jax.config import UserError

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}
"""Dtypes of parameters, by name."""


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
    tensors: Mapping[str, LazyTensor], advance: Callable[[str, int], None]
) -> dict[str, LazyTensor]:
    """The same tensors; each reading calls `advance(name, bytes read)`."""

    def track(tensor: LazyTensor) -> LazyTensor:
        def load(row):
            array = tensor.load(row)
            advance(tensor.name, array.nbytes)
            return array

        return dataclasses.replace(tensor, load=load)

    return {name: track(tensor) for name, tensor in tensors.items()}


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file opened for writing that appears under `path` only once it is complete.

    It is written beside its destination and renamed at the end; whatever fails in between removes
    it, and a file that was there before stays as it was.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ConversionError(f"cannot write {path}: directory {path.parent} does not exist")
    if path.is_dir():
        raise ConversionError(f"cannot write {path}: it is a directory")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_data(file: BinaryIO, tensor: LazyTensor) -> None:
    """Writes a tensor's data, row by row where that saves memory.

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
        written += data.nbytes
        del piece, data  # before the next one is read
    if written != tensor.nbytes:
        raise ConversionError(f"{tensor.name} has {written} bytes instead of {tensor.nbytes}")
