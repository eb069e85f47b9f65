"""Time mix of RWKV-6 "Finch" (arXiv 2404.05892): data-dependent token shift and decay, bonus."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.config.mixers import DECAY_RANK, MIX_RANK
from rwkvx_jax.modules.mixers.base import (
    Fed,
    GroupNorm,
    LinearMixer,
    join_heads,
    mixed,
    per_channel,
    split_heads,
)
from rwkvx_jax.modules.parameters import LayerConstants, matrix, parameter, project, uniform


def decay_speed(constants: LayerConstants) -> jax.Array:
    """log(-log w) of the channels at first: from -6 to -1."""
    return -6.0 + 5.0 * constants.position ** (0.7 + 1.3 * constants.r01)


def first_bonus(constants: LayerConstants) -> jax.Array:
    """u at first: grows with the channel, zigzags from one to the next."""
    zigzag = ((jnp.arange(constants.config.width) + 1) % 3 - 1) * 0.1
    return constants.r01 * (1.0 - constants.position) + zigzag


class RWKV6(LinearMixer):
    """Parameters:

    x [1 + 5, D]: share of the previous token, for the low-rank mix and for w, k, v, r, g.
    x_1 [D, 5 R] x_2 [5, R, D]: what the token adds to the five shares.
    receptance key value gate output: matrices, stored [in, out].
    w0 w1 w2: decay exp(-exp(w0 + tanh(x w1) w2)); u [H, K]: bonus of the token's own value.
    ln_x: scale and bias of the per-head group norm.
    """

    read = "before"

    def __init__(self, config: ModelConfig, constants: LayerConstants, rngs: nnx.Rngs):
        width, self.heads = config.width, config.num_heads
        square = partial(matrix, config, rngs)
        powers = (1.0, 1.0, 1.0, 1.0, 0.5, 0.5)  # of the mix, w, k, v, r, g
        shares = jnp.stack([1.0 - constants.ramp ** (p * constants.r10) for p in powers])
        shares = shares.at[3].add(-0.3 * constants.r01)
        self.x = parameter(shares, "taps", "vector")
        random = lambda *shape: uniform(rngs.params(), shape, 0.01)
        self.x_1 = parameter(jnp.zeros((width, 5 * MIX_RANK)), "embed", "rank")
        self.x_2 = parameter(random(5, MIX_RANK, width), "taps", "rank", "heads")
        self.w0 = parameter(decay_speed(constants), "vector")
        self.w1 = parameter(jnp.zeros((width, DECAY_RANK)), "embed", "rank")
        self.w2 = parameter(random(DECAY_RANK, width), "rank", "heads")
        bonus = first_bonus(constants).reshape(self.heads, -1)
        self.u = parameter(bonus, "heads", "head_size")
        self.receptance, self.key = square(), square(0.1, 0.05)
        self.value, self.gate = square(), square(0.1, 0.05)
        self.output = parameter(jnp.zeros((width, width)), "heads", "embed")
        vector = lambda fill: parameter(jnp.full(width, fill), "vector")
        self.ln_x = GroupNorm(vector(1.0), vector(0.0), 64e-5)

    def feed(self, h, shift, lengths, segment_ids) -> Fed:
        mix, last = mixed(h, shift, lengths, segment_ids)
        for_w, for_k, for_v, for_r, for_g = map(mix, self._shares(h, mix))
        low_rank = project(jnp.tanh(project(for_w, self.w1[...])), self.w2[...])
        log_w = -jnp.exp(per_channel(self.w0) + low_rank.astype(jnp.float32))
        return self.fed(for_r, log_w, for_k, for_v, for_g, last)

    def fed(self, for_r, log_w, for_k, for_v, for_g, last) -> Fed:
        """From the inputs of the matrices, [B, T, D], and the shift of the next piece."""
        tokens = {
            "r": project(for_r, self.receptance[...]),
            "log_w": log_w,
            "k": project(for_k, self.key[...]),
            "v": project(for_v, self.value[...]),
        }
        tokens = {name: split_heads(x, self.heads) for name, x in tokens.items()}
        return Fed(tokens, last, (tokens, project(for_g, self.gate[...])))

    def _shares(self, h, mix) -> list[jax.Array]:
        """How much of the previous token w, k, v, r and g see, [B, T, D] each."""
        shares, weights = self.x[...], self.x_2[...].astype(h.dtype)
        added = jnp.tanh(project(mix(shares[0]), self.x_1[...]))
        added = added.reshape(*h.shape[:2], 5, MIX_RANK)
        return [
            shares[i + 1].astype(h.dtype)[None, None] + project(added[:, :, i], weights[i])
            for i in range(5)
        ]

    def finish(self, y, rest) -> jax.Array:
        tokens, gate = rest
        y = y.astype(jnp.float32) + own_value(tokens, self.u[...])
        y = join_heads(self.ln_x(y)).astype(gate.dtype) * jax.nn.silu(gate)
        return project(y, self.output[...])


def own_value(tokens: dict[str, jax.Array], u: jax.Array) -> jax.Array:
    """(r . u k) v: what a token reads of itself, [B, T, H, V] in float32."""
    r, k, v = (tokens[name].astype(jnp.float32) for name in ("r", "k", "v"))
    return jnp.sum(r * k * u[None, None], axis=-1, keepdims=True) * v
