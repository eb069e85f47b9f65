"""Attention of the hybrid's second block kind: sparse (own chunk and the best past chunks) or full.

No position encoding, no bias, no token shift (spec 1.3).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from rwkvx_jax.config import ModelConfig, RunConfig
from rwkvx_jax.modules.parameters import orthogonal, parameter, uniform
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.full_attention import full_attention
from rwkvx_jax.sharding import constrain


class Attention(nnx.Module):
    """receptance (the query), key, value, output: D x D matrices, stored [in, out]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        for name, gain, bound in (
            ("receptance", 1.0, 0.5),
            ("key", 1.0, 0.05),
            ("value", 1.0, 0.5),
        ):
            shape = (width, width)
            if config.init == "rwkv_lm":
                matrix = orthogonal(rngs.params(), shape, gain)
            else:
                matrix = uniform(rngs.params(), shape, bound * width**-0.5)
            setattr(self, name, parameter(matrix, "embed", "heads"))
        self.output = parameter(jnp.zeros((width, width)), "heads", "embed")

    def __call__(
        self,
        h: jax.Array,  # [B, T, D]
        run: RunConfig,
    ) -> jax.Array:
        """Attention of a whole sequence to itself, [B, T, D]."""
        q, k, v = self.project(h)
        if self.config.attention == "full":
            out = full_attention(q, k, v)
        else:
            out = sparse_attention(
                q,
                k,
                v,
                chunk_size=self.config.chunk_size,
                top_k=self.config.top_k,
                implementation=run.sparse_attention,
            )
        return self.combine(out)

    def project(self, h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, each [B, T, H, K] in h's dtype."""
        heads = self.config.num_heads
        return tuple(
            constrain(
                (h @ getattr(self, name)[...].astype(h.dtype)).reshape(*h.shape[:2], heads, -1),
                "batch",
                "time",
                "heads",
                None,
            )
            for name in ("receptance", "key", "value")
        )

    def combine(self, out: jax.Array) -> jax.Array:
        """Output projection: [B, T, H, K] -> [B, T, D]."""
        out = out.reshape(*out.shape[:2], -1)
        return out @ self.output[...].astype(out.dtype)
