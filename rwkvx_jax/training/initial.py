"""Parameters that training starts from, read straight onto the devices of its mesh.

No host holds a whole model: of a workdir it reads the parts that its own devices hold, of a single
file one tensor (where the file keeps layers apart: one layer of one) after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rwkvx_jax.checkpoint import check_shapes, locate, nested, read_workdir
from rwkvx_jax.config import Config, ConfigError, ModelConfig
from rwkvx_jax.convert.finite import nonfinite_values, refuse
from rwkvx_jax.convert.load import open_checkpoint
from rwkvx_jax.convert.places import on_disk
from rwkvx_jax.convert.tensors import DTYPES, LazyTensor, tracked
from rwkvx_jax.digest import flat
from rwkvx_jax.model import abstract_model, get_params, param_axes
from rwkvx_jax.modules.trees import Params
from rwkvx_jax.training.step import shardings_of


def load_initial_params(path: str | Path, config: Config, mesh: Mesh) -> Params:
    """Parameters to start training from: of the hybrid itself, or of the RWKV-7 to be expanded.

    Args:
      path: as `checkpoint.load_checkpoint` takes it.
      config: the experiment.
      mesh: of its devices; all hosts have to call this together.

    Returns:
      float32 arrays, sharded as training holds them.

    Raises:
      ConfigError, ConversionError: nothing readable there, values that are not finite, or
        parameters of another shape than the config's; all differences are listed.
    """
    path, run_and_step = locate(path)

    def accept(found: ModelConfig) -> None:
        _check_usable(found, config, path)

    def target(shapes: Params, axes: Params) -> Params:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            shardings_of(shapes, axes, mesh),
        )

    if run_and_step is not None:
        return read_workdir(*run_and_step, accept=accept, target=target).params
    bad: dict[str, int] = {}

    def seen(name: str, array: np.ndarray) -> None:
        bad[name] = bad.get(name, 0) + nonfinite_values(array)

    with on_disk(path) as file:
        own = open_checkpoint(file, dtype=DTYPES["float32"])
        accept(own.config)
        model, tensors = abstract_model(own.config), tracked(own.params, seen)
        wanted = flat(target(get_params(model), param_axes(model)))
        params = {name: _spread(tensors[name], leaf) for name, leaf in wanted}
    refuse(bad, str(path))
    return nested(params)


def _spread(tensor: LazyTensor, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """A tensor of a file in the shape, dtype and sharding of `leaf`."""
    held = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    wanted = {_bounds(index, leaf.shape) for index in held}
    parts = {}
    if tensor.by_rows:
        for bounds in wanted:
            parts[bounds] = np.empty([end - first for first, end in bounds], leaf.dtype)
        for row, piece in enumerate(tensor.pieces()):
            for (rows, *others), part in parts.items():
                if rows[0] <= row < rows[1]:
                    part[row - rows[0]] = piece[tuple(slice(*bounds) for bounds in others)]
    else:
        whole = tensor.read()
        parts = {bounds: whole[tuple(slice(*b) for b in bounds)] for bounds in wanted}
    part_at = lambda index: parts[_bounds(index, leaf.shape)]
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part_at)


def _bounds(index: Sequence[slice], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """First and end along each dimension of a part of an array; can be a key, unlike slices."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _check_usable(found: ModelConfig, config: Config, path: Path) -> None:
    """Raises ConfigError for a model that training by `config` can't start from."""
    hybrid = found.num_attention_blocks > 0
    if hybrid and not config.stages[0].expanded:
        raise ConfigError(
            f"{path} already has attention blocks, but stage {config.stages[0].name!r} trains the "
            "plain RWKV-7: start from a RWKV-7, or set expanded=True"
        )
    whole = hybrid or not config.model.num_blocks  # a Transformer is not made by expansion
    wanted = config.model if whole else config.model.without_attention()
    if found.learned_state and not wanted.learned_state:
        raise ConfigError(
            f"{path} holds learned initial states, but model.learned_state is False: set it True"
        )
    # States that are not there yet begin as zeros, indexers as a selector of queries and keys.
    wanted = dataclasses.replace(wanted, learned_state=found.learned_state)
    if wanted.learned_selector and not found.learned_selector:
        wanted = dataclasses.replace(wanted, selector="bounds", index_size=0, selection_groups=0)
    lines = [
        f"{name}: {there} there, {here} in the config"
        for name, there in _shape(found).items()
        if there != (here := _shape(wanted)[name])
    ]
    if lines:
        raise ConfigError(
            f"{path} holds a model of another shape than the config's:\n  " + "\n  ".join(lines)
        )
    check_shapes(get_params(abstract_model(found)), wanted, str(path))


def _shape(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model that determine the shapes of its parameters."""
    names = ("vocab_size", "num_blocks", "num_attention_blocks", "width", "head_size")
    fields = {f"model.{name}": getattr(config, name) for name in names}
    return {
        "model.mixer": config.mixer,
        "model.backbone": config.backbone,
        **fields,
        "model.num_kv_heads": config.kv_heads if config.num_attention_blocks else 0,
        "model.qkv_bias": config.qkv_bias and config.num_attention_blocks > 0,
        "model.tied_embeddings": config.tied_embeddings,
        "model.shared_attention": config.shared_attention,
        # A convolution of attention keys, which a model without attention blocks has not.
        "model.key_conv": config.key_conv if config.num_attention_blocks else 0,
        # Gates of branches, and an indexer, likewise.
        "model.attention": "nsa" if config.gate_matrix and config.num_attention_blocks else "",
        "model.selector": config.selector
        if config.learned_selector and config.num_attention_blocks
        else "",
        "model.ffn_width": config.hidden_width,
        "model.low_rank_override": tuple(config.ranks) if config.mixer == "rwkv7" else (),
    }
