"""Our own single-file checkpoints: safetensors with everything needed to use the model.

The parameters keep our names and stacked shapes; `__metadata__` holds the whole model
configuration and the tokenizer's name, and, for a converted model, what its original file needs
beyond that to be written again exactly. Hashes of all of it are checked when it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Mapping
from typing import Any, Literal, NamedTuple

from rwkvx_jax.config import ConfigError, ModelConfig, from_dict, to_dict
from rwkvx_jax.convert.layout import check_params, param_shapes
from rwkvx_jax.convert.official import OfficialInfo
from rwkvx_jax.convert.safetensors_file import open_safetensors, write_safetensors
from rwkvx_jax.convert.tensors import ConversionError, LazyTensor, as_lazy, parse_json

_FORMAT, _VERSION = "rwkvx_jax_format", "2"
_READABLE = ("1", _VERSION)  # 1: without the order of the official file, and without hashes
_TOKENIZERS = ("world", "byte", "")

ADAPTER = "adapter"
"""Key of the metadata of a file that holds an adapter, not a model; see `rwkvx_jax.adapter`."""


class Trained(NamedTuple):
    """How far the training run was that a checkpoint came from."""

    step: int
    length: int | None  # longest training sequence so far, in tokens


Layout = Literal["ours", "official", "fla", "llama"]
"""Whose names a checkpoint's tensors have: ours, the official ones, flash-linear-attention's, those
of Llama and Qwen2."""


class OwnCheckpoint(NamedTuple):
    """A checkpoint as ours, its parameters read lazily."""

    config: ModelConfig
    tokenizer_name: str
    params: dict[str, LazyTensor]
    info: OfficialInfo | None  # of the official file it came from
    trained: Trained | None = None
    layout: Layout = "ours"  # of the file that is read


def is_own_metadata(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file with this metadata is one of ours."""
    return _FORMAT in metadata


def has_our_names(names: Container[str]) -> bool:
    """Whether these names of tensors are those of our parameters."""
    return "ln_out.scale" in names


def open_own_safetensors(path: str | os.PathLike) -> OwnCheckpoint:
    """Opens one of our checkpoints; see `read_own`."""
    return read_own(path, *open_safetensors(path))


def read_own(
    path: str | os.PathLike,
    tensors: dict[str, LazyTensor],
    metadata: Mapping[str, str],
    shapes_of: Callable[[ModelConfig], Mapping[str, tuple[int, ...]]] = param_shapes,
) -> OwnCheckpoint:
    """One of our checkpoints from the content of its file.

    Args:
      path: the file, for messages.
      tensors: of the file.
      metadata: of the file.
      shapes_of: the tensors that a file of this kind has.

    Raises:
      ConversionError: not one of ours, of a newer format, or its parameters do not fit its
        configuration.
    """
    if not is_own_metadata(metadata):
        raise ConversionError(
            f"{path}: a safetensors file without our metadata; convert it first with "
            "`python -m rwkvx_jax.convert`"
        )
    if metadata[_FORMAT] not in _READABLE:
        raise ConversionError(
            f"{path}: format {metadata[_FORMAT]:.20}, but this program reads "
            f"{' and '.join(_READABLE)}: update it"
        )
    try:
        config = from_dict(ModelConfig, parse_json(metadata["model_config"].encode()), "model")
        official = metadata.get("official_info")
        info = from_dict(OfficialInfo, parse_json(official.encode()), "info") if official else None
        trained = metadata.get("trained")
        trained = _trained(parse_json(trained.encode())) if trained else None
        if metadata["tokenizer"] not in _TOKENIZERS:
            raise ConversionError(f"it names the unknown tokenizer {metadata['tokenizer']!r:.60}")
        check_params(shapes_of(config), tensors)
        return OwnCheckpoint(config, metadata["tokenizer"], tensors, info, trained)
    except KeyError as error:
        raise ConversionError(f"{path}: its metadata lacks {error}") from error
    except (ConfigError, ConversionError, ArithmeticError, TypeError, ValueError) as error:
        raise ConversionError(f"{path}: {error}") from error


def _trained(values: Any) -> Trained:
    trained = Trained(**values)
    numbers = [trained.step] if trained.length is None else [*trained]
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise ConversionError(f"its training has the impossible step or length {numbers!r:.60}")
    return trained


def write_own_safetensors(
    path: str | os.PathLike,
    config: ModelConfig,
    tokenizer_name: str,
    params: Mapping[str, Any],
    info: OfficialInfo | None = None,
    trained: Trained | None = None,
) -> None:
    """Writes one of our checkpoints; it appears only when it is complete.

    Args:
      path: destination, `.safetensors`.
      config: the model.
      tokenizer_name: "world", "byte", or "" if unknown.
      params: arrays or lazy tensors by name, shaped as `layout.param_shapes(config)` says.
      info: of the official file the parameters came from.
      trained: how far the training run was, if known.

    Raises:
      ConversionError: parameters that do not fit, or an unwritable destination.
    """
    params = as_lazy(params)
    check_params(param_shapes(config), params)
    write_safetensors(path, params, own_metadata(config, tokenizer_name, info, trained))


def own_metadata(
    config: ModelConfig,
    tokenizer_name: str,
    info: OfficialInfo | None = None,
    trained: Trained | None = None,
) -> dict[str, str]:
    """The metadata of one of our checkpoints; see `write_own_safetensors`."""
    metadata = {
        _FORMAT: _VERSION,
        "model_config": json.dumps(to_dict(config)),
        "tokenizer": tokenizer_name,
    }
    if info is not None:
        metadata["official_info"] = json.dumps(to_dict(info))
    if trained is not None:
        metadata["trained"] = json.dumps(trained._asdict())
    return metadata
