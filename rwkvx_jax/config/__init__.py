"""Configuration: frozen dataclasses, presets, validation and their JSON form.

Mathematics (`ModelConfig`), implementation (`RunConfig`) and machine (`MeshConfig`) are separate:
a checkpoint's meaning depends on the first alone. `Config` adds data, optimizer and the list of
training stages. Everything here is plain Python; no jax arrays, no imports from other rooms.
Invalid values raise `ConfigError`, which names the value and the remedy.
"""

from rwkvx_jax.config.data import DataConfig, SourceConfig, Targets
from rwkvx_jax.config.experiment import (
    ADAPTERS,
    INITIAL_STATE,
    Config,
    LongCEConfig,
    LoRAConfig,
    OptimizerConfig,
    Stage,
)
from rwkvx_jax.config.model import LowRankRule, LowRankWidths, ModelConfig, low_rank_widths
from rwkvx_jax.config.run import MeshConfig, Recurrence, RunConfig, SparseAttention
from rwkvx_jax.config.values import ConfigError, UserError, differences, from_dict, to_dict

__all__ = [
    "ADAPTERS",
    "INITIAL_STATE",
    "Config",
    "ConfigError",
    "DataConfig",
    "LoRAConfig",
    "LongCEConfig",
    "LowRankRule",
    "LowRankWidths",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Recurrence",
    "RunConfig",
    "SourceConfig",
    "SparseAttention",
    "Stage",
    "Targets",
    "UserError",
    "differences",
    "from_dict",
    "low_rank_widths",
    "to_dict",
]
