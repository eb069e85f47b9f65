"""Which past chunks a query reads: top-k by a score of each chunk's keys, the mean key by default.

Selection stands apart from attention so that all implementations of attention agree on it, ties
included, and other selectors can be tried: the paper names its mean-key rule as its first
limitation. A `Selector` says what is kept of a chunk's keys (rows: sums or bounds) and how a query
scores them; the rows serve decoding as well, where the cache keeps them running. Everything is
float32, and the scores exist for one block of queries at a time: [B, H, Tq, N] is never held.
Source: RWKV-X (arXiv 2504.21463), per-head gate.
"""

from functools import partial
from typing import Literal, NamedTuple

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

# Scores held at once, over batch and heads. About a megabyte of scores keeps a block in cache; a
# block of fewer queries than the least would read all rows for too little work.
SCORES_PER_BLOCK = 1 << 20
MIN_QUERIES_PER_BLOCK = 32

# Up to this many chunks are chosen by as many passes for the maximum, which on CPU take half the
# time of `top_k`'s sorting; more by `top_k`. Both give ties to the lower index.
MAX_PASSES = 4

# A block of queries is scored against as many chunks as are past for its last one, rounded up to
# one of so many numbers, which differ by no less than that: each is compiled by itself.
PREFIXES = 8
MIN_CHUNKS_PER_PREFIX = 128


class Selector(NamedTuple):
    """How a query q scores a chunk.

    kind:
      "mean": q . mean key (the paper's).
      "max": the largest q . mean key over `blocks` equal parts of the chunk.
      "pooled": log-sum-exp of q . mean key / sqrt(K) over the parts, so what the chunk would weigh
        in the softmax if every key were its part's mean.
      "bounds": sum over channels of the larger of q * smallest key and q * largest key, an upper
        bound of q . k over the chunk (Quest, arXiv 2406.10774).
    blocks: parts of a chunk, for "max" and "pooled".
    """

    kind: Literal["mean", "max", "pooled", "bounds"] = "mean"
    blocks: int = 1

    @property
    def rows(self) -> int:
        """Rows kept of each chunk."""
        return {"mean": 1, "bounds": 2}.get(self.kind, self.blocks)

    def rows_of(self, k: jax.Array, chunk_size: int) -> jax.Array:
        """What is kept of keys [B, T, H, K] in chunks: float32 [B, ceil(T / chunk_size) * rows, H,
        K]. Sums over the parts of each chunk, or for "bounds" the largest of -k and of k; a
        trailing partial chunk as far as it goes.
        """
        if self.kind != "bounds":
            sums = chunk_key_sums(k, chunk_size // self.rows)
            missing = -(-k.shape[1] // chunk_size) * self.rows - sums.shape[1]
            return jnp.pad(sums, ((0, 0), (0, missing), (0, 0), (0, 0)))
        batch, length, heads, size = k.shape
        chunks = -(-length // chunk_size)
        padding = ((0, 0), (0, chunks * chunk_size - length), (0, 0), (0, 0))
        split = lambda x: jnp.pad(x, padding, constant_values=-jnp.inf).reshape(
            batch, chunks, chunk_size, heads, size
        )
        k = k.astype(jnp.float32)
        bounds = jnp.stack([split(-k).max(2), split(k).max(2)], axis=2)
        return bounds.reshape(batch, chunks * 2, heads, size)

    @property
    def has_factors(self) -> bool:
        """Whether the score is a product of the query with one vector of the chunk."""
        return self.kind in ("mean", "bounds")

    def factors(self, q: jax.Array, k: jax.Array, chunk_size: int) -> tuple[jax.Array, jax.Array]:
        """Queries and a key for each complete chunk, whose product is the score.

        Only "mean" and "bounds" have one; for the latter it is twice as long as a key.

        Args:
          q: [B, Tq, H, K].
          k: [B, Tk, H, K].
          chunk_size: tokens in a chunk.

        Returns:
          Queries [B, Tq, H, rows * K] of the dtype of q, and float32 keys [B, Tk // chunk_size, H,
          rows * K].

        Raises:
          ValueError: another kind.
        """
        if not self.has_factors:
            raise ValueError(f"selector {self.kind!r} scores by no one product: use `scores`")
        if self.kind == "mean":
            return q, chunk_key_means(k, chunk_size)
        complete = k.shape[1] // chunk_size
        rows = self.rows_of(k[:, : complete * chunk_size], chunk_size)
        keys = jnp.concatenate([rows[:, ::2], rows[:, 1::2]], axis=-1)
        return jnp.concatenate([jax.nn.relu(-q), jax.nn.relu(q)], axis=-1), keys

    def start(self, shape: tuple[int, ...]) -> jax.Array:
        """Rows of chunks without any key, float32."""
        return jnp.full(shape, -jnp.inf if self.kind == "bounds" else 0.0, jnp.float32)

    def scores(self, q: jax.Array, rows: jax.Array, chunk_size: int) -> jax.Array:
        """Scores of queries float32 [B, T, H, K] for N chunks with rows [B, N * rows, H, K].

        Returns:
          float32 [B, T, H, N]; anything, NaN included, for chunks that are not complete.
        """

        def product(q, rows):
            high = jax.lax.Precision.HIGHEST
            return jnp.einsum("bthk,bnhk->bthn", q, rows, precision=high)

        if self.kind == "bounds":
            return product(jax.nn.relu(-q), rows[:, ::2]) + product(jax.nn.relu(q), rows[:, 1::2])
        found = product(q, rows / (chunk_size // self.rows))
        if self.kind == "mean":
            return found
        found = found.reshape(*found.shape[:3], -1, self.rows)
        if self.kind == "max":
            return found.max(-1)
        return jax.nn.logsumexp(found * q.shape[-1] ** -0.5, axis=-1)


MEAN = Selector()
"""The paper's selector."""


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


def select_from_rows(
    q: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    *,
    chunk_size: int,
    count: int,
    selector: Selector = MEAN,
) -> jax.Array:
    """The `count` past chunks with the highest scores, for queries at given positions.

    A chunk is past for a query when it ends at or before the start of the query's own chunk.

    Args:
      q: [B, Tq, H, K] queries.
      rows: [B, N * selector.rows, H, K] float32, what the selector keeps of chunks 0..N-1; those
        of chunks that are not past for a query (not complete, in a cache) may hold anything.
      positions: int32 [B, Tq] absolute positions of the queries.
      chunk_size: tokens in a chunk.
      count: how many chunks to choose.
      selector: how a chunk is scored.

    Returns:
      int32 [B, Tq, H, count], by descending score, ties to the lower index, padded with -1.
      No gradient flows through it.
    """
    batch, length, heads, size = q.shape
    chunks = rows.shape[1] // selector.rows
    taken = min(count, chunks)
    if taken == 0:
        return jnp.full((batch, length, heads, count), -1, jnp.int32)
    q, rows = jax.lax.stop_gradient((q, rows.astype(jnp.float32)))

    block = max(MIN_QUERIES_PER_BLOCK, SCORES_PER_BLOCK // (batch * heads * rows.shape[1]))
    block = min(length, block)
    # Few queries, as in decoding, save less than a branch may cost.
    few = length < MIN_QUERIES_PER_BLOCK
    step = chunks if few else max(MIN_CHUNKS_PER_PREFIX, -(-chunks // PREFIXES))
    among = partial(_select_among, chunk_size=chunk_size, count=taken, selector=selector)
    prefixes = [partial(among, min(n, chunks)) for n in range(step, chunks + step, step)]

    def select_block(block):
        q, positions = block  # [B, block, H, K], [B, block]
        own = positions // chunk_size
        needed = jnp.clip((own.max() - 1) // step, 0, len(prefixes) - 1)
        return jax.lax.switch(needed, prefixes, q, rows, own)

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
    return _pad_choices(chosen, count)


def _select_among(first, q, rows, own, *, chunk_size, count, selector):
    """Choices [B, T, H, count] from the `first` chunks alone; own: int32 [B, T], own chunks."""
    some = rows[:, : first * selector.rows]
    scores = selector.scores(q.astype(jnp.float32), some, chunk_size)
    past = jnp.arange(first)[None, None, :] < own[:, :, None]
    best = _best(jnp.where(past[:, :, None, :], scores, -jnp.inf), min(count, first))
    return _pad_choices(best, count)


def _pad_choices(chosen, count):
    """Choices [B, T, H, J] with -1 up to `count`."""
    missing = ((0, 0), (0, 0), (0, 0), (0, count - chosen.shape[-1]))
    return jnp.pad(chosen, missing, constant_values=-1)


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
    selector: Selector = MEAN,
) -> jax.Array:
    """Chooses the past chunks that each query and head attends to beside its own chunk.

    Args:
      q: [B, Tq, H, K] queries; the first of row b stands at absolute position q_offset[b].
      k: [B, Tk, H, K] keys from position 0.
      chunk_size: tokens in a chunk, counted from position 0.
      top_k: chunks a query attends to, its own included.
      q_offset: int, integer scalar or integer [B] (may be traced).
      implementation: "pallas" (TPU, selector "mean" or "bounds"), "xla", or None to choose by
        platform.
      selector: how a query scores a chunk.

    Returns:
      int32 [B, Tq, H, top_k - 1], by descending score, ties to the lower index, padded with -1.
      The own chunk, later chunks and a trailing partial chunk are never chosen. No gradient.

    Raises:
      ValueError: on shapes that do not fit, chunk_size < 1, top_k < 1, a negative q_offset, or a
        chunk that can't be cut into the selector's blocks, or a named implementation that cannot
        run here.
    """
    _check(q, k, chunk_size, top_k, q_offset, selector)
    complete = k.shape[1] // chunk_size

    def problem(platform: str) -> str | None:
        if not selector.has_factors:
            return f"the selector is {selector.kind!r} and the kernel scores one key a chunk"
        reason = selection_tpu.unsupported_reason(q.shape[3] * selector.rows, q.dtype)
        if reason and selector.kind == "bounds":
            reason += ' (the selector "bounds" doubles it)'
        return reason

    candidates = Candidate("pallas", ("tpu",), problem), Candidate("xla")
    chosen = resolve("select_chunks", implementation, candidates)
    if chosen == "pallas" and complete and top_k > 1:
        return selection_tpu.select_by_keys(
            *jax.lax.stop_gradient(selector.factors(q, k, chunk_size)),
            known_or_rows(q_offset, q.shape[0]),
            chunk_size=chunk_size,
            count=top_k - 1,
        )
    positions = query_positions(q_offset, q.shape[0], q.shape[1])
    rows = selector.rows_of(k[:, : complete * chunk_size], chunk_size)
    return select_from_rows(
        q, rows, positions, chunk_size=chunk_size, count=top_k - 1, selector=selector
    )


def select_chunks_reference(
    q: jax.Array,
    k: jax.Array,
    *,
    chunk_size: int,
    top_k: int,
    q_offset=0,
    selector: Selector = MEAN,
) -> jax.Array:
    """Oracle of `select_chunks`: the whole score matrix, sorted stably. Same arguments, result."""
    _check(q, k, chunk_size, top_k, q_offset, selector)
    batch, length, heads, _ = q.shape
    chunks = k.shape[1] // chunk_size
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    chunk = lambda c: k[:, c * chunk_size : (c + 1) * chunk_size]
    score = [_score_reference(q, chunk(c), selector) for c in range(chunks)]
    columns = chunks + top_k - 1
    absent = [jnp.full((batch, length, heads), -jnp.inf)] * (top_k - 1)
    scores = jnp.stack(score + absent, axis=-1) if columns else jnp.zeros((batch, length, heads, 0))
    own = query_positions(q_offset, batch, length) // chunk_size
    past = jnp.arange(columns)[None, None, :] < own[:, :, None]
    scores = jnp.where(past[:, :, None, :], scores, -jnp.inf)
    order = jnp.argsort(-scores, axis=-1, stable=True)[..., : top_k - 1]
    chosen = jnp.take_along_axis(scores, order, axis=-1)
    return jnp.where(chosen > -jnp.inf, order, -1).astype(jnp.int32)


def _score_reference(q, chunk, selector: Selector) -> jax.Array:
    """Scores [B, Tq, H] of one chunk's keys [B, C, H, K]."""
    dot = lambda key: jnp.sum(q * key[:, None], axis=-1)
    if selector.kind == "mean":
        return dot(jnp.mean(chunk, axis=1))
    if selector.kind == "bounds":
        low, high = chunk.min(1)[:, None], chunk.max(1)[:, None]
        return jnp.sum(jnp.maximum(q * low, q * high), axis=-1)
    parts = jnp.split(chunk, selector.blocks, axis=1)
    scores = jnp.stack([dot(jnp.mean(part, axis=1)) for part in parts])
    if selector.kind == "max":
        return scores.max(0)
    return jnp.log(jnp.sum(jnp.exp(scores * q.shape[-1] ** -0.5), axis=0))


def check_selector(selector: Selector, chunk_size: int) -> None:
    """Raises ValueError on an unknown kind, or blocks that do not divide the chunk."""
    if selector.kind not in ("mean", "max", "pooled", "bounds"):
        raise ValueError(
            f"selector {selector.kind!r} is unknown: choose mean, max, pooled or bounds"
        )
    if selector.blocks < 1 or chunk_size % selector.blocks:
        raise ValueError(
            f"a chunk of {chunk_size} tokens can't be cut into {selector.blocks} equal blocks: "
            "choose a divisor"
        )


def _check(q, k, chunk_size, top_k, q_offset, selector) -> None:
    check_chunking(chunk_size, top_k)
    check_selector(selector, chunk_size)
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"q {q.shape} and k {k.shape} must be [B, T, H, K] with the same batch, heads and "
            "key size"
        )
    check_offset(q_offset, q.shape[0])
