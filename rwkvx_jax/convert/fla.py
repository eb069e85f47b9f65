"""flash-linear-attention's RWKV-7 checkpoints (Hugging Face directories with a config.json).

The same model under other names: low-rank pairs are small linear layers with the offset as a
bias, and vectors lack leading axes. Files of early 2025 keep the six token-shift vectors fused in
one tensor `x_x` [6, D], in the order r, w, k, v, a, g; the oldest also have an unused value
residual in layer 0. Hybrids with flash-linear-attention's own attention layers, and options that
change the mathematics, are refused. Reading only: exports are in the official layout.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.convert.files import open_tensors
from rwkvx_jax.convert.infer import infer_config
from rwkvx_jax.convert.layout import Naming, check, slots, to_params
from rwkvx_jax.convert.official import (
    OfficialInfo,
    official_naming,
    split_dtypes,
    without_wrappers,
)
from rwkvx_jax.convert.tensors import ConversionError, LazyTensor, read_json

_FUSED_ORDER = "rwkvag"
_FUSED = ".attn.x_x"
_GROUP_NORM_EPS = 64e-5
# Options that change the mathematics: the values of RWKV-7, which are the defaults as well.
_REQUIRED = {
    "norm_first": True,
    "norm_bias": True,
    "norm_eps": 1e-5,
    "hidden_act": "sqrelu",
    "attn": None,
}


def is_fla(path: str | os.PathLike) -> bool:
    """Whether a path is a directory that holds a config.json."""
    return (Path(path) / "config.json").is_file()


def open_fla(
    path: str | os.PathLike, *, dtype: np.dtype | None = None
) -> tuple[ModelConfig, dict[str, LazyTensor], OfficialInfo]:
    """A flash-linear-attention RWKV-7 directory as our parameters, read lazily.

    Args:
      path: directory with config.json and safetensors or torch files.
      dtype: of the parameters; None keeps the stored one.

    Returns:
      As `official.open_official`; the info describes the RWKV-7 file an export would make.

    Raises:
      ConversionError: another model, an option that our model lacks, or tensors that are missing,
        extra or contradictory (all of them listed).
    """
    path = Path(path)
    options = _read_options(path / "config.json")
    # "model." belongs to the names here.
    tensors = without_wrappers(open_tensors(path)[0], ("_orig_mod.", "module."))
    tensors = _split_fused(tensors)
    if options.get("tie_word_embeddings") and "lm_head.weight" not in tensors:
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
    _check_options(path / "config.json", options, config)
    stored = {(slot.parameter, slot.row): tensors[slot.name].dtype.name for slot in wanted}
    exported = slots(config, official_naming("", naming.first_value_residual))
    dtypes = {slot.name: stored[slot.parameter, slot.row] for slot in exported}
    info = OfficialInfo("", naming.first_value_residual, *split_dtypes(dtypes))
    return config, to_params(config, tensors, wanted, dtype), info


def _read_options(path: Path) -> dict[str, Any]:
    options = read_json(path)
    options = options if isinstance(options, dict) else {}
    if {"model", "stages"} <= options.keys():
        raise ConversionError(
            f"{path.parent} is a training run that has saved no checkpoint yet: wait for its first "
            "one (run.checkpoint_every)"
        )
    kind = options.get("model_type")
    if kind not in ("rwkv7", "rwkv7_fla"):
        raise ConversionError(f"{path}: model_type is {kind!r}; only RWKV-7 can be converted")
    wrong = [
        f"{name} = {options[name]!r} (only {value!r})"
        for name, value in _REQUIRED.items()
        if options.get(name, value) != value
    ]
    if wrong:
        raise ConversionError(f"{path}: options that our model does not have: {', '.join(wrong)}")
    return options


def _check_options(path: Path, options: Mapping[str, Any], config: ModelConfig) -> None:
    """Holds config.json against the shapes."""
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_blocks,
        "intermediate_size": config.hidden_width,
        "head_dim": config.head_size,
        "num_heads": config.num_heads,
    }
    wrong = [
        f"{name} is {options[name]}, but the tensors say {size}"
        for name, size in sizes.items()
        if options.get(name) not in (None, size)
    ]
    if wrong:
        raise ConversionError(f"{path}: {'; '.join(wrong)}")
    epsilon = config.head_size * _REQUIRED["norm_eps"]
    if not np.isclose(epsilon, _GROUP_NORM_EPS):
        raise ConversionError(
            f"{path}: head_dim {config.head_size} makes flash-linear-attention normalise heads "
            f"with epsilon {epsilon:g}; ours is {_GROUP_NORM_EPS:g} as in the official code, which "
            "agrees only for head_dim 64"
        )


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
