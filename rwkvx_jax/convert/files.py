"""Opens any checkpoint of named tensors by what it is: torch zip, safetensors, or sharded.

A path may be one file, the index of a sharded checkpoint (`*.index.json`), or a directory in the
manner of Hugging Face that holds one of these.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from rwkvx_jax.convert.pth import open_pth, write_pth
from rwkvx_jax.convert.safetensors_file import open_safetensors, write_safetensors
from rwkvx_jax.convert.tensors import (
    DTYPES,
    ConversionError,
    LazyTensor,
    check_count,
    check_tensor,
    read_json,
)

INDEX = ".index.json"
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
_SUFFIXES = (".safetensors", *TORCH_SUFFIXES, INDEX)
# Names that Hugging Face's programs give to a whole model. Where there are several they hold the
# same tensors, and the first one is read.
_STANDARD_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_SHOWN = 20


def open_tensors(path: str | os.PathLike) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Lazy tensors of a checkpoint, and its metadata (empty where the format has none, or shards
    differ in it).

    Args:
      path: `.pth`, `.pt`, `.bin`, `.safetensors`, `*.index.json`, or a directory that holds one
        (see `checkpoint_among`).

    Raises:
      ConversionError: nothing readable there; the message says why.
    """
    path = _file_of(Path(path))
    return _open_sharded(path) if path.name.endswith(INDEX) else _open_file(path)


def files_of(path: str | os.PathLike) -> list[Path]:
    """The files that hold the tensors of a checkpoint; see `open_tensors`."""
    path = _file_of(Path(path))
    if not path.name.endswith(INDEX):
        return [path]
    return [path.with_name(shard) for shard in sorted(set(read_index(path).values()))]


def _file_of(path: Path) -> Path:
    if path.is_dir():
        path = path / checkpoint_among([p.name for p in path.iterdir() if p.is_file()], str(path))
    if not path.exists():
        raise ConversionError(f"{path} does not exist")
    return path


def _open_file(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return open_pth(path), {}
    raise ConversionError(
        f"{path}: unknown kind of file; expected .safetensors, .index.json or one of "
        f"{', '.join(TORCH_SUFFIXES)}"
    )


def write_tensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    accept: Callable[[], None] | None = None,
) -> None:
    """Writes tensors in the format that the suffix of `path` names; a `.pth` has no metadata.

    `accept` is called when all is written; if it raises, the file does not appear.
    """
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        write_safetensors(path, tensors, metadata, accept)
    elif suffix in TORCH_SUFFIXES:
        write_pth(path, tensors, accept)
    else:
        raise ConversionError(
            f"{path}: the destination must end in .safetensors or one of "
            f"{', '.join(TORCH_SUFFIXES)}"
        )


def checkpoint_among(names: Collection[str], where: str) -> str:
    """The file that holds the model of a directory or of a repository.

    Args:
      names: of all its files; one with a slash lies in a folder of its own, and is never chosen.
      where: the directory or repository, for messages.

    Raises:
      ConversionError: there is no checkpoint, or several and none has a standard name; they are
        listed.
    """
    standard = [name for name in _STANDARD_NAMES if name in names]
    found = sorted(name for name in names if name.endswith(_SUFFIXES))
    outer = [name for name in found if "/" not in name]
    if standard or len(outer) == 1:
        return [*standard, *outer][0]
    if not found:
        raise ConversionError(
            f"{where} holds no checkpoint; looked for {', '.join(_STANDARD_NAMES)}, or one file "
            f"that ends in {', '.join(_SUFFIXES)}"
        )
    candidates = outer or found
    shown = ", ".join(candidates[:_SHOWN]) + (", ..." if len(candidates) > _SHOWN else "")
    raise ConversionError(
        f"{where} holds {len(candidates)} files that may be the model: {shown}. Name one, such as "
        f"{where}/{candidates[0]}"
    )


def read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor that the index of a sharded checkpoint names.

    Raises:
      ConversionError: not an index, or one with names that no checkpoint uses.
    """
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not (isinstance(weight_map, dict) and weight_map):
        raise ConversionError(f"{path}: not an index with a weight_map")
    outside = [shard for shard in weight_map.values() if not _is_shard_name(shard)]
    if outside:
        shown = ", ".join(sorted({f"{shard!r:.60}" for shard in outside})[:8])
        raise ConversionError(
            f"{path}: shards {shown} are not plain names of .safetensors or torch files beside "
            "the index"
        )
    try:
        check_count(len(weight_map))
        for name in weight_map:
            check_tensor(name, (), DTYPES["float32"])
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error
    return weight_map


def _open_sharded(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    weight_map = read_index(path)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise ConversionError(f"{path}: shards {missing} are missing beside the index")
    opened = {shard: _open_file(path.parent / shard) for shard in shards}
    absent = sorted(name for name, shard in weight_map.items() if name not in opened[shard][0])
    if absent:
        raise ConversionError(
            f"{path}: tensors {absent} are not in the shards that should hold them"
        )
    tensors = {name: opened[shard][0][name] for name, shard in weight_map.items()}
    metadata = [opened[shard][1] for shard in shards]
    return tensors, metadata[0] if all(m == metadata[0] for m in metadata) else {}


def _is_shard_name(shard: Any) -> bool:
    return (
        isinstance(shard, str)
        and shard.isprintable()
        and len(shard.encode()) <= 255
        and Path(shard).name == shard
        and Path(shard).suffix in (".safetensors", *TORCH_SUFFIXES)
    )
