"""RWKV-X in JAX/Flax: RWKV-7 blocks interleaved with top-k chunk sparse attention.

The names below are the surface for use in one's own code. They are loaded on first use, so that
`import rwkvx_jax` is quick and needs nothing but jax, flax and numpy.
"""

import importlib

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
    "select_chunks": "ops.selection",
    "sparse_attention": "ops.block_sparse",
    "full_attention": "ops.full_attention",
    "expand": "training.expand",
    "fit": "training.loop",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
