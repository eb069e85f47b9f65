"""Low-rank adapters (LoRA): A [in, rank] and B [rank, out] beside a frozen matrix W.

The adapted matrix is W + alpha / rank A B. While a stage trains adapters they are parameters of
its own under `ADAPTERS`, named as the matrices they belong to, and the forward pass computes
x W + alpha / rank (x A) B, so that no gradient of W is ever made. Whatever follows the stage (later
stages, readers of its checkpoints) gets `merged` parameters: those of a plain model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rwkvx_jax.config import ADAPTERS, LoRAConfig, Stage
from rwkvx_jax.model import RWKVX, get_params, param_axes
from rwkvx_jax.modules.parameters import Adapted, uniform
from rwkvx_jax.modules.trees import Params, joined, select


def thin(wide: tuple[Any, ...], rank: Any) -> dict[str, tuple[Any, ...]]:
    """Shapes or axes of A and B, from those of their matrix and the rank or its axis."""
    return {"a": (*wide[:-1], rank), "b": (*wide[:-2], rank, wide[-1])}


def stage_params(model: RWKVX, stage: Stage) -> tuple[Params, Params]:
    """Shapes (float32) and logical axes of all parameters of a stage, its adapters included.

    Args:
      model: the abstract model that the stage trains.
      stage: says whether there are adapters, and which.
    """
    shapes, axes = get_params(model), param_axes(model)
    if stage.trainable != "lora":
        return shapes, axes
    small = jax.tree.map(
        lambda w: {
            name: jax.ShapeDtypeStruct(shape, w.dtype)
            for name, shape in thin(w.shape, stage.lora.rank).items()
        },
        select(shapes, stage.lora.adapts),
    )
    small_axes = jax.tree.map(
        lambda wide: thin(wide, "rank"),
        select(axes, stage.lora.adapts),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return {**shapes, ADAPTERS: small}, {**axes, ADAPTERS: small_axes}


def new_adapters(shapes: Params, shardings: Params, seed: int, stage: int) -> Params:
    """Fresh adapters: A uniform within 1 / sqrt(in), B zero, so that they change nothing.

    Args:
      shapes: of the adapters, from `stage_params`.
      shardings: of the same.
      seed: of the model.
      stage: its number, so that adapters of two stages do not span the same space.
    """

    def make() -> Params:
        leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), stage), len(leaves))
        values = [
            uniform(key, leaf.shape, leaf.shape[-2] ** -0.5)
            if path[-1].key == "a"
            else jnp.zeros(leaf.shape)
            for key, (path, leaf) in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, values)

    return jax.jit(make, out_shardings=shardings)()


def attached(params: Params, lora: LoRAConfig) -> Params:
    """Parameters for `with_params`, where each adapted matrix carries its adapter (if there are
    adapters among `params`)."""
    if ADAPTERS not in params:
        return params
    matrices, others = _split(params, lora)
    carry = lambda w, a, b: Adapted(w, a, lora.scale * b)
    return joined(others, _pairwise(carry, matrices, params[ADAPTERS]))


def merged(params: Params, lora: LoRAConfig, *, keep: bool = False) -> Params:
    """Parameters of a plain model: adapters are added to their matrices (if there are any).

    Args:
      params: of a stage; the arrays of adapted matrices are given away.
      lora: of the stage.
      keep: they are not.
    """
    if ADAPTERS not in params:
        return params
    matrices, others = _split(params, lora)
    shardings = jax.tree.map(lambda w: w.sharding, matrices)
    program = jax.jit(
        lambda matrices, adapters: _pairwise(
            functools.partial(adapted, lora.scale), matrices, adapters
        ),
        out_shardings=shardings,
        donate_argnums=() if keep else 0,
    )
    return joined(others, program(matrices, params[ADAPTERS]))


def adapted(scale: float, matrix: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """W + scale A B, for W [..., in, out], A [..., in, rank] and B [..., rank, out]."""
    return matrix + scale * jnp.matmul(a, b, precision="highest")


def _split(params: Params, lora: LoRAConfig) -> tuple[Params, Params]:
    """The adapted matrices, and all parameters but adapters."""
    others = {name: tree for name, tree in params.items() if name != ADAPTERS}
    return select(others, lora.adapts), others


def _pairwise(fn: Callable[..., Any], matrices: Params, adapters: Params) -> Params:
    """`fn` of each matrix with its A and B."""
    return jax.tree.map(lambda w, pair: fn(w, pair["a"], pair["b"]), matrices, adapters)
