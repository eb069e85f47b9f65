"""Lightning attention of MiniMax-01 (arXiv 2501.08313): a fixed decay a head, no selection."""

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
    split_heads,
)
from rwkvx_jax.modules.parameters import LayerConstants, matrix, parameter, project


class Lightning(LinearMixer):
    """Parameters:

    receptance key value gate output: matrices, stored [in, out].
    norm [D]: scale of the norm over all heads' outputs.

    slope [H], fixed: head h of H in layer l of L decays by exp(-slope), which is about
    2^(-8 (h + 1) / H) (1 - l / (L - 1)), as in MiniMax-01.
    """

    def __init__(self, config: ModelConfig, constants: LayerConstants, rngs: nnx.Rngs):
        width, self.heads = config.width, config.num_heads
        self.receptance, self.key, self.value, self.gate = (matrix(config, rngs) for _ in range(4))
        self.output = parameter(jnp.zeros((width, width)), "heads", "embed")
        self.norm = parameter(jnp.ones(width), "vector")
        head = jnp.arange(1, self.heads + 1)
        last = constants.layers - 1
        left = (last - constants.layer + 1e-5) / (last + 1e-5)
        slope = 2.0 ** (-8.0 * head / self.heads) * (left + 1e-5)
        self.slope = parameter(slope, "heads")

    def feed(self, h, shift, lengths, segment_ids) -> Fed:
        split = lambda matrix: split_heads(jax.nn.silu(project(h, matrix[...])), self.heads)
        tokens = {"r": split(self.receptance), "k": split(self.key), "v": split(self.value)}
        slope = jax.lax.stop_gradient(self.slope[...])  # fixed: no gradient, no decay of weights
        log_w = jnp.broadcast_to(-slope[None, None], (*h.shape[:2], self.heads))[..., None]
        nothing = jnp.zeros((h.shape[0], 0), h.dtype)
        return Fed({**tokens, "log_w": log_w}, nothing, project(h, self.gate[...]))

    def finish(self, y, rest) -> jax.Array:
        y = rms_norm(join_heads(y), 1e-6) * per_channel(self.norm)
        y = y.astype(rest.dtype) * jax.nn.sigmoid(rest)
        return project(y, self.output[...])
