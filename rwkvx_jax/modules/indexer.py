"""Learned vectors by which chunks are chosen: the selector "index".

A small map makes, from the queries and keys of an attention block, one index query and one index
key a token for each choice of chunks; the choice is made by these as it would be by queries and
keys (bounds of the parts of a chunk, see `ops/selectors.py`). They are functions of what a cache
holds anyway, so that rows can be made anew wherever keys are moved.

Sources: the index heads of MiniMax-M3 (arXiv 2606.13392: one for a group of heads, token scores
max-pooled over a block) and of DeepSeek-V3.2. Ours differ in two ways: the maps read queries and
keys instead of the residual stream, and a part of a chunk keeps its bounds instead of all its
tokens; with parts of one token the score is the max-pooled one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.modules.parameters import orthogonal, parameter
from rwkvx_jax.ops.precision import precision_of


class Indexer(nnx.Module):
    """query_map [H, K, I] and key_map [max(S, G), K, I], for S choices and G heads of keys.

    All maps begin as the identity (as one random projection where I is below K). A choice of one
    head of keys then begins as bounds of its keys make it, for the sum of its queries.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, index = config.head_size, config.scored_size
        start = jnp.eye(size)
        if index != size:  # such that products keep their expected size
            start = orthogonal(rngs.params(), (size, index), max(1.0, size / index) ** 0.5)
        self.choices = config.choices
        maps = lambda heads: parameter(
            jnp.broadcast_to(start, (heads, size, index)), "heads", "head_size", "rank"
        )
        self.query_map = maps(config.num_heads)
        self.key_map = maps(max(config.choices, config.kv_heads))

    def queries(self, q: Float[Array, "B T H K"]) -> Float[Array, "B T S I"]:
        """Index queries: the mapped queries of the heads that choose together, summed."""
        return self._mapped(q, self.query_map)

    def keys(self, k: Float[Array, "B T G K"]) -> Float[Array, "B T S I"]:
        """Index keys: the mapped keys that these heads read, summed."""
        return self._mapped(k, self.key_map)

    def _mapped(self, x: jax.Array, maps: nnx.Param) -> jax.Array:
        """x [B, T, n, K] by the maps of its heads, or of the choices that share one of these."""
        weight = maps[...].astype(x.dtype)
        x = jnp.repeat(x, weight.shape[0] // x.shape[2], axis=2)
        out = jnp.einsum("bthk,hki->bthi", x, weight, precision=precision_of(x.dtype))
        return out.reshape(*out.shape[:2], self.choices, -1, out.shape[3]).sum(3)
