"""Mamba-2 (arXiv 2405.21060): a state space with one decay a head, shared reads and addresses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.modules.convolution import convolutions, first_taps
from rwkvx_jax.modules.mixers.base import (
    Fed,
    LinearMixer,
    join_heads,
    per_channel,
    rms_norm,
    split_heads,
)
from rwkvx_jax.modules.mixers.deltanet import first_rates, first_steps
from rwkvx_jax.modules.parameters import (
    LayerConstants,
    matrix,
    parameter,
    project,
    uniform,
)


class Mamba2(LinearMixer):
    """Parameters, with I = 2 D inner channels in heads of `head_size` and N = 2 `head_size` keys:

    value gate [D, I] receptance key [D, N]: x, its gate z, c and b; alpha [D, heads]: step sizes.
    conv [CONV, I + 2 N] conv_bias: taps over time on x, b and c, the token's own first.
    rate, step [heads]: log decay -exp(rate) dt with dt = softplus(. + step).
    skip [heads]: how much of x reaches the output directly.
    norm [I]: scale of the norm of the gated output.
    output [I, D].
    """

    def __init__(self, config: ModelConfig, constants: LayerConstants, rngs: nnx.Rngs):
        width, size = config.width, config.head_size
        inner, keys, self.heads = 2 * width, 2 * size, 2 * width // size
        columns = lambda count, axis="heads": matrix(
            config, rngs, shape=(width, count), axes=("embed", axis)
        )
        self.value, self.gate = columns(inner), columns(inner)
        # Of one head, which every device needs whole.
        self.receptance, self.key = columns(keys, "rank"), columns(keys, "rank")
        self.alpha = columns(self.heads)
        self.conv = parameter(first_taps(rngs, inner + 2 * keys), "taps", "vector")
        bias = uniform(rngs.params(), (inner + 2 * keys,), 0.5)
        self.conv_bias = parameter(bias, "vector")
        self.rate = parameter(first_rates(rngs, self.heads), "heads")
        self.step = parameter(first_steps(rngs, self.heads), "heads")
        self.skip = parameter(jnp.ones(self.heads), "heads")
        self.norm = parameter(jnp.ones(inner), "vector")
        self.output = parameter(jnp.zeros((inner, width)), "heads", "embed")

    def feed(self, h, shift, lengths, segment_ids) -> Fed:
        inputs = [project(h, matrix[...]) for matrix in (self.value, self.key, self.receptance)]
        parts, last = convolutions(inputs, self.conv[...], shift, lengths, segment_ids)
        inner, keys = inputs[0].shape[-1], inputs[1].shape[-1]
        biases = jnp.split(per_channel(self.conv_bias, h.dtype), (inner, inner + keys), axis=-1)
        x, b, c = (jax.nn.silu(y + bias) for y, bias in zip(parts, biases, strict=True))
        x = split_heads(x, self.heads)
        dt = project(h, self.alpha[...]).astype(jnp.float32) + per_channel(self.step)
        dt = jax.nn.softplus(dt)[..., None]
        log_w = -jnp.exp(self.rate[...]).reshape(1, 1, -1, 1) * dt
        # One head of b and c serves all.
        tokens = {"r": c[:, :, None], "k": b[:, :, None], "v": (x * dt).astype(h.dtype)}
        return Fed({**tokens, "log_w": log_w}, last, (x, project(h, self.gate[...])))

    def finish(self, y, rest) -> jax.Array:
        x, gate = rest
        y = y.astype(jnp.float32) + self.skip[...].reshape(1, 1, -1, 1) * x.astype(jnp.float32)
        y = join_heads(y) * jax.nn.silu(gate.astype(jnp.float32))
        y = rms_norm(y) * per_channel(self.norm)
        return project(y.astype(gate.dtype), self.output[...])
