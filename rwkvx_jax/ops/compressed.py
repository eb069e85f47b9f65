"""Attention to the means of chunks, and the choice of chunks that follows from it: the compressed
branch of NSA.

A query attends to the mean key and mean value of every chunk that ends at or before it. What the
query heads of one key head weigh the chunks with, summed, says which chunks they read token by
token. So what a chunk weighs is learned through the output, with no loss of its own. All weights
are float32, and they exist for one block of queries at a time: [B, H, Tq, N] is never held.
Source: Native Sparse Attention (arXiv 2502.11089), with the mean as compression.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from rwkvx_jax.ops.blocked_attention import MASKED
from rwkvx_jax.ops.precision import precision_of
from rwkvx_jax.ops.selection import (
    MIN_QUERIES_PER_BLOCK,
    SCORES_PER_BLOCK,
    choose_past,
    readable_keys,
)
from rwkvx_jax.ops.selectors import MEAN, Selector

NSA_CHOICE = Selector(forced="both")
"""The scores are what `compressed_attention` makes them; the first chunk and the one before the own
are always chosen."""


class ChunkMeans(NamedTuple):
    """Mean keys and mean values of chunks 0..N-1; those of chunks that are not complete are never
    read."""

    keys: Float32[Array, "B N G K"]
    values: Float32[Array, "B N G V"]


def chunk_means(
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    chunk_size: int,
    starts: Int32[Array, "B T"] | None = None,
) -> ChunkMeans:
    """Means of the complete chunks.

    Args:
      k: keys from position 0.
      v: values.
      chunk_size: tokens in a chunk.
      starts: where the document of each token begins (`documents.document_starts`); a chunk then
        means the tokens of the document that it ends with alone, as nobody behind it sees others.
    """
    complete = k.shape[1] // chunk_size * chunk_size
    counted = counts = None
    if starts is not None:
        counted = readable_keys(starts, chunk_size)
        counts = counted.reshape(len(counted), 1, -1, chunk_size).sum(-1, dtype=jnp.float32)

    def means(x):
        rows = MEAN.rows_of(x[:, :complete], chunk_size, counted).swapaxes(1, 2)
        return MEAN.keys(rows, chunk_size, counts).swapaxes(1, 2)

    return ChunkMeans(means(k), means(v))


def compressed_attention(
    q: Float[Array, "B T H K"],
    means: ChunkMeans,
    positions: Int32[Array, "B T"],
    *,
    chunk_size: int,
    count: int,
    scale: float,
    first: Int32[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H V"], Int32[Array, "B T G {count}"]]:
    """Attention of queries to the chunks that end at or before them, and the best past chunks.

    Args:
      q: queries.
      means: of the chunks; G divides H.
      positions: of the queries.
      chunk_size: tokens in a chunk.
      count: how many past chunks to choose.
      scale: factor on q . k.
      first: positions at which the documents of the queries begin; None: 0.

    Returns:
      The output in q's dtype, zeros where no chunk ends before the query; differentiable. The
      choice of each key head, int32, best first, ties to the lower index, -1 for none: the chunk
      before the own one and the first of the text, then those with the largest sum of weights over
      the key head's query heads. No gradient flows through it.
    """
    (batch, length, heads, _), chunks = q.shape, means.keys.shape[1]
    groups, width = means.values.shape[2:]
    if not chunks:
        chosen = jnp.full((batch, length, groups, count), -1, jnp.int32)
        return jnp.zeros((batch, length, heads, width), q.dtype), chosen
    run = partial(_attend_block, means, chunk_size=chunk_size, count=count, scale=scale)
    first = jnp.zeros_like(positions) if first is None else first
    most = max(MIN_QUERIES_PER_BLOCK, SCORES_PER_BLOCK // (batch * heads * chunks))
    blocks = math.ceil(length / most)
    if blocks == 1:
        return run((q, positions, first))

    def split(x):  # [B, T, ...] -> [blocks, B, block, ...]
        x = jnp.pad(x, ((0, 0), (0, -length % blocks)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, blocks, -1, *x.shape[2:]), 1, 0)

    # Weights are computed again in the backward pass, so that only those of a block are held.
    again = jax.checkpoint(run, prevent_cse=False)
    out, chosen = jax.lax.map(again, tuple(map(split, (q, positions, first))))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :length]
    return join(out), join(chosen)


def _attend_block(means, block, *, chunk_size, count, scale):
    """`compressed_attention` of a few queries."""
    q, positions, first = block
    batch, length, heads, size = q.shape
    groups = means.keys.shape[2]
    rows = q.astype(jnp.float32).reshape(batch, length, groups, -1, size)
    high = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btgmk,bngk->bgmtn", rows, means.keys, precision=high) * scale
    numbers, column = jnp.arange(means.keys.shape[1])[None, None], lambda x: x[:, :, None]
    ended = numbers < column((positions + 1) // chunk_size)
    ended = (ended & (numbers >= column(first // chunk_size)))[:, None, None]
    largest = jax.lax.stop_gradient(jnp.max(jnp.where(ended, scores, MASKED), -1, keepdims=True))
    weights = jnp.where(ended, jnp.exp(jnp.where(ended, scores - largest, 0)), 0)
    weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    out = jnp.einsum(
        "bgmtn,bngv->btgmv",
        weights.astype(q.dtype),
        means.values.astype(q.dtype),
        precision=precision_of(q.dtype),
        preferred_element_type=jnp.float32,
    )
    chosen = choose_past(
        jax.lax.stop_gradient(weights).sum(2),
        positions // chunk_size,
        first // chunk_size,
        count=count,
        selector=NSA_CHOICE,
        key_size=size,
    )
    return out.reshape(batch, length, heads, -1).astype(q.dtype), chosen.swapaxes(1, 2)
