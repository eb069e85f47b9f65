"""Any single checkpoint that we can read, told apart by its content."""

from __future__ import annotations

import os

import numpy as np

from rwkvx_jax.convert.files import open_tensors
from rwkvx_jax.convert.fla import is_fla, open_fla
from rwkvx_jax.convert.official import open_official
from rwkvx_jax.convert.own import OwnCheckpoint, is_own_metadata, read_own
from rwkvx_jax.convert.tensors import ConversionError, in_dtype
from rwkvx_jax.tokenizer import tokenizer_of


def open_checkpoint(path: str | os.PathLike, *, dtype: np.dtype | None = None) -> OwnCheckpoint:
    """Opens our own, an official or a flash-linear-attention checkpoint; data is read lazily.

    Chunk size and top-k are the file's, or the official 2048 and 3 where it does not say.

    Args:
      path: .safetensors, .pth, a sharded index, or a Hugging Face directory.
      dtype: of the parameters; None keeps the stored one.

    Raises:
      ConversionError: a file that is none of these, or is damaged; all wrong tensors are listed.
    """
    if is_fla(path):
        config, params, info = open_fla(path, dtype=dtype)
        return OwnCheckpoint(config, tokenizer_of(config.vocab_size), params, info)
    tensors, metadata = open_tensors(path)
    if is_own_metadata(metadata):
        own = read_own(path, tensors, metadata)
        return own._replace(params=in_dtype(own.params, dtype))
    try:
        config, params, info = open_official(tensors, dtype=dtype)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error
    return OwnCheckpoint(config, tokenizer_of(config.vocab_size), params, info)
