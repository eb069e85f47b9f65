"""What a stage has tuned as a file of its own: LoRA factors, or learned initial states.

Such a file is one of ours (`convert.own`) with the tuned arrays instead of a model's parameters.
Its metadata also says how they are applied, and a hash of the base: the model that the stage
started from, whose parameters it left as they were. No other model takes the adapter.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from rwkvx_jax.checkpoint import as_own, describe_workdir, find_step, read_workdir
from rwkvx_jax.config import (
    ADAPTERS,
    INITIAL_STATE,
    ConfigError,
    LoRAConfig,
    ModelConfig,
    from_dict,
    to_dict,
)
from rwkvx_jax.convert.layout import VALUE_RESIDUAL, check_params, param_shapes
from rwkvx_jax.convert.own import ADAPTER, OwnCheckpoint, read_own
from rwkvx_jax.convert.safetensors_file import open_safetensors
from rwkvx_jax.convert.tensors import DTYPES, ConversionError, LazyTensor, in_dtype, parse_json
from rwkvx_jax.lora import adapted, thin


class Adapter(NamedTuple):
    """What a stage has tuned."""

    tuned: OwnCheckpoint  # the tuned arrays, and the configuration of the model with them
    lora: LoRAConfig | None  # None: the arrays are initial states
    base: str  # `base_hash` of the model that the stage started from

    @property
    def metadata(self) -> dict[str, str]:
        """Of its file, beside those of `own_metadata`."""
        lora = None if self.lora is None else to_dict(self.lora)
        return {ADAPTER: json.dumps({"lora": lora, "base": self.base})}


def run_adapter(src: str | Path, step: int | None = None) -> Adapter:
    """What the stage of a training run's checkpoint has tuned.

    Args:
      src: the run's work directory, or one of its checkpoints.
      step: of the checkpoint; None: the newest.

    Raises:
      ConfigError: no training run, no such checkpoint, or one of a stage that tunes nothing apart.
    """
    run_and_step = find_step(src, step)
    if run_and_step is None:
        raise ConfigError(f"{src} is no training run: --adapter writes what a run has tuned")
    run = describe_workdir(*run_and_step)
    stage = run.stage
    if stage.trainable not in ("lora", "state"):
        raise ConfigError(
            f"{src}: the checkpoint of step {run.step} belongs to stage {stage.name!r}, which "
            f'trains parameters of the model itself (trainable="{stage.trainable}"): name one of a '
            'stage that trains "lora" or "state" with --step, or write the model without --adapter'
        )
    own = as_own(read_workdir(*run_and_step, merge=False))
    tuned = {name: param for name, param in own.params.items() if stage.trains(name)}
    base = {name: param for name, param in own.params.items() if name not in tuned}
    lora = stage.lora if stage.trainable == "lora" else None
    return Adapter(own._replace(params=tuned), lora, base_hash(base))


def open_adapter(path: str | os.PathLike) -> Adapter:
    """Opens an adapter's file.

    Raises:
      ConversionError: not an adapter, damaged, or its arrays do not fit its configuration.
    """
    tensors, metadata = open_safetensors(path)
    try:
        values = parse_json(metadata[ADAPTER].encode())
        lora, base = values["lora"], values["base"]
        lora = None if lora is None else from_dict(LoRAConfig, lora, "lora")
    except (KeyError, TypeError) as error:
        raise ConversionError(
            f"{path} is no adapter, by its metadata: write one with "
            "`rwkvx convert RUN ADAPTER.safetensors --adapter`"
        ) from error
    except (ConfigError, ConversionError) as error:
        raise ConversionError(f"{path}: {error}") from error
    shapes_of = functools.partial(adapter_shapes, lora=lora)
    return Adapter(read_own(path, tensors, metadata, shapes_of), lora, base)


def adapter_shapes(config: ModelConfig, lora: LoRAConfig | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of an adapter, by name.

    Args:
      config: of the model.
      lora: of the stage; None for initial states.
    """
    shapes = param_shapes(config)
    if lora is None:
        return {name: shape for name, shape in shapes.items() if name == INITIAL_STATE}
    return {
        f"{ADAPTERS}.{name}.{part}": thin_shape
        for name, shape in shapes.items()
        if lora.adapts(name)
        for part, thin_shape in thin(shape, lora.rank).items()
    }


def merged_with(base: OwnCheckpoint, adapter: Adapter, where: str) -> OwnCheckpoint:
    """The tuned model, as converting the run itself gives it.

    Args:
      base: the model that the adapter's stage started from; it is read once for its hash.
      adapter: to be applied.
      where: the base, for messages.

    Returns:
      Float32 parameters, read lazily: W + alpha / rank A B for each adapted matrix W.

    Raises:
      ConversionError: another model than the adapter's base.
    """
    config, lora = adapter.tuned.config, adapter.lora
    replaced = INITIAL_STATE if lora is None else None
    float32 = DTYPES["float32"]
    kept = {n: p for n, p in in_dtype(base.params, float32).items() if n != replaced}
    tuned = in_dtype(adapter.tuned.params, float32)
    try:
        check_params({n: s for n, s in param_shapes(config).items() if n != replaced}, kept)
    except ConversionError as error:
        raise ConversionError(
            f"{where} has another shape than the adapter's base: {error}"
        ) from error
    if base_hash(kept) != adapter.base:
        raise ConversionError(
            f"{where} is not the adapter's base (by the hash of its parameters): name the model "
            "that the adapter's stage started from, at its original precision"
        )
    if lora is None:
        return adapter.tuned._replace(params=kept | tuned)
    matrices = {
        name: _adapted(
            matrix, tuned[f"{ADAPTERS}.{name}.a"], tuned[f"{ADAPTERS}.{name}.b"], lora.scale
        )
        for name, matrix in kept.items()
        if lora.adapts(name)
    }
    return adapter.tuned._replace(params=kept | matrices)


def _adapted(matrix: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float) -> LazyTensor:
    add = jax.jit(functools.partial(adapted, scale))

    def load(row: int | None) -> np.ndarray:
        return np.asarray(add(matrix.read(row), a.read(row), b.read(row)))

    return LazyTensor(matrix.name, matrix.shape, matrix.dtype, load, by_rows=True)


def base_hash(params: Mapping[str, LazyTensor]) -> str:
    """SHA-256 of the names, shapes and float32 values of parameters.

    The value residual of block 0, which nothing uses and official files lack, is left out.
    """
    digest = hashlib.sha256()
    for name in sorted(params):
        tensor = params[name]
        digest.update(f"{name} {tensor.shape}\n".encode())
        pieces = [tensor.read()[1:]] if name in VALUE_RESIDUAL else tensor.pieces()
        for piece in pieces:
            digest.update(np.ascontiguousarray(piece, np.float32).data)
    return digest.hexdigest()
