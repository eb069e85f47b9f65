"""Attention of one new token to chosen pages of a cache.

Pages hold one chunk of keys or values each, for one attention block, batch row and head. A decode
step reads the pages that the gate chose and nothing else: each is read where it lies, once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend_pages(
    q: jax.Array,  # [R, K]
    keys: jax.Array,  # [P, C, K]
    values: jax.Array,  # [P, C, V]
    page: jax.Array,  # int32 [R, J]
    visible: jax.Array,  # int32 [R, J]
    *,
    scale: float,
) -> jax.Array:
    """Softmax attention of each query over the visible rows of its pages.

    Args:
      q: R queries (batch rows times heads).
      keys: all pages.
      values: all pages.
      page: the J pages of each query; entries without visible rows may hold any valid index.
      visible: rows of each page that count, from its start; 0 leaves the page out.
      scale: factor on q . k.

    Returns:
      [R, V] float32. A query without any visible row gives zeros.
    """
    rows, per_row = page.shape
    chunk = keys.shape[1]
    q = q.astype(jnp.float32)

    def score(i: jax.Array, scores: jax.Array) -> jax.Array:
        block = jax.lax.dynamic_index_in_dim(keys, page[i // per_row, i % per_row], 0, False)
        return scores.at[i].set(_matvec(block, q[i // per_row]))

    scores = jax.lax.fori_loop(0, rows * per_row, score, jnp.zeros((rows * per_row, chunk)))
    scores = scores.reshape(rows, per_row, chunk) * scale
    counts = jnp.arange(chunk)[None, None] < visible[..., None]
    top = jnp.max(jnp.where(counts, scores, -jnp.inf), axis=(1, 2), keepdims=True)
    weights = jnp.where(counts, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
    total = weights.sum((1, 2))[:, None]
    weights = weights.reshape(-1, chunk)

    def add(i: jax.Array, out: jax.Array) -> jax.Array:
        block = jax.lax.dynamic_index_in_dim(values, page[i // per_row, i % per_row], 0, False)
        return out.at[i // per_row].add(_matvec(block.T, weights[i]))

    out = jax.lax.fori_loop(0, rows * per_row, add, jnp.zeros((rows, values.shape[2])))
    return out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)


def _matvec(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """matrix @ vector in float32."""
    return jnp.dot(matrix.astype(jnp.float32), vector, precision=jax.lax.Precision.HIGHEST)
