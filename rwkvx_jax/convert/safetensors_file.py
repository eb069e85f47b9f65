"""Reads and writes safetensors files as lazy tensors, one tensor in memory at a time.

The format is a header of JSON (names, dtypes, shapes, places; strings under `__metadata__`) and
then the raw data. Files written here also hold SHA-256 hashes of the header and of each tensor, as
one string of metadata that other readers ignore; they are checked at opening and at each tensor's
reading.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkvx_jax.convert.tensors import (
    DTYPES,
    LARGEST_JSON,
    ConversionError,
    LazyTensor,
    as_lazy,
    check_count,
    check_tensor,
    parse_json,
    refuse_pointer,
    write_data,
    written_whole,
)

_CODES = {
    "F32": DTYPES["float32"],
    "BF16": DTYPES["bfloat16"],
    "F16": DTYPES["float16"],
    "F64": DTYPES["float64"],
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}
_METADATA = "__metadata__"
_HASHES = "rwkvx_jax_sha256"
"""Metadata: the hash of the header (with this hash as zeros), then of each tensor in the order of
the data, all in hexadecimal without separators."""
_DIGITS = 2 * hashlib.sha256().digest_size
_BLOCK = 1 << 20


class _Entry(NamedTuple):
    """A tensor's place in a file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file
    size: int  # bytes


def open_safetensors(path: str | os.PathLike) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Lazy tensors of one safetensors file in the order of their data, and its metadata.

    Raises:
      ConversionError: not a safetensors file, damaged, or of a dtype unknown here. Reading a
        tensor raises it if the data is not what was written.
    """
    path = Path(path)
    try:
        raw, size = _read_header(path)
        header = parse_json(raw)
        metadata = header.pop(_METADATA, {}) if isinstance(header, dict) else None
        texts = [*metadata.values()] if isinstance(metadata, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise ConversionError("its header is no table of tensors and strings")
        check_count(len(header))
        data_start = 8 + len(raw)
        entries = sorted(
            (_entry(name, fields, data_start) for name, fields in header.items()),
            key=lambda entry: (entry.start, entry.size),
        )
        _check_places(entries, data_start, size)
        hashes = _check_hashes(raw, metadata.pop(_HASHES, ""), len(entries))
    except ConversionError as error:
        raise ConversionError(f"{path}: not a readable safetensors file: {error}") from error
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror or error}") from error
    tensors = {
        entry.name: _lazy(path, entry, digest)
        for entry, digest in zip(entries, hashes, strict=True)
    }
    return tensors, metadata


def _read_header(path: Path) -> tuple[bytes, int]:
    """The JSON of the header, and the size of the file."""
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        start = file.read(64)
        refuse_pointer(start)
        size = int.from_bytes(start[:8], "little")
        if total < 8 or size > total - 8:
            raise ConversionError(
                f"its first 8 bytes announce a header of {size} bytes in a file of {total}: it is "
                "truncated, or of another kind"
            )
        if size > LARGEST_JSON:
            raise ConversionError(
                f"its header has {size} bytes; no checkpoint that can be read here needs more "
                f"than {LARGEST_JSON}"
            )
        file.seek(8)
        return file.read(size), total


def _entry(name: str, fields: Any, data_start: int) -> _Entry:
    known = isinstance(fields, dict) and {"dtype", "shape", "data_offsets"} <= fields.keys()
    if not known or not (_sizes(fields["shape"]) and _sizes(fields["data_offsets"])):
        raise ConversionError(f"its entry {name[:60]!r} has no valid dtype, shape and data_offsets")
    code = fields["dtype"]
    if not (isinstance(code, str) and code in _CODES):
        raise ConversionError(f"{name} has dtype {str(code)[:20]}; known are {sorted(_CODES)}")
    shape, dtype = tuple(fields["shape"]), _CODES[code]
    check_tensor(name, shape, dtype)
    offsets, size = fields["data_offsets"], math.prod(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise ConversionError(f"{name} of shape {shape} does not fill its data_offsets {offsets}")
    return _Entry(name, dtype, shape, data_start + offsets[0], size)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_places(entries: list[_Entry], data_start: int, size: int) -> None:
    """The tensors must lie one after the other, up to the end of the file."""
    end = data_start
    for entry in entries:
        if entry.start != end:
            raise ConversionError(f"the data of {entry.name} does not begin where another ends")
        end += entry.size
    if end != size:
        raise ConversionError(f"its tensors end at byte {end}, but the file at {size}")


def _check_hashes(header: bytes, hashes: str, tensors: int) -> list[str]:
    """The hashes of the tensors ("" each if the file holds none), after a check of the header."""
    if not hashes:
        return [""] * tensors
    zeroed = header.replace(hashes.encode(), b"0" * _DIGITS + hashes[_DIGITS:].encode())
    complete = len(hashes) == _DIGITS * (1 + tensors)
    if not complete or hashlib.sha256(zeroed).hexdigest() != hashes[:_DIGITS]:
        raise ConversionError(
            "its header is not the one that was written: fetch or convert the file again (after a "
            f"change on purpose, remove {_HASHES} from its metadata)"
        )
    starts = range(_DIGITS, len(hashes), _DIGITS)
    return [hashes[i : i + _DIGITS] for i in starts]


def _lazy(path: Path, entry: _Entry, digest: str) -> LazyTensor:
    verified = not digest

    def check(actual: str) -> None:
        nonlocal verified
        if actual != digest:
            raise ConversionError(
                f"{path}: the data of {entry.name} is not what was written: the file is damaged; "
                "fetch or convert it again"
            )
        verified = True

    def load(row):
        if row is None:
            data = _read(path, entry, 0, entry.size)
            if digest:
                check(hashlib.sha256(data).hexdigest())
            return data.view(entry.dtype).reshape(entry.shape)
        if not verified:
            check(_hash_in_blocks(path, entry))
        size = entry.size // entry.shape[0]
        data = _read(path, entry, row * size, size)
        return data.view(entry.dtype).reshape(entry.shape[1:])

    return LazyTensor(entry.name, entry.shape, entry.dtype, load)


def _hash_in_blocks(path: Path, entry: _Entry) -> str:
    digest = hashlib.sha256()
    for place in range(0, entry.size, _BLOCK):
        digest.update(_read(path, entry, place, min(_BLOCK, entry.size - place)))
    return digest.hexdigest()


def _read(path: Path, entry: _Entry, place: int, size: int) -> np.ndarray:
    """Bytes of a tensor's data."""
    try:
        with path.open("rb") as file:
            file.seek(entry.start + place)
            data = np.fromfile(file, np.uint8, size)
    except OSError as error:
        raise ConversionError(f"{path}: {entry.name}: {error.strerror or error}") from error
    if data.size != size:
        raise ConversionError(f"{path}: the data of {entry.name} ends early: it was truncated")
    return data


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    accept: Callable[[], None] | None = None,
) -> None:
    """Writes one safetensors file, reading the tensors one at a time.

    The file appears only when it is complete.

    Args:
      path: destination.
      tensors: arrays or lazy tensors by name.
      metadata: strings by name, kept in the header's `__metadata__`.
      accept: called when all is written; if it raises, the file does not appear.

    Raises:
      ConversionError: a dtype the format lacks, or an unwritable destination.
    """
    tensors = as_lazy(tensors)
    # Wide dtypes first, so that every tensor is aligned to its item size.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    places: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _CODE_OF:
            raise ConversionError(f"{path}: {name} is {tensor.dtype}: cast it to float32")
        places[name] = {
            "dtype": _CODE_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes

    def header(hashes: str) -> bytes:
        text = json.dumps({_METADATA: dict(metadata or {}) | {_HASHES: hashes}} | places).encode()
        return text + b" " * (-len(text) % 8)

    with written_whole(path, accept) as file:
        # Hashes are known after the data; the header keeps their places free.
        blank = header("0" * _DIGITS * (1 + len(order)))
        file.write(len(blank).to_bytes(8, "little") + blank)
        hashes = "0" * _DIGITS
        for name in order:
            digest = hashlib.sha256()
            write_data(file, tensors[name], digest)
            hashes += digest.hexdigest()
        own = hashlib.sha256(header(hashes)).hexdigest()
        file.seek(8)
        file.write(header(own + hashes[_DIGITS:]))
