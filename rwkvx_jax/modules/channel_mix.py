"""Channel mix: the token-shifted squared-ReLU MLP of both block kinds (spec 1.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.modules import context
from rwkvx_jax.modules.parameters import LayerConstants, orthogonal, parameter, project, uniform
from rwkvx_jax.modules.remat import keep
from rwkvx_jax.sharding import constrain, sequence_parts


def previous_token(
    h: jax.Array,  # [B, T, D]
    shift: jax.Array | None,  # [B, D], the input before h, or None: zeros
) -> jax.Array:
    """h moved one step later in time: [B, T, D], beginning with `shift`."""
    if shift is None and sequence_parts(h.shape[1]) > 1:
        return context.previous_token(h)
    first = jnp.zeros_like(h[:, :1]) if shift is None else shift[:, None].astype(h.dtype)
    return jnp.concatenate([first, h[:, :-1]], axis=1)


def last_valid(
    h: jax.Array,  # [B, T, D]
    shift: jax.Array | None,  # [B, D]
    lengths: jax.Array | None,  # [B], valid tokens of each row, or None: all
) -> jax.Array:
    """The last valid row of h, [B, D]; `shift` where a row has none."""
    if lengths is None:
        return h[:, -1]
    last = jnp.take_along_axis(h, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    before = jnp.zeros_like(last) if shift is None else shift.astype(h.dtype)
    return jnp.where((lengths > 0)[:, None], last, before)


class ChannelMix(nnx.Module):
    """x_k: share of the previous token; key, value: the two matrices."""

    def __init__(self, config: ModelConfig, constants: LayerConstants, rngs: nnx.Rngs):
        width, hidden = config.width, config.hidden_width
        if constants.new:
            key = orthogonal(rngs.params(), (width, hidden), 1.0)
        else:
            key = uniform(rngs.params(), (width, hidden), 0.5 * width**-0.5)
        self.x_k = parameter(constants.channel_shift(), "vector")
        self.key = parameter(key, "embed", "ffn")
        self.value = parameter(jnp.zeros((hidden, width)), "ffn", "embed")

    def __call__(
        self,
        h: jax.Array,  # [B, T, D]
        shift: jax.Array | None = None,  # [B, D]
        lengths: jax.Array | None = None,  # [B]
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the output [B, T, D] in h's dtype and the new shift [B, D]."""
        x = h + (previous_token(h, shift) - h) * self.x_k[...][None, None].astype(h.dtype)
        hidden = keep(constrain(project(x, self.key[...]), "batch", "time", "ffn"))
        out = project(jnp.square(jax.nn.relu(hidden)), self.value[...])
        return out, last_valid(h, shift, lengths)
