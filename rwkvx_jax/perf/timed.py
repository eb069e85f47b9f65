"""The models that `speed` and `prefill` time: one with sparse attention, the same with full
attention, and as many recurrent blocks of its kind.

They come from a checkpoint, or have random weights: times do not depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rwkvx_jax.checkpoint import load_checkpoint
from rwkvx_jax.config import ConfigError, ModelConfig, RunConfig
from rwkvx_jax.evals.models import check_output, require_at_least_1
from rwkvx_jax.generate.memory import memory_left
from rwkvx_jax.model import create_model, get_params, unstack
from rwkvx_jax.modules.trees import Params
from rwkvx_jax.records import Record
from rwkvx_jax.storage import WorkPath

LABELS = {
    "sparse": "sparse attention",
    "rwkv": "recurrent blocks alone",
    "full": "full attention",
}
TIMED = "model"
"""Label of the only model of a results file."""


class Timed(NamedTuple):
    """The hybrid that is timed, with one array a layer; the others are made of it."""

    config: ModelConfig
    run: RunConfig
    params: Params
    description: Record
    label: str = TIMED


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Flags of every measurement of time: which models."""

    output: WorkPath
    """Directory of the results."""
    checkpoint: WorkPath | None = None
    """Model to time; without one, a model of the sizes below with random weights."""
    num_blocks: int = 12
    num_attention_blocks: int = 4
    width: int = 768
    vocab_size: int = 65536
    chunk_size: int = 2048
    top_k: int = 3
    kinds: tuple[Literal["sparse", "rwkv", "full"], ...] = ("sparse", "rwkv", "full")
    """Models to time."""
    full_limit: int = 65536
    """Longest context of the full-attention hybrid."""

    def __post_init__(self):
        require_at_least_1(self, "full_limit", *(() if self.checkpoint else ("num_blocks",)))
        if not self.kinds:
            raise ConfigError("--kinds is empty: name at least one of sparse, rwkv, full")
        check_output(self.output)


def facts_of(model: Timed) -> str:
    """What a figure says of the hybrid and the machine."""
    config, machine = model.config, model.description
    return (
        f"{config.blocks_title} of width {config.width}, chunk size {config.chunk_size}, "
        f"top-k {config.top_k}; "
        f"{machine['device']}, {machine['cores']} cores"
    )


def load_model(options: ModelOptions) -> tuple[RunConfig, ModelConfig, Params]:
    """The hybrid's parameters, one array a layer."""
    if options.checkpoint is not None:
        loaded = load_checkpoint(options.checkpoint)
        return loaded.model.run, loaded.model.config, get_params(unstack(loaded.model))
    config = ModelConfig(
        num_blocks=options.num_blocks,
        num_attention_blocks=options.num_attention_blocks,
        width=options.width,
        vocab_size=options.vocab_size,
        chunk_size=options.chunk_size,
        top_k=options.top_k,
    )
    _check_size(config)
    cpu = jax.default_backend() == "cpu"
    run_config = RunConfig(compute_dtype="float32" if cpu else "bfloat16")
    return run_config, config, random_params(config, run_config)


def _check_size(config: ModelConfig) -> None:
    """Refuses random weights that can't fit into the memory, by their large matrices alone."""
    blocks = config.num_blocks + config.num_attention_blocks
    least = 4 * config.width * (8 * config.width * blocks + 2 * config.vocab_size)
    free = memory_left()
    if free is not None and least > free:
        raise ConfigError(
            f"a model of {blocks:,} blocks of width {config.width:,} and {config.vocab_size:,} "
            f"tokens has more than {least / 1e9:,.1f} GB of weights, and {free / 1e9:,.1f} GB are "
            "free: lower --num-blocks, --width or --vocab-size"
        )


def random_params(config: ModelConfig, run_config: RunConfig) -> Params:
    """Parameters of an unstacked model, drawn fast; good for nothing but timing."""
    rng = np.random.default_rng(0)
    shapes = get_params(layered_model(config, run_config))
    draw = lambda s: jnp.asarray(rng.standard_normal(s.shape, np.float32) * 0.02)
    return jax.tree.map(draw, shapes)


def layered_model(config: ModelConfig, run_config: RunConfig):
    """The model with shapes in place of arrays, one array a layer."""
    return jax.eval_shape(lambda: unstack(create_model(config, run_config)))


def make_configs(config: ModelConfig) -> dict[str, ModelConfig]:
    """The models that are compared, by kind."""
    blocks = config.num_blocks + config.num_attention_blocks
    return {
        "sparse": config,
        "rwkv": replace(config, num_blocks=blocks, num_attention_blocks=0, shared_attention=False),
        "full": replace(config, attention="full"),
    }


def kinds_of(model: Record) -> list[str]:
    """The kinds of models that a results file has times of."""
    return [kind for kind in LABELS if any(row["kind"] == kind for row in model["trials"])]
