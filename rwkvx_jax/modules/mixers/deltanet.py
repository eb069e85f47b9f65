"""Gated DeltaNet (arXiv 2412.06464), as in Qwen3-Next, and DeltaNet (arXiv 2406.06484)."""

from __future__ import annotations

from functools import partial

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
from rwkvx_jax.modules.parameters import LayerConstants, matrix, parameter, project


def first_steps(rngs: nnx.Rngs, count: int) -> jax.Array:
    """Biases with softplus(bias) log-uniform from 0.001 to 0.1, as in Mamba-2."""
    low, high = jnp.log(1e-3), jnp.log(1e-1)
    dt = jnp.exp(low + (high - low) * jax.random.uniform(rngs.params(), (count,)))
    return dt + jnp.log(-jnp.expm1(-dt))  # the inverse of softplus


def first_rates(rngs: nnx.Rngs, count: int) -> jax.Array:
    """log A of heads, A uniform from 1 to 16."""
    return jnp.log(jax.random.uniform(rngs.params(), (count,), minval=1.0, maxval=16.0))


class GatedDeltaNet(LinearMixer):
    """Parameters:

    receptance key value gate output: matrices, stored [in, out].
    conv [CONV, 3 D]: taps over time on queries, keys and values, the token's own first.
    beta [D, H]: how much of what a key finds is replaced.
    alpha [D, H] rate [H] step [H]: log decay -exp(rate) softplus(x alpha + step); not in DeltaNet.
    norm [V]: scale of the norm of each head's output.
    """

    def __init__(self, config: ModelConfig, constants: LayerConstants, rngs: nnx.Rngs):
        width, self.heads = config.width, config.num_heads
        self.decays = config.mixer == "gated_deltanet"
        self.receptance, self.key, self.value, self.gate = (matrix(config, rngs) for _ in range(4))
        self.output = parameter(jnp.zeros((width, width)), "heads", "embed")
        self.conv = parameter(first_taps(rngs, 3 * width), "taps", "vector")
        by_head = partial(matrix, config, rngs, shape=(width, self.heads))
        self.beta = by_head()
        if self.decays:
            self.alpha = by_head()
            self.rate = parameter(first_rates(rngs, self.heads), "heads")
            self.step = parameter(first_steps(rngs, self.heads), "heads")
        self.norm = parameter(jnp.ones(config.head_size), "head_size")

    def feed(self, h, shift, lengths, segment_ids) -> Fed:
        q, k, v, last = convolved(self, h, shift, lengths, segment_ids)
        beta = jax.nn.sigmoid(project(h, self.beta[...]).astype(jnp.float32))[..., None]
        log_w = jnp.zeros(beta.shape, jnp.float32)
        if self.decays:
            step = project(h, self.alpha[...]).astype(jnp.float32) + per_channel(self.step)
            log_w = (-jnp.exp(per_channel(self.rate)) * jax.nn.softplus(step))[..., None]
        tokens = {"r": q, "k": k, "v": v * beta, "a": -k, "b": k * beta * jnp.exp(log_w)}
        tokens = {name: x.astype(h.dtype) for name, x in tokens.items()}
        return Fed({**tokens, "log_w": log_w}, last, project(h, self.gate[...]))

    def finish(self, y, rest) -> jax.Array:
        y = rms_norm(y, 1e-6) * self.norm[...].reshape(1, 1, 1, -1)
        y = join_heads(y).astype(rest.dtype) * jax.nn.silu(rest)
        return project(y, self.output[...])


def convolved(mixer, h, shift, lengths, segment_ids) -> tuple[jax.Array, ...]:
    """Queries and keys of unit length (queries over sqrt(K)) and values [B, T, H, K] of a mixer
    after its convolution and SiLU, and the shift of the next piece."""
    projections = [project(h, w[...]) for w in (mixer.receptance, mixer.key, mixer.value)]
    parts, last = convolutions(projections, mixer.conv[...], shift, lengths, segment_ids)
    q, k, v = (split_heads(jax.nn.silu(x), mixer.heads) for x in parts)
    return _unit(q) * q.shape[-1] ** -0.5, _unit(k), v, last


def _unit(x: jax.Array) -> jax.Array:
    """x / sqrt(|x|^2 + 1e-6) over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
