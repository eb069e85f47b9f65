"""The RWKV/Megatron binidx format: a stream of token ids with an index of its documents.

`NAME.bin` holds the raw ids of all documents one after the other, `NAME.idx` their sizes. Files
made by other tools are read in place. A third file, `NAME.mask`, is ours: one byte per token, 0
where the token does not count in the loss; without it all tokens count.

Files are read by `pread` and not through a memory map: where a file is cut short while in use,
a read comes back short and is an error here, whereas a map would kill the process (SIGBUS).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rwkvx_jax.config import ConfigError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_DTYPES = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_HEADER = len(_MAGIC) + 8 + 1 + 8 + 8
_SCAN_BLOCK = 1 << 24  # tokens
_PROBES, _PROBE_TOKENS = 64, 1024


def binidx_file(prefix: str | os.PathLike, extension: str) -> Path:
    """`NAME.bin`, `NAME.idx`, `NAME.mask` or such of a prefix, which may end in .bin or .idx."""
    path = Path(prefix)
    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    return path.with_name(f"{path.name}.{extension}")


class Binidx:
    """View of a binidx pair, read-only; may be read by several threads at once.

    Attributes:
      prefix: path without extension.
      dtype: integer type of the file.
      sizes: tokens of each document, int32 [number of documents].
      starts: place of each document's first token in the stream, int64.
      masked: whether a mask file lies beside it.
    """

    def __init__(self, prefix: str | os.PathLike):
        """Opens the files and checks that index and tokens belong together.

        Raises:
          ConfigError: a file that is absent, not of this format, shorter or longer than its index
            says, or whose documents do not follow one another.
        """
        index, tokens = binidx_file(prefix, "idx"), binidx_file(prefix, "bin")
        for path in (index, tokens):
            if not path.is_file():
                raise ConfigError(f"{path} does not exist: a binidx source needs .bin and .idx")
        self.prefix = index.with_suffix("")
        self.dtype, self.sizes, self.starts = _read_index(index)
        self._length = int(self.starts[-1]) + int(self.sizes[-1])
        self._tokens = _Array(tokens, self.dtype, self._length, index)
        mask = binidx_file(prefix, "mask")
        self.masked = mask.is_file()
        self._mask = _Array(mask, np.dtype(np.uint8), self._length, index) if self.masked else None

    def __len__(self) -> int:
        """Tokens of the stream."""
        return self._length

    def __reduce__(self):  # open files can't be pickled
        return Binidx, (str(self.prefix),)

    def read(self, start: int, count: int, dtype: type = np.int32) -> np.ndarray:
        """Tokens `start .. start + count` of the stream, [count] of `dtype`.

        Raises:
          ConfigError: the file became shorter since it was opened; so for all methods that read.
        """
        return self._tokens.read(start, count).astype(dtype)

    def read_mask(self, start: int, count: int) -> np.ndarray:
        """Their weights in the loss, float32 [count]: 1 or 0."""
        if self._mask is None:
            return np.ones(count, np.float32)
        return self._mask.read(start, count).astype(np.float32)

    def has_targets(self, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Whether any token counts in the loss, for each of several spans of the stream.

        Args:
          begins: int64 [N], ascending.
          ends: int64 [N], ascending.

        Returns:
          bool [N].
        """
        if self._mask is None:
            return ends > begins
        found = np.zeros(len(begins), bool)
        for start in range(0, self._length, _SCAN_BLOCK):
            stop = min(start + _SCAN_BLOCK, self._length)
            first, last = np.searchsorted(ends, start, "right"), np.searchsorted(begins, stop)
            if first >= last:
                continue
            low, high = (np.clip(edge[first:last], start, stop) - start for edge in (begins, ends))
            mask = np.append(self._mask.read(start, stop - start), np.uint8(0))
            # Every second of the stretches between these edges is a span.
            largest = np.maximum.reduceat(mask, np.stack([low, high], axis=1).ravel())[::2]
            found[first:last] |= (largest > 0) & (high > low)
        return found

    def fingerprint(self) -> dict[str, int | str]:
        """JSON-able identity: number of tokens, and a hash of the index and of tokens (and of the
        mask, where there is one) at places spread over the file, which may hold terabytes."""
        digest = hashlib.sha256(np.ascontiguousarray(self.sizes).tobytes())
        for start in np.linspace(0, self._length, _PROBES, endpoint=False, dtype=np.int64):
            count = min(_PROBE_TOKENS, self._length - int(start))
            digest.update(self.read(int(start), count).tobytes())
            if self._mask is not None:
                digest.update(self._mask.read(int(start), count).tobytes())
        return {"sha256": digest.hexdigest(), "tokens": self._length}

    def check_vocabulary(self, vocab_size: int) -> None:
        """Reads every token, unless the file's type can't hold a wrong one.

        Raises:
          ConfigError: a token below 0 or not below `vocab_size`, with its place.
        """
        limits = np.iinfo(self.dtype)
        if limits.min == 0 and limits.max < vocab_size:
            return
        for start in range(0, self._length, _SCAN_BLOCK):
            block = self._tokens.read(start, min(_SCAN_BLOCK, self._length - start))
            wrong = np.flatnonzero((block < 0) | (block >= vocab_size))
            if wrong.size:
                raise ConfigError(
                    f"{self.prefix}.bin: token {int(block[wrong[0]])} at position "
                    f"{start + int(wrong[0])} is outside the vocabulary of {vocab_size}"
                )


def write_index(file: BinaryIO, sizes: np.ndarray, dtype: np.dtype) -> None:
    """Writes an .idx file for documents of these sizes that follow one another.

    Args:
      file: open for writing.
      sizes: tokens of each document.
      dtype: integer type of the .bin file.
    """
    sizes = np.asarray(sizes, np.int64)
    file.write(_MAGIC)
    file.write(np.uint64(_VERSION).tobytes())
    file.write(np.uint8(_CODES[dtype]).tobytes())
    file.write(np.uint64(len(sizes)).tobytes())
    file.write(np.uint64(len(sizes) + 1).tobytes())
    file.write(sizes.astype(np.int32).tobytes())
    file.write(((np.cumsum(sizes) - sizes) * dtype.itemsize).tobytes())
    file.write(np.arange(len(sizes) + 1, dtype=np.int64).tobytes())


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """Type of the tokens, and size and start of each document, of an index file."""
    found = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER)
    if len(header) < _HEADER or not header.startswith(_MAGIC):
        raise ConfigError(f"{path} is not a binidx index: it does not start with {_MAGIC!r}")
    version, code, count, documents = (
        int(np.frombuffer(header, kind, 1, offset)[0])
        for kind, offset in (("<u8", 9), ("u1", 17), ("<u8", 18), ("<u8", 26))
    )
    if version != _VERSION or code not in _DTYPES:
        raise ConfigError(f"{path}: version {version}, type code {code} can't be read")
    if count == 0:
        raise ConfigError(f"{path}: it holds no documents")
    expected = _HEADER + 12 * count + 8 * documents
    if found != expected:
        what = "is cut short" if found < expected else "is too long"
        raise ConfigError(f"{path} {what}: {found} bytes, its header asks for {expected}")
    sizes = np.fromfile(path, np.int32, count, offset=_HEADER)
    starts = np.fromfile(path, np.int64, count, offset=_HEADER + 4 * count)
    if sizes.min() < 0 or not sizes.any():
        raise ConfigError(f"{path}: its documents have no tokens or negative sizes")
    itemsize = _DTYPES[code].itemsize
    uneven = bool((starts % itemsize).any()) if itemsize > 1 else False
    starts //= itemsize
    if uneven or starts[0] != 0 or not np.array_equal(np.diff(starts), sizes[:-1]):
        raise ConfigError(f"{path}: its documents do not follow one another in the .bin file")
    return _DTYPES[code], sizes, starts


class _Array:
    """The integers of a file, read in pieces."""

    def __init__(self, path: Path, dtype: np.dtype, length: int, index: Path):
        self._path, self._dtype = path, dtype
        self._file = path.open("rb", buffering=0)  # closed with this object
        found, expected = os.fstat(self._file.fileno()).st_size, length * dtype.itemsize
        if found != expected:
            what = "is cut short" if found < expected else "is too long"
            raise ConfigError(f"{path} {what}: {found} bytes, {index.name} asks for {expected}")

    def read(self, start: int, count: int) -> np.ndarray:
        """Items start .. start + count, which must be in the file; read-only."""
        size, begin, pieces = count * self._dtype.itemsize, start * self._dtype.itemsize, []
        while size:  # a large read comes in pieces
            data = os.pread(self._file.fileno(), size, begin)
            if not data:
                raise ConfigError(
                    f"{self._path} has become shorter while it is in use: byte {begin} is gone"
                )
            pieces.append(data)
            begin, size = begin + len(data), size - len(data)
        return np.frombuffer(pieces[0] if len(pieces) == 1 else b"".join(pieces), self._dtype)
