"""Block expansion: a plain RWKV-7 becomes a hybrid by gaining attention blocks.

With zero-initialised output projections (`attention_init="zero"`, the paper, and "aligned") the
hybrid computes exactly what the RWKV-7 computed. With "copy" (the repository) each new block takes
the projections of the RWKV-7 block before it, and the function changes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rwkvx_jax.config import ConfigError, ModelConfig
from rwkvx_jax.model import create_model, get_params
from rwkvx_jax.modules.trees import Params, joined

_COPIED = (
    ("attention", "time_mix", ("receptance", "key", "value", "output")),
    ("channel_mix", "channel_mix", ("key", "value")),
)


def parameters_read(config: ModelConfig) -> list[str]:
    """Names of those parameters of the RWKV-7 on which the attention blocks of `config` depend."""
    if config.attention_init != "copy":
        return []
    return [f"blocks.{source}.{name}" for _, source, names in _COPIED for name in names]


def new_attention_blocks(config: ModelConfig, shardings: Params | None = None) -> Params:
    """Freshly initialised attention blocks of a model, as `config.init_seed` gives them."""
    make = lambda: get_params(create_model(config))["attention_blocks"]
    return jax.jit(make, out_shardings=shardings)()


def expand(params: Params, config: ModelConfig, shardings: Params | None = None) -> Params:
    """Adds the attention blocks of `config` to the parameters of a plain RWKV-7.

    Args:
      params: parameters of `config.without_attention()`, all on the same devices; kept as they are.
        Those of `parameters_read(config)` are enough.
      config: the hybrid.
      shardings: where to make the attention blocks; None: on the default device.

    Raises:
      ConfigError: the parameters already have attention blocks, or `config` has none.
    """
    if "attention_blocks" in params:
        raise ConfigError("these parameters already have attention blocks: nothing to expand")
    if not config.num_attention_blocks:
        raise ConfigError("model.num_attention_blocks is 0: nothing to expand to")
    attention = new_attention_blocks(config, shardings)
    if config.attention_init == "copy":
        for target, copies in _copies(params["blocks"], config.blocks_per_group).items():
            attention[target] |= copies
    return {**params, "attention_blocks": attention}


def with_initial_states(params: Params, config: ModelConfig) -> Params:
    """The parameters with initial states of the RWKV-7 blocks: zeros, where they have none yet.

    Args:
      params: of a model that differs from `config` in these states at most.
      config: with `learned_state`.
    """
    if "initial_state" in params["blocks"]["time_mix"]:
        return params
    shape = (config.num_blocks, config.num_heads, config.head_size, config.head_size)
    states = {"blocks": {"time_mix": {"initial_state": np.zeros(shape, np.float32)}}}
    return joined(params, states)


def with_indexers(params: Params, config: ModelConfig) -> Params:
    """The parameters with indexers as they begin, where the attention blocks have none yet.

    Args:
      params: of a model that differs from `config` in these at most.
      config: with a learned selector.
    """
    if "indexer" in params["attention_blocks"]["attention"]:
        return params
    indexer = jax.device_get(new_attention_blocks(config)["attention"]["indexer"])
    return joined(params, {"attention_blocks": {"attention": {"indexer": indexer}}})


@functools.partial(jax.jit, static_argnums=1)  # one program, whatever devices and hosts hold parts
def _copies(blocks: Params, interval: int) -> Params:
    """The matrices of attention blocks that are those of every `interval`-th RWKV-7 block."""
    # A slice of everything is the same array, and training gives every array away: hence the copy.
    return {
        target: {name: jnp.copy(blocks[source][name][interval - 1 :: interval]) for name in names}
        for target, source, names in _COPIED
    }
