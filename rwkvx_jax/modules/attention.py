"""Attention of the hybrid's second block kind: sparse (own chunk and the best past chunks) or full.

No position encoding, no bias, no token shift (spec 1.3).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from rwkvx_jax.cache import CachePolicy, Gate, Pages, compress, write_rows
from rwkvx_jax.config import ModelConfig, RunConfig
from rwkvx_jax.modules import context
from rwkvx_jax.modules.parameters import orthogonal, parameter, uniform
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.full_attention import full_attention
from rwkvx_jax.ops.paged import attend_pages, attend_piece
from rwkvx_jax.ops.selection import select_from_means
from rwkvx_jax.sharding import constrain, per_device, sequence_parts


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
            op = full_attention
        else:
            op = partial(
                sparse_attention,
                chunk_size=self.config.chunk_size,
                top_k=self.config.top_k,
                implementation=run.sparse_attention,
            )
        if sequence_parts(h.shape[1]) > 1:
            out = context.attention(op, q, k, v)
        else:
            tokens = ("batch", None, "heads", None)
            out = per_device(op, (tokens,) * 3, tokens)(q, k, v)
        return self.combine(out)

    def cached(
        self,
        h: jax.Array,  # [B, T, D]
        pages: Pages,
        layer: jax.Array,  # int scalar, index of this block in the pages
        start: jax.Array,  # [B], rows in the pages before this piece
        lengths: jax.Array,  # [B], valid tokens of the piece
        gate: Gate,
        policy: CachePolicy | None,
    ) -> tuple[jax.Array, Pages]:
        """Attention of a piece to itself and to everything in the pages.

        With a policy, rows that are due are compressed first, by the query of the first token.

        Returns:
          The output [B, T, D]; pages with the piece appended.
        """
        q, k, v = self.project(h)
        if policy is not None:
            due = policy.due(start) & (lengths > 0)
            squeeze = lambda pages: compress(pages, layer, q[:, 0], start, due, policy)
            pages = jax.lax.cond(jnp.any(due), squeeze, lambda pages: pages, pages)
            start = jnp.where(due, policy.keep, start)
        pages = write_rows(pages, layer, k, v, start, lengths)
        chosen = self._choose(q, pages, layer, start, gate)
        read = self._read_one if h.shape[1] == 1 else self._read_piece
        return self.combine(read(q, pages, layer, start, chosen).astype(h.dtype)), pages

    def _choose(self, q, pages: Pages, layer, start, gate: Gate) -> jax.Array | None:
        """Past pages of each token and head, [B, T, H, J]; None: all of them (full attention)."""
        if self.config.attention == "full":
            return None
        batch, time, heads, size = q.shape
        chunk, top_k = self.config.chunk_size, self.config.top_k
        means = jax.lax.dynamic_index_in_dim(pages.key_sums, layer, 0, False) / chunk
        means = means.swapaxes(1, 2)  # [B, N, H, K]
        positions = start[:, None] + jnp.arange(time, dtype=jnp.int32)[None]
        if gate == "per_head":
            return select_from_means(q, means, positions, chunk_size=chunk, count=top_k - 1)
        # One score over all channels, and top_k past chunks beside the own one.
        chosen = select_from_means(
            q.reshape(batch, time, 1, heads * size),
            means.reshape(*means.shape[:2], 1, heads * size),
            positions,
            chunk_size=chunk,
            count=top_k,
        )
        return jnp.broadcast_to(chosen, (batch, time, heads, top_k))

    def _read_one(self, q, pages: Pages, layer, start, chosen) -> jax.Array:
        """One token: the chosen pages and the filled part of its own, [B, 1, H, K]."""
        blocks, batch, heads, count, chunk, size = pages.keys.shape
        own = (start // chunk)[:, None, None]  # [B, 1, 1]
        if chosen is None:
            chosen = jnp.broadcast_to(jnp.arange(count), (batch, heads, count))
            visible = jnp.clip(start[:, None, None] + 1 - chosen * chunk, 0, chunk)
        else:
            own = jnp.broadcast_to(own, (batch, heads, 1))
            visible = jnp.where(chosen[:, 0] >= 0, chunk, 0)
            chosen = jnp.concatenate([jnp.maximum(chosen[:, 0], 0), own], axis=-1)
            filled = jnp.broadcast_to((start % chunk + 1)[:, None, None], own.shape)
            visible = jnp.concatenate([visible, filled], axis=-1)
        row = jnp.arange(batch * heads).reshape(batch, heads, 1)
        flat = (layer * batch * heads + row) * count + chosen
        out = attend_pages(
            q.reshape(batch * heads, size),
            pages.keys.reshape(-1, chunk, size),
            pages.values.reshape(-1, chunk, size),
            flat.reshape(batch * heads, -1),
            visible.reshape(batch * heads, -1),
            scale=size**-0.5,
        )
        return out.reshape(batch, 1, heads, size)

    def _read_piece(self, q, pages: Pages, layer, start, chosen) -> jax.Array:
        """Many tokens at once, [B, T, H, K]."""
        _, batch, heads, count, chunk, size = pages.keys.shape
        return attend_piece(
            q,
            pages.keys.reshape(-1, count * chunk, size),
            pages.values.reshape(-1, count * chunk, size),
            layer * batch * heads,
            chosen,
            start,
            chunk_size=chunk,
            scale=size**-0.5,
        )

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
