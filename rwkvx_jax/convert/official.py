"""Official RWKV-X and RWKV-7 checkpoints: their names, and the configuration read off the shapes.

An RWKV-X file has the prefixes `rwkv.` and `moba.`; a plain RWKV-7 file (RWKV-LM) has the same
names without `rwkv.`. Neither says anything of itself, so the configuration is read off the
shapes; chunk size and top-k, which no shape shows, take the official values. What
our own layout does not keep (the prefix, dtypes, order, whether block 0 has an unused value
residual) goes into an `OfficialInfo`, so that a round trip gives back every tensor byte by byte.
Prefixes that a wrapper of torch or a class of transformers put before the names are taken off.
"""

from __future__ import annotations

import collections
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rwkvx_jax.config import ModelConfig, differences
from rwkvx_jax.convert.infer import infer_config
from rwkvx_jax.convert.layout import (
    Naming,
    Slot,
    check,
    check_params,
    from_params,
    outside_table,
    param_shapes,
    slots,
    to_params,
)
from rwkvx_jax.convert.tensors import DTYPES, ConversionError, LazyTensor, as_lazy

_log = logging.getLogger(__name__)

_PREFIX = "rwkv."
_ATTENTION_PREFIX = "moba."
# Before every name: of torch.compile, of data parallelism, of a model kept as an attribute.
WRAPPERS = ("_orig_mod.", "module.", "model.")
# Before every name but the head's, in directories made for transformers: of the model without it.
_BODIES = ("rwkv7.", "model.")
# Fields of ModelConfig that shapes tell, if in other words.
_IN_SHAPES = ("low_rank", "low_rank_override", "ffn_width")


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
    order: tuple[str, ...] = ()
    """The names in the file's order, if that is another one than of the released files."""

    def __post_init__(self):
        others = self.other_dtypes
        dtypes = [self.dtype, *(others.values() if isinstance(others, dict) else [None])]
        valid = (
            self.prefix in ("", _PREFIX)
            and isinstance(self.first_value_residual, bool)
            and all(isinstance(name, str) and name in DTYPES for name in dtypes)
            and isinstance(self.order, tuple)
            and all(isinstance(name, str) for name in self.order)
        )
        if not valid:
            raise ConversionError("the description of the official file it came from is damaged")


def without_wrappers(
    tensors: Mapping[str, LazyTensor], wrappers: Iterable[str] = WRAPPERS
) -> Mapping[str, LazyTensor]:
    """The tensors without a prefix that all their names have, which is logged."""
    for wrapper in wrappers:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            _log.warning("every tensor's name begins with %r, which is taken off", wrapper)
            bare = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
            return without_wrappers(bare, wrappers)
    return tensors


def _without_body(tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
    """The tensors without the name that transformers' classes put before all but the head's."""
    body = [name for name in tensors if name != "head.weight"]
    for prefix in _BODIES:
        if body and all(name.startswith(prefix) for name in body):
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def official_naming(prefix: str, first_value_residual: bool) -> Naming:
    """The names of an official file."""
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
    dtype: np.dtype | None = None,
) -> tuple[ModelConfig, dict[str, LazyTensor], OfficialInfo]:
    """An official checkpoint as our parameters, read lazily.

    Args:
      tensors: arrays or lazy tensors under official names.
      dtype: of the parameters; None keeps the stored one.

    Returns:
      The configuration, our parameters by name, and what is needed to write the same file again.

    Raises:
      ConversionError: missing, extra or contradictory tensors, all of them listed.
    """
    tensors = _without_body(without_wrappers(as_lazy(tensors)))
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in tensors) else ""
    first_value_residual = any(f"{prefix}blocks.0.att.v{i}" in tensors for i in range(3))
    naming = official_naming(prefix, first_value_residual)
    config = infer_config(tensors, naming)
    wanted = _in_file_order(slots(config, naming))
    check(tensors, wanted)
    dtypes = {name: tensor.dtype.name for name, tensor in tensors.items()}
    order = list(tensors)
    if order == [slot.name for slot in wanted] or _is_sorted(dtypes):
        order = []
    info = OfficialInfo(prefix, first_value_residual, *split_dtypes(dtypes), tuple(order))
    return config, to_params(config, tensors, wanted, dtype), info


def _is_sorted(dtypes: Mapping[str, str]) -> bool:
    """Whether the names of each dtype are sorted, as safetensors' writers sort them."""
    by_dtype = collections.defaultdict(list)
    for name, dtype in dtypes.items():
        by_dtype[dtype].append(name)
    return all(names == sorted(names) for names in by_dtype.values())


def split_dtypes(dtypes: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The commonest dtype, and that of every tensor of another one."""
    common = collections.Counter(dtypes.values()).most_common(1)[0][0]
    return common, {name: dtype for name, dtype in dtypes.items() if dtype != common}


def official_to_params(
    tensors: Mapping[str, Any],
    *,
    dtype: np.dtype | None = DTYPES["float32"],
) -> tuple[ModelConfig, dict[str, np.ndarray], OfficialInfo]:
    """An official checkpoint as our parameters, in memory; see `open_official`."""
    config, params, info = open_official(tensors, dtype=dtype)
    return config, {name: param.read() for name, param in params.items()}, info


def has_official_form(config: ModelConfig) -> bool:
    """Whether a model has only parts that the official layout has."""
    return _unofficial(config) is None


def _unofficial(config: ModelConfig) -> str | None:
    """A part of a model that the official layout has not, and why; None if there is none."""
    if part := outside_table(config):
        return f"{part} has no official form: official files hold RWKV-7 blocks and plain attention"
    if config.key_conv and config.num_attention_blocks:
        knows_none = "the original knows no convolution on keys"
        return f"key_conv={config.key_conv} has no official form: {knows_none}"
    return None


def params_to_official(
    config: ModelConfig,
    params: Mapping[str, Any],
    info: OfficialInfo | None = None,
    dtype: np.dtype | None = None,
    *,
    every_row: bool = False,
) -> dict[str, LazyTensor]:
    """Official tensors of our parameters, read lazily.

    They have the order of the file they came from, else that of the released RWKV-7 files.

    Args:
      config: the model.
      params: arrays or lazy tensors under our names.
      info: of the file that the parameters came from; None: an RWKV-X file as its trainer writes
        it, or without attention blocks an RWKV-7 file as RWKV-LM writes it.
      dtype: of all tensors; None: that of `info`, without one the parameters' own.
      every_row: keep block 0's unused value residual where `info` does not say whether to.

    Raises:
      ConversionError: parameters that do not fit `config`, all of them listed; a model with parts
        that the official layout does not have.
    """
    params = as_lazy(params)
    check_params(param_shapes(config), params)
    if problem := _unofficial(config):
        raise ConversionError(f"a model with {problem}; keep it as our own (--to ours)")
    hybrid = config.num_attention_blocks > 0
    naming = official_naming(
        info.prefix if info else (_PREFIX if hybrid else ""),
        info.first_value_residual if info else every_row or not hybrid,
    )
    wanted = _in_file_order(slots(config, naming))
    if info is not None and info.order:
        by_name = {slot.name: slot for slot in wanted}
        if len(info.order) != len(wanted) or set(info.order) != by_name.keys():
            raise ConversionError("the order of the official file does not name its tensors")
        wanted = [by_name[name] for name in info.order]
    dtypes = {}
    for slot in wanted:
        if dtype is not None:
            dtypes[slot.name] = np.dtype(dtype)
        elif info is not None:
            dtypes[slot.name] = DTYPES[info.other_dtypes.get(slot.name, info.dtype)]
        else:
            dtypes[slot.name] = params[slot.parameter].dtype
    return from_params(params, wanted, dtypes)


def lost_in_official(config: ModelConfig, tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Lines "field: value -> value read back" for all that an official file does not tell.

    Args:
      config: the model.
      tensors: its official tensors; nothing is read.
    """
    lines = differences(config, open_official(tensors)[0])
    return [line for line in lines if line.partition(":")[0] not in _IN_SHAPES]


def _in_file_order(found: Iterable[Slot]) -> list[Slot]:
    """Embedding, blocks by number, final norm, head, attention blocks by number."""

    def place(slot: Slot) -> tuple:
        attention = slot.name.startswith(_ATTENTION_PREFIX)
        part = 0 if ".emb." in f".{slot.name}" else 2 if ".ln_out." in f".{slot.name}" else 3
        layer = re.search(r"(?:blocks|moba)\.(\d+)\.", slot.name)
        return (attention, 1 if layer else part, int(layer[1]) if layer else 0)

    return sorted(found, key=place)
