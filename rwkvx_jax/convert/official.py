"""Official RWKV-X and RWKV-7 checkpoints: their names, and the configuration read off the shapes.

An RWKV-X file has the prefixes `rwkv.` and `moba.`; a plain RWKV-7 file (RWKV-LM) has the same
names without `rwkv.`. Neither says anything of itself, so the configuration is read off the
shapes; chunk size and top-k, which no shape shows, take the official values unless given. What
our own layout does not keep (the prefix, dtypes, whether block 0 has an unused value residual) goes
into an `OfficialInfo`, so that a round trip gives back every tensor byte by byte.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.convert.infer import infer_config
from rwkvx_jax.convert.layout import (
    Naming,
    check,
    check_params,
    from_params,
    slots,
    to_params,
)
from rwkvx_jax.convert.tensors import DTYPES, ConversionError, LazyTensor, as_lazy

_PREFIX = "rwkv."
_ATTENTION_PREFIX = "moba."


@dataclass(frozen=True)
class OfficialInfo:
    """What an official file has beyond configuration and values."""

    prefix: str
    """Before the RWKV-7 names: "rwkv." or nothing."""
    first_value_residual: bool
    """Whether block 0 has v0, v1, v2, which nothing uses."""
    dtype: str
    """Of most tensors."""
    other_dtypes: dict[str, str] = field(default_factory=dict)
    """Of the remaining ones, by name."""


def _naming(prefix: str, first_value_residual: bool) -> Naming:
    return Naming(
        "official",
        top=prefix + "{}",
        block=prefix + "blocks.{i}.{}",
        attention_block=_ATTENTION_PREFIX + "{i}.{}",
        first_value_residual=first_value_residual,
    )


def open_official(
    tensors: Mapping[str, Any],
    *,
    chunk_size: int | None = None,
    top_k: int | None = None,
    dtype: np.dtype | None = None,
) -> tuple[ModelConfig, dict[str, LazyTensor], OfficialInfo]:
    """An official checkpoint as our parameters, read lazily.

    Args:
      tensors: arrays or lazy tensors under official names.
      chunk_size: of the sparse attention; None: the official 2048.
      top_k: of the sparse attention; None: the official 3.
      dtype: of the parameters; None keeps the stored one.

    Returns:
      The configuration, our parameters by name, and what is needed to write the same file again.

    Raises:
      ConversionError: missing, extra or contradictory tensors, all of them listed.
    """
    tensors = as_lazy(tensors)
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in tensors) else ""
    first_value_residual = any(f"{prefix}blocks.0.att.v{i}" in tensors for i in range(3))
    naming = _naming(prefix, first_value_residual)
    config = infer_config(tensors, naming, chunk_size, top_k)
    wanted = list(slots(config, naming))
    check(tensors, wanted)
    info = OfficialInfo(prefix, first_value_residual, *_dtypes(tensors))
    return config, to_params(config, tensors, wanted, dtype), info


def _dtypes(tensors: Mapping[str, LazyTensor]) -> tuple[str, dict[str, str]]:
    """The commonest dtype, and that of every tensor of another one."""
    common = collections.Counter(t.dtype.name for t in tensors.values()).most_common(1)[0][0]
    return common, {n: t.dtype.name for n, t in tensors.items() if t.dtype.name != common}


def official_to_params(
    tensors: Mapping[str, Any],
    *,
    chunk_size: int | None = None,
    top_k: int | None = None,
    dtype: np.dtype | None = DTYPES["float32"],
) -> tuple[ModelConfig, dict[str, np.ndarray], OfficialInfo]:
    """An official checkpoint as our parameters, in memory; see `open_official`."""
    config, params, info = open_official(tensors, chunk_size=chunk_size, top_k=top_k, dtype=dtype)
    return config, {name: param.read() for name, param in params.items()}, info


def params_to_official(
    config: ModelConfig,
    params: Mapping[str, Any],
    info: OfficialInfo | None = None,
    dtype: np.dtype | None = None,
) -> dict[str, LazyTensor]:
    """Official tensors of our parameters, read lazily, in the order of the official files.

    Args:
      config: the model.
      params: arrays or lazy tensors under our names.
      info: of the file that the parameters came from; None: an RWKV-X file as its trainer writes
        it, or without attention blocks an RWKV-7 file as RWKV-LM writes it.
      dtype: of all tensors; None: that of `info`, without one the parameters' own.

    Raises:
      ConversionError: parameters that do not fit `config`, all of them listed; a model with parts
        that the official layout does not have.
    """
    params = as_lazy(params)
    check_params(config, params)
    if config.key_conv and config.num_attention_blocks:
        raise ConversionError(
            f"a model with key_conv={config.key_conv} has no official form: the original knows no "
            "convolution on keys; keep it as our own (--to ours)"
        )
    hybrid = config.num_attention_blocks > 0
    naming = _naming(
        info.prefix if info else (_PREFIX if hybrid else ""),
        info.first_value_residual if info else not hybrid,
    )
    wanted = sorted(slots(config, naming), key=lambda slot: _file_order(slot.name))
    dtypes = {}
    for slot in wanted:
        if dtype is not None:
            dtypes[slot.name] = np.dtype(dtype)
        elif info is not None:
            dtypes[slot.name] = DTYPES[info.other_dtypes.get(slot.name, info.dtype)]
        else:
            dtypes[slot.name] = params[slot.parameter].dtype
    return from_params(params, wanted, dtypes)


def _file_order(name: str) -> tuple:
    """Embedding, blocks by number, final norm, head, attention blocks by number."""
    attention = name.startswith(_ATTENTION_PREFIX)
    place = 0 if ".emb." in f".{name}" else 2 if ".ln_out." in f".{name}" else 3
    layer = re.search(r"(?:blocks|moba)\.(\d+)\.", name)
    return (attention, 1 if layer else place, int(layer[1]) if layer else 0)
