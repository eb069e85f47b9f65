"""RWKV-X in JAX/Flax: RWKV-7 blocks interleaved with top-k chunk sparse attention.

The names below are the surface for use in one's own code. They are loaded on first use, so that
`import rwkvx_jax` is quick and needs nothing but jax, flax, jaxtyping and numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkvx_jax.cache import CachePolicy
    from rwkvx_jax.checkpoint import load_model
    from rwkvx_jax.config import Config, ConfigError, ModelConfig, RunConfig, Stage
    from rwkvx_jax.model import RWKVX, create_model, get_params, with_params
    from rwkvx_jax.ops.block_sparse import sparse_attention
    from rwkvx_jax.ops.delta_rule import generalized_delta_rule
    from rwkvx_jax.ops.full_attention import full_attention
    from rwkvx_jax.ops.recurrence import wkv7
    from rwkvx_jax.ops.selection import select_chunks
    from rwkvx_jax.training.expand import expand
    from rwkvx_jax.training.loop import fit

__version__ = "0.2.0"

_HOMES = {
    "CachePolicy": "cache",
    "Config": "config",
    "ConfigError": "config",
    "ModelConfig": "config",
    "RunConfig": "config",
    "Stage": "config",
    "RWKVX": "model",
    "create_model": "model",
    "get_params": "model",
    "with_params": "model",
    "load_model": "checkpoint",
    "wkv7": "ops.recurrence",
    "generalized_delta_rule": "ops.delta_rule",
    "select_chunks": "ops.selection",
    "sparse_attention": "ops.block_sparse",
    "full_attention": "ops.full_attention",
    "expand": "training.expand",
    "fit": "training.loop",
}

__all__ = [
    "RWKVX",
    "CachePolicy",
    "Config",
    "ConfigError",
    "ModelConfig",
    "RunConfig",
    "Stage",
    "create_model",
    "expand",
    "fit",
    "full_attention",
    "generalized_delta_rule",
    "get_params",
    "load_model",
    "select_chunks",
    "sparse_attention",
    "with_params",
    "wkv7",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
