"""Reads and writes safetensors files, sharded ones included, as lazy tensors.

Reading is the safetensors package's. Its writer wants all tensors in memory at once, so the
writer here is our own: the format is a header of JSON followed by the raw data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from rwkvx_jax.convert.tensors import (
    DTYPES,
    ConversionError,
    LazyTensor,
    as_lazy,
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


def open_safetensors(path: str | os.PathLike) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Lazy tensors of one safetensors file, and its metadata.

    Raises:
      ConversionError: not a safetensors file, damaged, or of a dtype unknown here.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: _lazy(path, name, file.get_slice(name)) for name in file.keys()}
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path}: not a readable safetensors file ({error})") from error


def _lazy(path: Path, name: str, description: Any) -> LazyTensor:
    code = description.get_dtype()
    if code not in _CODES:
        raise ConversionError(f"{path}: {name} has dtype {code}; known are {sorted(_CODES)}")

    def load(row):
        # Opened anew each time: the package maps the file into memory, and pages once touched
        # count as this process's until the mapping goes.
        with safe_open(path, framework="np") as file:
            return file.get_tensor(name) if row is None else file.get_slice(name)[row]

    return LazyTensor(name, tuple(description.get_shape()), _CODES[code], load)


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one safetensors file, reading the tensors one at a time.

    The file appears only when it is complete.

    Args:
      path: destination.
      tensors: arrays or lazy tensors by name.
      metadata: strings by name, kept in the header's `__metadata__`.

    Raises:
      ConversionError: a dtype the format lacks, or an unwritable destination.
    """
    tensors = as_lazy(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # Wide dtypes first, so that every tensor is aligned to its item size.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _CODE_OF:
            raise ConversionError(f"{path}: {name} is {tensor.dtype}: cast it to float32")
        header[name] = {
            "dtype": _CODE_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            write_data(file, tensors[name])
