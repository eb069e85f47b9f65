"""Time mix of RWKV-5 "Eagle" (arXiv 2404.05892): a learned decay per channel, bonus, gate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.modules.mixers.base import (
    Fed,
    GroupNorm,
    LinearMixer,
    join_heads,
    mixed,
    split_heads,
)
from rwkvx_jax.modules.mixers.rwkv6 import decay_speed, first_bonus, own_value
from rwkvx_jax.modules.parameters import LayerConstants, input_matrix, parameter, project


class RWKV5(LinearMixer):
    """Parameters:

    x_r x_k x_v x_g: share of the previous token in each input.
    receptance key value gate output: matrices, stored [in, out].
    w0: decay exp(-exp(w0)); u [H, K]: bonus of the token's own value.
    ln_x: scale and bias of the per-head group norm.
    """

    read = "before"

    def __init__(self, config: ModelConfig, constants: LayerConstants, rngs: nnx.Rngs):
        width, self.heads = config.width, config.num_heads
        square = lambda gain, bound: parameter(
            input_matrix(config, rngs.params(), (width, width), gain=gain, bound=bound),
            "embed", "heads",
        )  # fmt: skip
        vector = lambda value: parameter(value, "vector")
        share = lambda power: vector(1.0 - constants.ramp ** (power * constants.r10))
        self.x_r, self.x_g, self.x_k = share(0.5), share(0.5), share(1.0)
        self.x_v = vector(1.0 - constants.ramp**constants.r10 - 0.3 * constants.r01)
        self.w0 = vector(decay_speed(constants))
        self.u = parameter(first_bonus(constants).reshape(self.heads, -1), "heads", "head_size")
        self.receptance, self.key = square(1.0, 0.5), square(0.1, 0.05)
        self.value, self.gate = square(1.0, 0.5), square(0.1, 0.05)
        self.output = parameter(jnp.zeros((width, width)), "heads", "embed")
        self.ln_x = GroupNorm(vector(jnp.ones(width)), vector(jnp.zeros(width)), 64e-5)

    def feed(self, h, shift, lengths) -> Fed:
        mix, last = mixed(h, shift, lengths)
        split = lambda x: split_heads(x, self.heads)
        log_w = jnp.broadcast_to(-jnp.exp(self.w0[...])[None, None], h.shape)
        tokens = {
            "r": split(project(mix(self.x_r), self.receptance[...])),
            "log_w": split(log_w),
            "k": split(project(mix(self.x_k), self.key[...])),
            "v": split(project(mix(self.x_v), self.value[...])),
        }
        return Fed(tokens, last, (tokens, project(mix(self.x_g), self.gate[...])))

    def finish(self, y, rest) -> jax.Array:
        tokens, gate = rest
        y = y.astype(jnp.float32) + own_value(tokens, self.u[...])
        y = join_heads(self.ln_x(y)).astype(gate.dtype) * jax.nn.silu(gate)
        return project(y, self.output[...])
