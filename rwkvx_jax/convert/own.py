"""Our own single-file checkpoints: safetensors with everything needed to use the model.

The parameters keep our names and stacked shapes; `__metadata__` holds the whole model
configuration and the tokenizer's name, and, for a converted model, what its original file needs
beyond that to be written again exactly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rwkvx_jax.config import ConfigError, ModelConfig, from_dict, to_dict
from rwkvx_jax.convert.layout import check_params
from rwkvx_jax.convert.official import OfficialInfo
from rwkvx_jax.convert.safetensors_file import open_safetensors, write_safetensors
from rwkvx_jax.convert.tensors import ConversionError, LazyTensor, as_lazy

_FORMAT, _VERSION = "rwkvx_jax_format", "1"


class Trained(NamedTuple):
    """How far the training run was that a checkpoint came from."""

    step: int
    length: int | None  # longest training sequence so far, in tokens


class OwnCheckpoint(NamedTuple):
    """A checkpoint of ours, its parameters read lazily."""

    config: ModelConfig
    tokenizer_name: str
    params: dict[str, LazyTensor]
    info: OfficialInfo | None  # of the official file it came from
    trained: Trained | None = None


def is_own_metadata(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file with this metadata is one of ours."""
    return _FORMAT in metadata


def is_own(path: str | os.PathLike) -> bool:
    """Whether a path is one of our safetensors files."""
    path = Path(path)
    named = path.suffix == ".safetensors" and path.is_file()
    return named and is_own_metadata(open_safetensors(path)[1])


def open_own_safetensors(path: str | os.PathLike) -> OwnCheckpoint:
    """Opens one of our checkpoints.

    Raises:
      ConversionError: not one of ours, of a newer format, or its parameters do not fit its
        configuration.
    """
    path = Path(path)
    tensors, metadata = open_safetensors(path)
    if not is_own_metadata(metadata):
        raise ConversionError(
            f"{path}: a safetensors file without our metadata; convert it first with "
            "`python -m rwkvx_jax.convert`"
        )
    if metadata[_FORMAT] != _VERSION:
        raise ConversionError(
            f"{path}: format {metadata[_FORMAT]}, but this program reads {_VERSION}: update it"
        )
    try:
        config = from_dict(ModelConfig, json.loads(metadata["model_config"]), "model")
        official = metadata.get("official_info")
        info = from_dict(OfficialInfo, json.loads(official), "info") if official else None
        trained = Trained(**json.loads(metadata["trained"])) if "trained" in metadata else None
        check_params(config, tensors)
        return OwnCheckpoint(config, metadata["tokenizer"], tensors, info, trained)
    except (ConfigError, ConversionError, KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"{path}: {error}") from error


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
    check_params(config, params)
    metadata = {
        _FORMAT: _VERSION,
        "model_config": json.dumps(to_dict(config)),
        "tokenizer": tokenizer_name,
    }
    if info is not None:
        metadata["official_info"] = json.dumps(to_dict(info))
    if trained is not None:
        metadata["trained"] = json.dumps(trained._asdict())
    write_safetensors(path, params, metadata)
