"""Time mix of RWKV-5 "Eagle" (arXiv 2404.05892): a learned decay per channel, bonus, gate."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from flax import nnx

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.modules.mixers.base import Fed, GroupNorm, mixed
from rwkvx_jax.modules.mixers.rwkv6 import RWKV6, decay_speed, first_bonus
from rwkvx_jax.modules.parameters import LayerConstants, matrix, parameter


class RWKV5(RWKV6):
    """Parameters:

    x_r x_k x_v x_g: share of the previous token in each input.
    receptance key value gate output: matrices, stored [in, out].
    w0: decay exp(-exp(w0)); u [H, K]: bonus of the token's own value.
    ln_x: scale and bias of the per-head group norm.
    """

    def __init__(self, config: ModelConfig, constants: LayerConstants, rngs: nnx.Rngs):
        width, self.heads = config.width, config.num_heads
        square = partial(matrix, config, rngs)
        vector = lambda value: parameter(value, "vector")
        share = lambda power: vector(1.0 - constants.ramp ** (power * constants.r10))
        self.x_r, self.x_g, self.x_k = share(0.5), share(0.5), share(1.0)
        self.x_v = vector(1.0 - constants.ramp**constants.r10 - 0.3 * constants.r01)
        self.w0 = vector(decay_speed(constants))
        self.u = parameter(first_bonus(constants).reshape(self.heads, -1), "heads", "head_size")
        self.receptance, self.key = square(), square(0.1, 0.05)
        self.value, self.gate = square(), square(0.1, 0.05)
        self.output = parameter(jnp.zeros((width, width)), "heads", "embed")
        self.ln_x = GroupNorm(vector(jnp.ones(width)), vector(jnp.zeros(width)), 64e-5)

    def feed(self, h, shift, lengths, segment_ids) -> Fed:
        mix, last = mixed(h, shift, lengths, segment_ids)
        log_w = jnp.broadcast_to(-jnp.exp(self.w0[...])[None, None], h.shape)
        return self.fed(mix(self.x_r), log_w, mix(self.x_k), mix(self.x_v), mix(self.x_g), last)
