"""Native Sparse Attention as an attention block: `Attention` with three branches and their gates.

Queries, keys and values are those of every other attention here, and the branches share them; so
does the cache, which holds the sums of each page's values as well. Packed documents, shards and
prefill in pieces work as they do there.
Source: arXiv 2502.11089; gates as in flash-linear-attention: sigmoids of one product with the
block's input, one a query head and branch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.modules.attention import Attention
from rwkvx_jax.modules.parameters import parameter, project
from rwkvx_jax.ops.nsa import BRANCHES, native_sparse_attention
from rwkvx_jax.sharding import constrain


class NativeSparseAttention(Attention):
    """The matrices of `Attention`, and gate [D, H * 3]: of each query head the compressed, selected
    and window branch. It begins as zeros, so that each branch counts by half."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        columns = config.num_heads * BRANCHES
        self.gate = parameter(jnp.zeros((config.width, columns)), "embed", "heads")

    def gates(self, h: Float[Array, "B T D"]) -> Float[Array, "B T H 3"]:
        """Gates between 0 and 1, in h's dtype."""
        gates = jax.nn.sigmoid(project(h, self.gate[...]))
        gates = gates.reshape(*h.shape[:2], self.config.num_heads, BRANCHES)
        return constrain(gates, "batch", "time", "heads", None)

    def _attend(self, q, k, v, *gates, implementation, q_offset=0, segment_ids=None) -> jax.Array:
        return native_sparse_attention(
            q,
            k,
            v,
            *gates,
            chunk_size=self.config.chunk_size,
            top_k=self.config.top_k,
            window=self.config.window_size,
            q_offset=q_offset,
            segment_ids=segment_ids,
            implementation=implementation,
        )
