"""RWKV-7 under flash-linear-attention's names, in its own and in rwkv7-hf's directories.

The same model under other names: low-rank pairs are small linear layers with the offset as a
bias, and vectors lack leading axes. Files of early 2025 keep the six token-shift vectors fused in
one tensor `x_x` [6, D], in the order r, w, k, v, a, g; the oldest also have an unused value
residual in layer 0. Reading only: exports have the official names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.convert.infer import infer_config
from rwkvx_jax.convert.layout import Naming, check, slots, to_params
from rwkvx_jax.convert.official import (
    OfficialInfo,
    official_naming,
    split_dtypes,
    without_wrappers,
)
from rwkvx_jax.convert.tensors import ConversionError, LazyTensor

_FUSED_ORDER = "rwkvag"
_FUSED = ".attn.x_x"


def has_fla_names(names: Collection[str]) -> bool:
    """Whether these names of tensors are flash-linear-attention's."""
    return any("model.layers." in name and ".attn." in name for name in names)


def open_fla(
    tensors: Mapping[str, LazyTensor], *, tied: bool = False, dtype: np.dtype | None = None
) -> tuple[ModelConfig, dict[str, LazyTensor], OfficialInfo]:
    """RWKV-7 under flash-linear-attention's names as our parameters, read lazily.

    Args:
      tensors: of the model.
      tied: a head that is missing is the embedding.
      dtype: of the parameters; None keeps the stored one.

    Returns:
      As `official.open_official`; the info describes the RWKV-7 file an export would make.

    Raises:
      ConversionError: tensors that are missing, extra or contradictory (all of them listed).
    """
    # "model." belongs to the names here.
    tensors = without_wrappers(tensors, ("_orig_mod.", "module."))
    tensors = _split_fused(tensors)
    if tied and "lm_head.weight" not in tensors and "model.embeddings.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embeddings.weight"]
    naming = Naming(
        "fla",
        top="{}",
        block="model.layers.{i}.{}",
        first_value_residual=any(n.startswith("model.layers.0.attn.v_lora.") for n in tensors),
    )
    config = infer_config(tensors, naming)
    wanted = list(slots(config, naming))
    check(tensors, wanted)
    stored = {(slot.parameter, slot.row): tensors[slot.name].dtype.name for slot in wanted}
    exported = slots(config, official_naming("", naming.first_value_residual))
    dtypes = {slot.name: stored[slot.parameter, slot.row] for slot in exported}
    info = OfficialInfo("", naming.first_value_residual, *split_dtypes(dtypes))
    return config, to_params(config, tensors, wanted, dtype), info


def _split_fused(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Replaces each fused token-shift tensor by its six vectors."""
    result = {}
    for name, tensor in tensors.items():
        if not name.endswith(_FUSED):
            result[name] = tensor
            continue
        if len(tensor.shape) != 2 or tensor.shape[0] != len(_FUSED_ORDER):
            raise ConversionError(f"{name} has shape {tensor.shape}, not [6, width]")
        for row, letter in enumerate(_FUSED_ORDER):
            vector = name.removesuffix("x") + letter
            result[vector] = _row(tensor, row, vector)
    return result


def _row(tensor: LazyTensor, index: int, name: str) -> LazyTensor:
    def load(row):
        array = tensor.read(index)
        return array if row is None else array[row]

    return LazyTensor(name, tensor.shape[1:], tensor.dtype, load)
