"""Kimi Delta Attention (arXiv 2510.26692): the delta rule with a bounded decay per key channel."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.modules.convolution import first_taps
from rwkvx_jax.modules.mixers.base import (
    Fed,
    LinearMixer,
    join_heads,
    per_channel,
    rms_norm,
    split_heads,
)
from rwkvx_jax.modules.mixers.deltanet import convolved, first_rates, first_steps
from rwkvx_jax.modules.parameters import LayerConstants, matrix, parameter, project

LOWEST = -5.0
"""Log decays lie above this."""


class KDA(LinearMixer):
    """Parameters:

    receptance key value output: matrices, stored [in, out].
    conv [CONV, 3 D]: taps over time on queries, keys and values, the token's own first.
    beta [D, H]: how much of what a key finds is replaced.
    w1 [D, K] w2 [K, D] step [D] rate [H]: log decay -5 sigmoid(exp(rate) (x w1 w2 + step)).
    g1 [D, K] g2 [K, D]: output gate.
    norm [V]: scale of the norm of each head's output.
    """

    decay_bound = LOWEST

    def __init__(self, config: ModelConfig, constants: LayerConstants, rngs: nnx.Rngs):
        width, size, self.heads = config.width, config.head_size, config.num_heads
        inner = partial(matrix, config, rngs, shape=(width, size), axes=("embed", "rank"))
        outer = partial(matrix, config, rngs, shape=(size, width), axes=("rank", "heads"))
        self.receptance, self.key, self.value = (matrix(config, rngs) for _ in range(3))
        self.output = parameter(jnp.zeros((width, width)), "heads", "embed")
        self.conv = parameter(first_taps(rngs, 3 * width), "taps", "vector")
        self.beta = matrix(config, rngs, shape=(width, self.heads))
        self.w1, self.w2, self.g1, self.g2 = inner(), outer(), inner(), outer()
        self.step = parameter(first_steps(rngs, width), "vector")
        self.rate = parameter(first_rates(rngs, self.heads), "heads")
        self.norm = parameter(jnp.ones(size), "head_size")

    def feed(self, h, shift, lengths, segment_ids) -> Fed:
        q, k, v, last = convolved(self, h, shift, lengths, segment_ids)
        beta = jax.nn.sigmoid(project(h, self.beta[...]).astype(jnp.float32))[..., None]
        pair = lambda first, second: project(project(h, first[...]), second[...])
        raw = pair(self.w1, self.w2).astype(jnp.float32) + per_channel(self.step)
        rate = jnp.exp(self.rate[...]).reshape(1, 1, -1, 1)
        log_w = LOWEST * jax.nn.sigmoid(rate * split_heads(raw, self.heads))
        tokens = {"r": q, "k": k, "v": v * beta, "a": -k * jnp.exp(log_w), "b": k * beta}
        tokens = {name: x.astype(h.dtype) for name, x in tokens.items()}
        return Fed({**tokens, "log_w": log_w}, last, pair(self.g1, self.g2))

    def finish(self, y, rest) -> jax.Array:
        y = rms_norm(y) * self.norm[...].reshape(1, 1, 1, -1)
        y = join_heads(y).astype(rest.dtype) * jax.nn.sigmoid(rest)
        return project(y, self.output[...])
