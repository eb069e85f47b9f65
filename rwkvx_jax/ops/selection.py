"""Which past chunks a query reads: top-k by the dot product with a chunk's mean key.

Selection stands apart from attention so that all implementations of attention agree on it, ties
included, and other selectors can be tried: the paper names this mean-key rule as its first
limitation. The pieces (key sums of chunks, choice among given means) serve decoding as well, where
the sums are kept running in the cache. Everything is float32, and the scores exist for one block of
queries at a time: [B, H, Tq, N] is never held. Source: RWKV-X (arXiv 2504.21463), per-head gate.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import selection_tpu
from rwkvx_jax.ops.attention_inputs import (
    check_chunking,
    check_offset,
    known_or_rows,
    query_positions,
)
from rwkvx_jax.ops.dispatch import Candidate, resolve

# Scores held at once, over batch and heads. About a megabyte of scores keeps a block in cache.
SCORES_PER_BLOCK = 1 << 20

# Up to this many chunks are chosen by as many passes for the maximum, which on CPU take half the
# time of `top_k`'s sorting; more by `top_k`. Both give ties to the lower index.
MAX_PASSES = 4


def chunk_key_sums(k: jax.Array, chunk_size: int) -> jax.Array:
    """Sums of the keys of each chunk; a trailing partial chunk is summed as far as it goes.

    Args:
      k: [B, T, H, K], any floating dtype.
      chunk_size: tokens in a chunk.

    Returns:
      float32 [B, ceil(T / chunk_size), H, K].
    """
    batch, length, heads, size = k.shape
    chunks = -(-length // chunk_size)
    k = jnp.pad(k, ((0, 0), (0, chunks * chunk_size - length), (0, 0), (0, 0)))
    return jnp.sum(k.reshape(batch, chunks, chunk_size, heads, size), axis=2, dtype=jnp.float32)


def chunk_key_means(k: jax.Array, chunk_size: int) -> jax.Array:
    """Mean keys of the complete chunks, float32 [B, T // chunk_size, H, K]."""
    complete = k.shape[1] // chunk_size
    return chunk_key_sums(k[:, : complete * chunk_size], chunk_size) / chunk_size


def select_from_means(
    q: jax.Array,
    means: jax.Array,
    positions: jax.Array,
    *,
    chunk_size: int,
    count: int,
) -> jax.Array:
    """The `count` past chunks with the highest q . mean, for queries at given positions.

    A chunk is past for a query when it ends at or before the start of the query's own chunk.

    Args:
      q: [B, Tq, H, K] queries.
      means: [B, N, H, K] float32 mean keys of chunks 0..N-1; those that are not past for a query
        (not complete, in a cache) may hold anything.
      positions: int32 [B, Tq] absolute positions of the queries.
      chunk_size: tokens in a chunk.
      count: how many chunks to choose.

    Returns:
      int32 [B, Tq, H, count], by descending score, ties to the lower index, padded with -1.
      No gradient flows through it.
    """
    batch, length, heads, size = q.shape
    chunks = means.shape[1]
    taken = min(count, chunks)
    if taken == 0:
        return jnp.full((batch, length, heads, count), -1, jnp.int32)
    q, means = jax.lax.stop_gradient((q, means.astype(jnp.float32)))

    def select_block(block):
        block_q, block_positions = block  # [B, block, H, K], [B, block]
        scores = jnp.einsum(
            "bthk,bnhk->bthn",
            block_q.astype(jnp.float32),
            means,
            precision=jax.lax.Precision.HIGHEST,
        )
        past = jnp.arange(chunks)[None, None, :] < (block_positions // chunk_size)[:, :, None]
        return _best(jnp.where(past[:, :, None, :], scores, -jnp.inf), taken)

    block = min(length, max(8, SCORES_PER_BLOCK // (batch * heads * chunks)))
    blocks = -(-length // block)
    if blocks == 1:
        chosen = select_block((q, positions))
    else:
        pad = blocks * block - length
        q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
        positions = jnp.pad(positions, ((0, 0), (0, pad)))
        q = jnp.moveaxis(q.reshape(batch, blocks, block, heads, size), 1, 0)
        positions = jnp.moveaxis(positions.reshape(batch, blocks, block), 1, 0)
        chosen = jnp.moveaxis(jax.lax.map(select_block, (q, positions)), 0, 1)
        chosen = chosen.reshape(batch, blocks * block, heads, taken)[:, :length]
    return jnp.pad(chosen, ((0, 0), (0, 0), (0, 0), (0, count - taken)), constant_values=-1)


def _best(scores, count):
    """Indices of the `count` largest of the last axis, int32, ties to the lower; -1 for -inf."""
    if count > MAX_PASSES:
        best, index = jax.lax.top_k(scores, count)
        return jnp.where(best > -jnp.inf, index, -1).astype(jnp.int32)
    numbers = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    chosen = []
    for _ in range(count):
        best = jnp.max(scores, axis=-1, keepdims=True)
        index = jnp.where(scores == best, numbers, scores.shape[-1]).min(axis=-1, keepdims=True)
        chosen.append(jnp.where(best > -jnp.inf, index, -1))
        scores = jnp.where(numbers == index, -jnp.inf, scores)
    return jnp.concatenate(chosen, axis=-1)


def select_chunks(
    q: jax.Array,
    k: jax.Array,
    *,
    chunk_size: int,
    top_k: int,
    q_offset=0,
    implementation: str | None = None,
) -> jax.Array:
    """Chooses the past chunks that each query and head attends to beside its own chunk.

    Args:
      q: [B, Tq, H, K] queries; the first of row b stands at absolute position q_offset[b].
      k: [B, Tk, H, K] keys from position 0.
      chunk_size: tokens in a chunk, counted from position 0.
      top_k: chunks a query attends to, its own included.
      q_offset: int, integer scalar or integer [B] (may be traced).
      implementation: "pallas" (TPU), "xla", or None to choose by platform.

    Returns:
      int32 [B, Tq, H, top_k - 1], by descending score, ties to the lower index, padded with -1.
      The own chunk, later chunks and a trailing partial chunk are never chosen. No gradient.

    Raises:
      ValueError: on shapes that do not fit, chunk_size < 1, top_k < 1, a negative q_offset, or a
        named implementation that cannot run here.
    """
    _check(q, k, chunk_size, top_k, q_offset)
    means = chunk_key_means(k, chunk_size)
    problem = lambda platform: selection_tpu.unsupported_reason(q.shape[3], q.dtype)
    candidates = Candidate("pallas", ("tpu",), problem), Candidate("xla")
    chosen = resolve("select_chunks", implementation, candidates)
    if chosen == "pallas" and means.shape[1] and top_k > 1:
        return selection_tpu.select_from_means(
            *jax.lax.stop_gradient((q, means)),
            known_or_rows(q_offset, q.shape[0]),
            chunk_size=chunk_size,
            count=top_k - 1,
        )
    positions = query_positions(q_offset, q.shape[0], q.shape[1])
    return select_from_means(q, means, positions, chunk_size=chunk_size, count=top_k - 1)


def select_chunks_reference(
    q: jax.Array, k: jax.Array, *, chunk_size: int, top_k: int, q_offset=0
) -> jax.Array:
    """Oracle of `select_chunks`: the whole score matrix, sorted stably. Same arguments, result."""
    _check(q, k, chunk_size, top_k, q_offset)
    batch, length, heads, _ = q.shape
    chunks = k.shape[1] // chunk_size
    q = q.astype(jnp.float32)
    means = [
        jnp.mean(k[:, c * chunk_size : (c + 1) * chunk_size].astype(jnp.float32), axis=1)
        for c in range(chunks)
    ]
    score = [jnp.sum(q * mean[:, None], axis=-1) for mean in means]  # N times [B, Tq, H]
    columns = chunks + top_k - 1
    absent = [jnp.full((batch, length, heads), -jnp.inf)] * (top_k - 1)
    scores = jnp.stack(score + absent, axis=-1) if columns else jnp.zeros((batch, length, heads, 0))
    own = query_positions(q_offset, batch, length) // chunk_size
    past = jnp.arange(columns)[None, None, :] < own[:, :, None]
    scores = jnp.where(past[:, :, None, :], scores, -jnp.inf)
    order = jnp.argsort(-scores, axis=-1, stable=True)[..., : top_k - 1]
    chosen = jnp.take_along_axis(scores, order, axis=-1)
    return jnp.where(chosen > -jnp.inf, order, -1).astype(jnp.int32)


def _check(q, k, chunk_size, top_k, q_offset) -> None:
    check_chunking(chunk_size, top_k)
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"q {q.shape} and k {k.shape} must be [B, T, H, K] with the same batch, heads and "
            "key size"
        )
    check_offset(q_offset, q.shape[0])
