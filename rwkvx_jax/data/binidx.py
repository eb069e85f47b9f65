"""The RWKV/Megatron binidx format: a stream of token ids with an index of its documents.

`NAME.bin` holds the raw ids of all documents one after the other, `NAME.idx` their sizes. Files
made by other tools are read in place through a memory map. A third file, `NAME.mask`, is ours: one
byte per token, 0 where the token does not count in the loss; without it all tokens count.
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
    """`NAME.bin`, `NAME.idx` or `NAME.mask` of a prefix (which may itself end in .bin or .idx)."""
    path = Path(prefix)
    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    return path.with_name(f"{path.name}.{extension}")


class Binidx:
    """Memory-mapped view of a binidx pair, read-only.

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
          ConfigError: a file that is absent, not of this format, cut short, or whose documents do
            not follow one another.
        """
        index, tokens = binidx_file(prefix, "idx"), binidx_file(prefix, "bin")
        for path in (index, tokens):
            if not path.is_file():
                raise ConfigError(f"{path} does not exist: a binidx source needs .bin and .idx")
        self.prefix = index.with_suffix("")
        self.dtype, self.sizes, pointers = _read_index(index)
        ends = np.cumsum(self.sizes, dtype=np.int64)
        self.starts = ends - self.sizes
        if not np.array_equal(pointers, self.starts * self.dtype.itemsize):
            raise ConfigError(f"{index}: its documents do not follow one another in {tokens.name}")
        self._length = int(ends[-1])
        self._tokens = _map(tokens, self.dtype, self._length, index)
        mask = binidx_file(prefix, "mask")
        self.masked = mask.is_file()
        self._mask = _map(mask, np.dtype(np.uint8), self._length, index) if self.masked else None

    def __len__(self) -> int:
        """Tokens of the stream."""
        return self._length

    def __reduce__(self):  # a pickled memory map would carry the whole file
        return Binidx, (str(self.prefix),)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start .. start + count` of the stream, int32 [count]."""
        return self._tokens[start : start + count].astype(np.int32)

    def read_mask(self, start: int, count: int) -> np.ndarray:
        """Their weights in the loss, float32 [count]: 1 or 0."""
        if self._mask is None:
            return np.ones(count, np.float32)
        return self._mask[start : start + count].astype(np.float32)

    def fingerprint(self) -> dict[str, int | str]:
        """JSON-able identity: number of tokens, and a hash of the index and of tokens at places
        spread over the file (a file may hold terabytes)."""
        digest = hashlib.sha256(np.ascontiguousarray(self.sizes).tobytes())
        for start in np.linspace(0, self._length, _PROBES, endpoint=False, dtype=np.int64):
            digest.update(self.read(int(start), _PROBE_TOKENS).tobytes())
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
            block = self._tokens[start : start + _SCAN_BLOCK]
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
    """Type, sizes and byte pointers of an index file."""
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
    if found < expected:
        raise ConfigError(f"{path} is cut short: {found} bytes, its header asks for {expected}")
    sizes = np.memmap(path, np.int32, "r", _HEADER, (count,))
    pointers = np.memmap(path, np.int64, "r", _HEADER + 4 * count, (count,))
    if sizes.min() < 0 or not sizes.any():
        raise ConfigError(f"{path}: its documents have no tokens or negative sizes")
    return _DTYPES[code], sizes, pointers


def _map(path: Path, dtype: np.dtype, length: int, index: Path) -> np.memmap:
    found, expected = path.stat().st_size, length * dtype.itemsize
    if found < expected:
        raise ConfigError(f"{path} is cut short: {found} bytes, {index.name} asks for {expected}")
    return np.memmap(path, dtype, "r", 0, (length,))
