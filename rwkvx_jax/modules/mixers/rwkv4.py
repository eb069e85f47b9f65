"""Time mix of RWKV-4 (arXiv 2305.13048): a weighted average of values per channel."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rwkvx_jax.cache import TimeMixState
from rwkvx_jax.config import ConfigError, ModelConfig
from rwkvx_jax.modules.mixers.base import mixed
from rwkvx_jax.modules.parameters import LayerConstants, matrix, parameter, project
from rwkvx_jax.ops.wkv4 import wkv4
from rwkvx_jax.sharding import per_device, sequence_parts


class RWKV4(nnx.Module):
    """Parameters:

    x_r x_k x_v: share of the previous token in each input.
    receptance key value output: matrices, stored [in, out].
    w0: decay exp(-exp(w0)); u: bonus of the token's own value.

    The state [B, 1, 3, D] has the rows of `ops.wkv4`. There is no context parallelism.
    """

    def __init__(self, config: ModelConfig, constants: LayerConstants, rngs: nnx.Rngs):
        width = config.width
        square = partial(matrix, config, rngs)
        vector = lambda value: parameter(value, "vector")
        share = 1.0 - constants.ramp**constants.r10
        self.x_k, self.x_v = vector(share), vector(share - 0.3 * constants.r01)
        self.x_r = vector(1.0 - constants.ramp ** (0.5 * constants.r10))
        self.w0 = vector(-5.0 + 8.0 * constants.position ** (0.7 + 1.3 * constants.r01))
        zigzag = ((jnp.arange(width) + 1) % 3 - 1) * 0.5
        self.u = vector(zigzag + jnp.log(0.3))
        self.receptance, self.key, self.value = square(), square(0.1, 0.05), square()
        self.output = parameter(jnp.zeros((width, width)), "heads", "embed")

    def begun(self, state: TimeMixState, fresh: jax.Array) -> TimeMixState:
        """`state`: texts begin with zeros."""
        return state

    def __call__(self, h, v_first, first, run, state=None, lengths=None, segment_ids=None):
        """As `LinearMixer.__call__`."""
        if sequence_parts(h.shape[1]) > 1 and state is None:
            raise ConfigError('mixer "rwkv4" has no context parallelism: set mesh.context to 1')
        mix, last = mixed(h, None if state is None else state.shift, lengths, segment_ids)
        r = jax.nn.sigmoid(project(mix(self.x_r), self.receptance[...]))
        k = project(mix(self.x_k), self.key[...]).astype(jnp.float32)
        v = project(mix(self.x_v), self.value[...])
        count = jnp.full(h.shape[0], h.shape[1]) if lengths is None else lengths
        valid = jnp.arange(h.shape[1])[None] < count[:, None]
        start = jnp.zeros((h.shape[0], 3, h.shape[2])) if state is None else state.wkv[:, 0]
        implementation = "sequential" if h.shape[1] == 1 else None
        tokens, channels, rows = ("batch", None, "heads"), ("heads",), ("batch", None, "heads")

        def run_wkv4(*arrays: Any) -> tuple[jax.Array, jax.Array]:
            *arguments, ids = arrays
            return wkv4(*arguments, segment_ids=ids, implementation=implementation)

        y, end = per_device(
            run_wkv4,
            (channels, channels, tokens, tokens, rows, ("batch", None), ("batch", None)),
            (tokens, rows),
        )(self.w0[...], self.u[...], k, v, start, valid, segment_ids)
        out = project((r * y).astype(h.dtype), self.output[...])
        return out, v_first, TimeMixState(last, end[:, None])
