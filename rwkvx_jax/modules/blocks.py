"""The two block kinds: pre-norm residual pairs of a mixer and a channel mix.

`stack_blocks` makes all blocks of one kind at once; their parameters carry a leading layer axis,
over which the model scans.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from rwkvx_jax.cache import BlockState
from rwkvx_jax.config import ModelConfig, RunConfig
from rwkvx_jax.modules.attention import Attention
from rwkvx_jax.modules.channel_mix import CHANNEL_MIXES
from rwkvx_jax.modules.mixers import MIXERS
from rwkvx_jax.modules.nsa import NativeSparseAttention
from rwkvx_jax.modules.parameters import LayerConstants, norm
from rwkvx_jax.modules.remat import keep
from rwkvx_jax.sharding import constrain


class RWKVBlock(nnx.Module):
    """x += time_mix(ln1(x)); x += channel_mix(ln2(x))."""

    def __init__(self, config: ModelConfig, layer: jax.Array, rngs: nnx.Rngs, dtype: jnp.dtype):
        constants = LayerConstants(config, layer, config.num_blocks)
        self.ln1 = norm(config, rngs, dtype)
        self.ln2 = norm(config, rngs, dtype)
        self.time_mix = MIXERS[config.mixer](config, constants, rngs)
        self.channel_mix = CHANNEL_MIXES[config.backbone](config, constants, rngs)

    def begun(self, state: BlockState, fresh: Bool[Array, " B"]) -> BlockState:
        """`state`, but where fresh [B] the one that the block starts a text from."""
        return state._replace(time_mix=self.time_mix.begun(state.time_mix, fresh))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        v_first: Float[Array, "B T D"],
        first: Bool[ArrayLike, ""],
        run: RunConfig,
        state: BlockState | None = None,
        lengths: Int[Array, " B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], BlockState]:
        """Returns x and v_first for the next block, and the new state."""
        time_state, shift = (None, None) if state is None else state
        mixed, v_first, time_state = self.time_mix(
            self.ln1(x), v_first, first, run, time_state, lengths, segment_ids
        )
        x = keep(constrain(x + mixed, "batch", "time", None))
        mixed, shift = self.channel_mix(self.ln2(x), shift, lengths, segment_ids)
        x = constrain(x + mixed, "batch", "time", None)
        return x, v_first, BlockState(time_state, shift)


class AttentionBlock(nnx.Module):
    """x += attention(ln1(x)); x += channel_mix(ln2(x))."""

    def __init__(self, config: ModelConfig, layer: jax.Array, rngs: nnx.Rngs, dtype: jnp.dtype):
        constants = LayerConstants(config, layer, config.num_blocks or config.num_attention_blocks)
        self.ln1 = norm(config, rngs, dtype)
        self.ln2 = norm(config, rngs, dtype)
        kind = NativeSparseAttention if config.attention == "nsa" else Attention
        self.attention = kind(config, rngs)
        self.channel_mix = CHANNEL_MIXES[config.backbone](config, constants, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: Callable[[Attention, jax.Array], tuple[jax.Array, Any]],
        ffn_shift: Float[Array, "B X"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B X"], Any]:
        """Returns x, the new shift, and what `attend` returns beside its output.

        `attend` says how the attention reads: within the sequence, or from a cache.
        """
        mixed, kept = attend(self.attention, self.ln1(x))
        x = keep(constrain(x + mixed, "batch", "time", None))
        mixed, ffn_shift = self.channel_mix(self.ln2(x), ffn_shift, lengths, segment_ids)
        return constrain(x + mixed, "batch", "time", None), ffn_shift, kept


def stack_blocks(
    kind: type[RWKVBlock] | type[AttentionBlock],
    count: int,
    config: ModelConfig,
    rngs: nnx.Rngs,
    dtype: jnp.dtype,
):
    """`count` blocks as one module whose parameters have a leading axis of that size."""
    make = lambda rngs, layer: kind(config, layer, rngs, dtype)
    return jax.vmap(make)(rngs.split(count), jnp.arange(count, dtype=jnp.float32))
