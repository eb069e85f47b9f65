"""Learned vectors by which chunks are chosen: the selectors "index" and "seer".

Small maps make, from the queries and keys of an attention block, what chunks are chosen by. They
are functions of what a cache holds anyway, so that rows can be made anew wherever keys are moved.

"index": one index query and one index key a token for each choice of chunks; the choice is made by
these as it would be by queries and keys (bounds of the parts of a chunk, see `ops/selectors.py`).
Sources: the index heads of MiniMax-M3 (arXiv 2606.13392: one for a group of heads, token scores
max-pooled over a block) and of DeepSeek-V3.2. Ours differ in two ways: the maps read queries and
keys instead of the residual stream, and a part of a chunk keeps its bounds instead of all its
tokens; with parts of one token the score is the max-pooled one.

"seer": one query for each choice, and a map of the smallest, the largest and the mean key of a
chunk. Source: the gate of SeerAttention (arXiv 2410.13276). As q' . (B^T pooled) = (B q') . pooled,
the map of the pooled keys is applied to the query, and the rows that are kept are those of keys.
Ours pools the keys as attention reads them, rotated where they are, and does not rotate again.
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
        start = _start(config, rngs)
        self.choices = config.choices
        self.query_map = _maps(config.num_heads, start)
        self.key_map = _maps(max(config.choices, config.kv_heads), start)

    def queries(self, q: Float[Array, "B T H K"]) -> Float[Array, "B T S I"]:
        """Index queries: the mapped queries of the heads that choose together, summed."""
        return _mapped(q, self.query_map, self.choices)

    def keys(self, k: Float[Array, "B T G K"]) -> Float[Array, "B T S I"]:
        """Index keys: the mapped keys that these heads read, summed."""
        return _mapped(k, self.key_map, self.choices)


class SeerGate(nnx.Module):
    """query_map [H, K, I] and key_map [S, 3 K, I], for S choices: of the smallest, the largest and
    the mean key of a chunk. S is a multiple of the heads of keys.

    The maps of queries and of mean keys begin as the identity (as one random projection where I is
    below K), those of the smallest and largest keys as zeros. A choice then begins as mean keys
    make it, for the sum of its queries.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        start = _start(config, rngs)
        self.choices = config.choices
        self.query_map = _maps(config.num_heads, start)
        zeros = jnp.zeros_like(start)
        self.key_map = _maps(config.choices, jnp.concatenate([zeros, zeros, start]))

    def queries(self, q: Float[Array, "B T H K"]) -> Float[Array, "B T S Q"]:
        """What the three pooled keys are multiplied with, Q = 3 K: the mapped queries of the heads
        that choose together, summed, by the transposed map of keys."""
        mapped = _mapped(q, self.query_map, self.choices)
        weight = self.key_map[...].astype(q.dtype)
        return jnp.einsum("btsi,sfi->btsf", mapped, weight, precision=precision_of(q.dtype))

    def keys(self, k: Float[Array, "B T G K"]) -> Float[Array, "B T G K"]:
        """The keys themselves."""
        return k


INDEXERS: dict[str, type[Indexer] | type[SeerGate]] = {"index": Indexer, "seer": SeerGate}
"""By the names of the selectors."""


def _start(config: ModelConfig, rngs: nnx.Rngs) -> jax.Array:
    """The map [K, I] that maps begin as."""
    size, index = config.head_size, config.index_channels
    if index == size:
        return jnp.eye(size)
    # Such that products keep their expected size.
    return orthogonal(rngs.params(), (size, index), max(1.0, size / index) ** 0.5)


def _maps(heads: int, start: jax.Array) -> nnx.Param:
    """The parameter [heads, ...] that begins as `start` for each head."""
    return parameter(jnp.broadcast_to(start, (heads, *start.shape)), "heads", "head_size", "rank")


def _mapped(x: jax.Array, maps: nnx.Param, choices: int) -> jax.Array:
    """x [B, T, n, K] by the maps of its heads, or of the choices that share one of these, summed
    over the heads of a choice."""
    weight = maps[...].astype(x.dtype)
    x = jnp.repeat(x, weight.shape[0] // x.shape[2], axis=2)
    out = jnp.einsum("bthk,hki->bthi", x, weight, precision=precision_of(x.dtype))
    return out.reshape(*out.shape[:2], choices, -1, out.shape[3]).sum(3)
