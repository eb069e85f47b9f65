"""Mamba-2 (arXiv 2405.21060): a state space with one decay a head, shared reads and addresses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.modules.mixers.base import (
    Fed,
    LinearMixer,
    join_heads,
    per_channel,
    rms_norm,
    short_convolution,
    split_heads,
)
from rwkvx_jax.modules.mixers.deltanet import first_rates, first_steps, first_taps
from rwkvx_jax.modules.parameters import (
    LayerConstants,
    input_matrix,
    parameter,
    project,
    uniform,
)


class Mamba2(LinearMixer):
    """Parameters, with I = 2 D inner channels in heads of `head_size` and N = 2 `head_size` keys:

    input [D, I + (I + 2 N) + heads]: gate z, then x, b and c, then step sizes.
    conv [CONV, I + 2 N] conv_bias: taps over time on x, b and c, the token's own first.
    rate, step [heads]: log decay -exp(rate) dt with dt = softplus(. + step).
    skip [heads]: how much of x reaches the output directly.
    norm [I]: scale of the norm of the gated output.
    output [I, D].
    """

    def __init__(self, config: ModelConfig, constants: LayerConstants, rngs: nnx.Rngs):
        width, size = config.width, config.head_size
        self.inner, self.keys, self.heads = 2 * width, 2 * size, 2 * width // size
        self.mixed = self.inner + 2 * self.keys
        columns = self.inner + self.mixed + self.heads
        first = input_matrix(config, rngs.params(), (width, columns), gain=1.0, bound=0.5)
        self.input = parameter(first, "embed", "heads")
        self.conv = parameter(first_taps(rngs, self.mixed), "taps", "vector")
        self.conv_bias = parameter(uniform(rngs.params(), (self.mixed,), 0.5), "vector")
        self.rate = parameter(first_rates(rngs, self.heads), "heads")
        self.step = parameter(first_steps(rngs, self.heads), "heads")
        self.skip = parameter(jnp.ones(self.heads), "heads")
        self.norm = parameter(jnp.ones(self.inner), "vector")
        self.output = parameter(jnp.zeros((self.inner, width)), "heads", "embed")

    def feed(self, h, shift, lengths) -> Fed:
        together = project(h, self.input[...])
        gate, mixed, dt = jnp.split(together, (self.inner, self.inner + self.mixed), axis=-1)
        mixed, last = short_convolution(mixed, self.conv[...], shift, lengths)
        mixed = jax.nn.silu(mixed + per_channel(self.conv_bias, mixed.dtype))
        x, b, c = jnp.split(mixed, (self.inner, self.inner + self.keys), axis=-1)
        x = split_heads(x, self.heads)
        dt = jax.nn.softplus(dt.astype(jnp.float32) + per_channel(self.step))[..., None]
        log_w = -jnp.exp(self.rate[...]).reshape(1, 1, -1, 1) * dt
        # One head of b and c serves all.
        tokens = {"r": c[:, :, None], "k": b[:, :, None], "v": (x * dt).astype(h.dtype)}
        return Fed({**tokens, "log_w": log_w}, last, (x, gate))

    def finish(self, y, rest) -> jax.Array:
        x, gate = rest
        y = y.astype(jnp.float32) + self.skip[...].reshape(1, 1, -1, 1) * x.astype(jnp.float32)
        y = join_heads(y) * jax.nn.silu(gate.astype(jnp.float32))
        y = rms_norm(y) * per_channel(self.norm)
        return project(y.astype(gate.dtype), self.output[...])
