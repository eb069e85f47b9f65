"""The programs that the planner compiles: train steps of stages, prefill and decode steps.

They are the very functions that training and generation run, over a mesh of devices that are not
here, with shapes in place of arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels.chips import GIB
from rwkvx_jax.cache import Cache, over_cache
from rwkvx_jax.config import Config, ConfigError, ModelConfig, Stage
from rwkvx_jax.model import abstract_model, get_params, with_params
from rwkvx_jax.sharding import batch_sharding, fitting_sharding
from rwkvx_jax.training import model_flops
from rwkvx_jax.training.step import param_shardings, stage_program


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile.

    Attributes:
      kind: "train", "prefill" or "decode".
      name: of the stage, or what is read, for people.
      lower: traces it; to be called under the mesh.
      tokens: that one run takes in, over all devices.
      flops: that the mathematics asks for in one run, over all devices.
      total_tokens: of the whole stage; None where there is none.
      stage: that is trained; None otherwise.
      variant: of the attention kernels, as the table of kernel costs names it.
    """

    kind: str
    name: str
    lower: Callable[[], Any]
    tokens: int
    flops: float
    total_tokens: int | None = None
    stage: Stage | None = None
    variant: tuple[str, ...] = ()


def train_size(config: Config, stage: Stage) -> tuple[str, int]:
    """What a train step holds at the very least, for people and in bytes, over all devices."""
    model = config.stage_model(stage)
    tokens = stage.global_batch * stage.seq_len // stage.accumulation
    what = f"stage {stage.name!r}: {model.num_parameters:.3g} parameters in float32 and the "
    what += f"residual stream of {tokens:.3g} tokens"
    return what, 4 * model.num_parameters + 2 * tokens * model.width


def read_size(model: ModelConfig, batch: int, length: int) -> tuple[str, int]:
    """What a prefill or decode step holds at the very least, likewise."""
    what = f"{model.num_parameters:.3g} parameters in float32 and the caches of {batch:.3g} texts"
    states = 4 * batch * model.num_blocks * model.mixer_sizes.state
    rows = (
        4 * batch * length * model.num_attention_blocks * model.kv_width
    )  # bfloat16, keys, values
    return f"{what} of {length:.3g} rows", 4 * model.num_parameters + states + rows


def check_possible(what: str, size: int, memory: float) -> None:
    """Raises ConfigError where a program can't fit by arithmetic alone, before it is compiled."""
    if size > memory:
        raise ConfigError(
            f"{what} take at least {size / GIB:,.1f} GiB, and all devices together have "
            f"{memory / GIB:,.1f} GiB: make it smaller, or plan for more devices"
        )


def train_program(config: Config, stage: Stage, mesh: Mesh) -> Program:
    """The train step of a stage."""

    def lower():
        program = stage_program(config, stage, mesh)
        sharding = batch_sharding(mesh, stage.global_batch)
        array = lambda length, dtype: jax.ShapeDtypeStruct(
            (stage.global_batch, length), dtype, sharding=sharding
        )
        batch = {
            "tokens": array(stage.seq_len + 1, jnp.int32),
            "mask": array(stage.seq_len, jnp.float32),
        }
        if config.data.segmented:
            batch["segment_ids"] = array(stage.seq_len, jnp.int32)
        return program.train_step.lower(program.abstract_state(), batch)

    return Program(
        kind="train",
        name=stage.name,
        lower=lower,
        tokens=stage.global_batch * stage.seq_len,
        flops=model_flops.step_flops(config, stage),
        total_tokens=stage.tokens,
        stage=stage,
        variant=_variant(config.model),
    )


def read_program(config: Config, mesh: Mesh, batch: int, length: int, piece: int) -> Program:
    """Reading the next tokens of `batch` texts into a cache of `length` rows each.

    Args:
      config: the experiment; its last stage's model is used.
      mesh: rows of the batch lie along its data axes, heads along `tensor`, pages of the cache
        along `context`.
      batch: texts.
      length: rows of the cache.
      piece: tokens of each text at once: 1 is a decode step, more a piece of prefill. The figures
        are those of the last piece, which finds the cache full but for itself.

    Raises:
      ConfigError: a piece longer than the cache, or a size below 1.
    """
    if not 1 <= piece <= length or batch < 1:
        raise ConfigError(
            f"batch {batch}, length {length} and piece {piece}: batch must be at least 1, and the "
            "piece between 1 and the length"
        )
    model = abstract_model(config.model, config.run)
    decodes = piece == 1

    def read(params, tokens, cache):
        bound = with_params(model, params)
        return bound.decode(tokens[:, 0], cache) if decodes else bound.prefill(tokens, cache)

    def lower():
        place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        params = jax.tree.map(place, get_params(model), param_shardings(model, mesh))
        cache = jax.eval_shape(lambda: model.init_cache(batch, length))
        cache = jax.tree.map(place, cache, cache_shardings(cache, mesh))
        tokens = place(jax.ShapeDtypeStruct((batch, piece), jnp.int32), batch_sharding(mesh, batch))
        return jax.jit(read, donate_argnums=2).lower(params, tokens, cache)

    return Program(
        kind="decode" if decodes else "prefill",
        name=f"{batch} x {piece:,} tokens, cache {length:,}",
        lower=lower,
        tokens=batch * piece,
        flops=model_flops.prefill_flops(config.model, batch, piece, length - piece),
        variant=_variant(config.model),
    )


def _variant(model: ModelConfig) -> tuple[str, ...]:
    return f"C{model.chunk_size}", f"K{model.top_k}"


def cache_shardings(cache: Cache, mesh: Mesh) -> Cache:
    """Where a cache lies on a mesh; a dimension that this does not divide is whole everywhere."""
    return over_cache(partial(fitting_sharding, mesh), cache)
