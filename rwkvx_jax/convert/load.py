"""Any single checkpoint that we can read, told apart by its content."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rwkvx_jax.convert.directory import CONFIG_FILE, SETTINGS, check_sizes, read_options
from rwkvx_jax.convert.files import open_tensors
from rwkvx_jax.convert.fla import has_fla_names, open_fla
from rwkvx_jax.convert.llama import KINDS, has_llama_names, open_llama
from rwkvx_jax.convert.official import open_official
from rwkvx_jax.convert.own import (
    ADAPTER,
    Layout,
    OwnCheckpoint,
    has_our_names,
    is_own_metadata,
    read_own,
)
from rwkvx_jax.convert.tensors import ConversionError, LazyTensor, in_dtype
from rwkvx_jax.convert.vocabulary import check_vocabulary
from rwkvx_jax.tokenizer import tokenizer_of


def open_checkpoint(path: str | os.PathLike, *, dtype: np.dtype | None = None) -> OwnCheckpoint:
    """Opens our own checkpoint, an official one, flash-linear-attention's or a Transformer in the
    layout of Llama and Qwen2; data is read lazily.

    Chunk size and top-k are the file's, or the official 2048 and 3 where it does not say. Of a
    directory, its config.json and its tokenizer must agree with the tensors.

    Args:
      path: .safetensors, .pth, a sharded index, or a directory that holds one of them.
      dtype: of the parameters; None keeps the stored one.

    Raises:
      ConversionError: a file that is none of these, or is damaged; all wrong tensors are listed. A
        directory of another model or with another tokenizer.
      ConfigError: a directory with a malformed vocabulary file.
    """
    path = Path(path)
    if not path.is_dir():
        return _open(path, *open_tensors(path), None, dtype)
    options = read_options(path)
    checkpoint = _open(path, *open_tensors(path), options, dtype)
    check_sizes(path, options, checkpoint.config)
    check_vocabulary(path, checkpoint.tokenizer_name)
    return checkpoint


def _open(
    path: Path,
    tensors: dict[str, LazyTensor],
    metadata: Mapping[str, str],
    options: Mapping[str, Any] | None,
    dtype: np.dtype | None,
) -> OwnCheckpoint:
    """A checkpoint by the names of its tensors; `options` are None for a single file."""
    if ADAPTER in metadata:
        raise ConversionError(
            f"{path} is an adapter, which is no model by itself: apply it to its base with "
            f"`rwkvx convert BASE NEW.safetensors --merge {path}`"
        )
    settings = _settings(path, metadata, (options or {}).get(SETTINGS))
    try:
        if settings is None:
            return _open_other(tensors, options or {}, dtype)
        layout: Layout = "ours" if has_our_names(tensors) else "official"
        params = tensors if layout == "ours" else open_official(tensors)[1]
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error
    own = read_own(path, params, settings)
    return own._replace(params=in_dtype(params, dtype), layout=layout)


def _open_other(
    tensors: dict[str, LazyTensor], options: Mapping[str, Any], dtype: np.dtype | None
) -> OwnCheckpoint:
    """A checkpoint that was not written here; `options` are empty where none are known."""
    for has_names, whose in (
        (has_fla_names, "flash-linear-attention"),
        (has_llama_names, "Llama or Qwen2"),
    ):
        if has_names(tensors) and not options:
            raise ConversionError(
                f"tensors of {whose}, whose epsilon and other options are in a {CONFIG_FILE}: name "
                "the directory that holds both"
            )
    if options.get("model_type") in KINDS:
        config, params = open_llama(tensors, options, dtype)
        return OwnCheckpoint(config, "", params, None, layout="llama")
    layout: Layout = "official"
    if has_fla_names(tensors):
        layout, tied = "fla", options.get("tie_word_embeddings") is True
        config, params, info = open_fla(tensors, tied=tied, dtype=dtype)
    else:
        config, params, info = open_official(tensors, dtype=dtype)
    return OwnCheckpoint(config, tokenizer_of(config.vocab_size), params, info, layout=layout)


def _settings(
    path: Path, metadata: Mapping[str, str], described: Mapping[str, str] | None
) -> Mapping[str, str] | None:
    """What a checkpoint that was written here says of its model; None for any other.

    Args:
      path: of the checkpoint, for messages.
      metadata: of its file.
      described: by the config.json beside it.

    Raises:
      ConversionError: the two differ.
    """
    if not is_own_metadata(metadata):
        return described
    if described is not None and not described.items() <= metadata.items():
        raise ConversionError(
            f"{path}: {CONFIG_FILE} and the file of the tensors describe different models: one was "
            "replaced or changed; fetch or write the directory again"
        )
    return metadata
