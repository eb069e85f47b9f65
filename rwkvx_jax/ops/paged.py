"""Attention of new tokens to the pages of a cache, read where they lie.

Pages hold one chunk of keys or values each, for one attention block, batch row and head. Their
buffer is large (gigabytes, for all blocks of a model) and only a few pages of it count for a token,
so nothing here ever copies, transposes or slices the buffer as a whole: `attend_pages` serves one
token a row (decoding), `attend_piece` a piece of text (prefill). For both, `paged_selection` says
which pages. The loops on a CPU are meant for one device. `page_softmax`, `piece_softmax` are this
attention before the division, to be joined with what other devices hold (`paged_mesh`).
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Int, Int32

from rwkvx_jax.ops import blocked_attention as blocked
from rwkvx_jax.ops.attention_inputs import check_groups
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.block_sparse_xla import add_past
from rwkvx_jax.ops.dispatch import Candidate, resolve
from rwkvx_jax.ops.full_attention import full_attention

# Rows of a page that are read at once on a CPU: they stay in the second-level cache, and a partly
# filled page costs little more than what it holds.
TILE = 1024


class Softmax(NamedTuple):
    """Attention before the division: the output is values / total.

    Weights are relative to exp(largest); a query that saw nothing has MASKED there.
    """

    values: Float32[Array, "*any V"]
    largest: Float32[Array, "*any"]  # score, with the scale
    total: Float32[Array, "*any"]


def attend_pages(
    q: Float[Array, "R *M K"],
    keys: Float[Array, "P C K"],
    values: Float[Array, "P C V"],
    page: Int32[Array, "R J"],
    visible: Int32[Array, "R J"],
    hidden: Int32[Array, "R J"] | None = None,
    *,
    scale: float,
    implementation: str | None = None,
) -> Float32[Array, "R *M V"]:
    """Softmax attention of each query over the visible rows of its pages.

    Args:
      q: R queries (batch rows times heads), or R times M where M queries read the same pages.
      keys: all pages.
      values: all pages.
      page: the J pages of each query; entries without visible rows may hold any valid index.
      visible: rows of each page that count, from its start; 0 leaves the page out.
      hidden: how many of these do not count after all, from its start; None: none.
      scale: factor on q . k.
      implementation: "tiles" (CPU: reads only tiles with visible rows, one by one), "gather" (one
        gather of all pages; also the oracle), or None to choose by platform.

    Returns:
      [R, V] or [R, M, V] float32. A query without any visible row gives zeros.

    Raises:
      ValueError: a named implementation that is unknown or cannot run here.
    """
    found = page_softmax(
        q, keys, values, page, visible, hidden, scale=scale, implementation=implementation
    )
    return found.values / found.total[..., None]


def page_softmax(
    q: Float[Array, "R *M K"],
    keys: Float[Array, "P C K"],
    values: Float[Array, "P C V"],
    page: Int32[Array, "R J"],
    visible: Int32[Array, "R J"],
    hidden: Int32[Array, "R J"] | None = None,
    *,
    scale: float,
    implementation: str | None = None,
) -> Softmax:
    """`attend_pages` before the division: [R, V] or [R, M, V], and [R] or [R, M] twice."""
    candidates = (Candidate("tiles", ("cpu",)), Candidate("gather"))
    chosen = resolve("attend_pages", implementation, candidates)
    run = _attend_tiles if chosen == "tiles" else _attend_gathered
    rows = q.astype(jnp.float32).reshape(q.shape[0], -1, q.shape[-1])
    out, largest, total = run(rows, keys, values, page, visible, hidden, scale=scale)
    shape = q.shape[:-1]
    return Softmax(out.reshape(*shape, -1), largest.reshape(shape), total.reshape(shape))


def _attend_gathered(
    q: Float[Array, "R M K"],
    keys: Float[Array, "P C K"],
    values: Float[Array, "P C V"],
    page: Int[Array, "R J"],
    visible: Int[Array, "R J"],
    hidden: Int[Array, "R J"] | None,
    *,
    scale: float,
) -> Softmax:
    """`page_softmax` by one gather."""
    keys, values = keys[page].astype(jnp.float32), values[page].astype(jnp.float32)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    scores = product("rmk,rjck->rmjc", q, keys) * scale
    weights, largest, total = _softmax(scores, visible, hidden)
    return Softmax(product("rmjc,rjcv->rmv", weights, values), largest, total)


def _attend_tiles(q, keys, values, page, visible, hidden, *, scale) -> Softmax:
    """`page_softmax` by two loops over the tiles that hold visible rows, and no others."""
    rows, per_row = page.shape
    shared = q.shape[1]
    chunk, value_size = values.shape[1:]
    tile = next(t for t in range(min(TILE, chunk), 0, -1) if chunk % t == 0)
    parts = chunk // tile
    begin = jnp.arange(parts)[None, None] * tile
    filled = begin < visible[..., None]  # [R, J, parts]
    if hidden is not None:
        filled &= begin + tile > hidden[..., None]
    (numbers,) = jnp.nonzero(filled.reshape(-1), size=filled.size)
    count = filled.sum()

    def read(pages, number):
        """[tile, K]."""
        size = pages.shape[2]
        index, start = page.reshape(-1)[number // parts], number % parts * (tile * size)
        return cut(pages.reshape(-1, chunk * size), index, start, tile * size).reshape(tile, size)

    def score(i, scores):
        queries, some = q[numbers[i] // (per_row * parts)], read(keys, numbers[i])
        found = jnp.concatenate([dot(some, query) for query in queries])
        return _put(scores, found, numbers[i])

    scores = jax.lax.fori_loop(0, count, score, jnp.zeros((filled.size, shared * tile)))
    scores = scores.reshape(rows, per_row * parts, shared, tile).swapaxes(1, 2)
    scores = scores.reshape(rows, shared, per_row, chunk)
    weights, largest, total = _softmax(scores * scale, visible, hidden)
    weights = weights.reshape(rows, shared, per_row * parts, tile).swapaxes(1, 2)
    weights = weights.reshape(filled.size, shared, tile)

    def add(i, sums):
        some = read(values, numbers[i])
        found = jnp.concatenate([dot(one, some) for one in weights[numbers[i]]])
        return _put(sums, found, numbers[i])

    sums = jax.lax.fori_loop(0, count, add, jnp.zeros((filled.size, shared * value_size)))
    return Softmax(sums.reshape(rows, -1, shared, value_size).sum(1), largest, total)


def _softmax(
    scores: jax.Array, visible: jax.Array, hidden: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Exponentials [R, M, J, C] of the visible scores relative to the largest, that [R, M], and
    their sums [R, M], at least the smallest normal number."""
    row = jnp.arange(scores.shape[3])[None, None]
    counts = row < visible[..., None]
    if hidden is not None:
        counts &= row >= hidden[..., None]
    counts = counts[:, None]
    largest = jnp.max(jnp.where(counts, scores, blocked.MASKED), axis=(2, 3))
    weights = jnp.where(counts, jnp.exp(scores - largest[..., None, None]), 0.0)
    return weights, largest, jnp.maximum(weights.sum((2, 3)), jnp.finfo(jnp.float32).tiny)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in float32."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def cut(rows: jax.Array, row: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """`size` numbers of one row, [1, size]. A slice along one axis is copied several times as fast
    as one of rows, and kept apart from the product, which XLA would else compute without vector
    instructions."""
    at = jax.lax.optimization_barrier((row, start))
    return jax.lax.optimization_barrier(jax.lax.dynamic_slice(rows, at, (1, size)))


def _put(rows: jax.Array, row: jax.Array, index: jax.Array) -> jax.Array:
    """`rows` with one replaced. An unsigned index can't count from the end; with a signed one XLA
    asks that anew for each number of the row (a seventh of the time of `_attend_tiles`)."""
    start = index.astype(jnp.uint32), jnp.uint32(0)
    return jax.lax.dynamic_update_slice(rows, row[None], start)


def attend_piece(
    q: Float[Array, "B T H K"],
    keys: Float[Array, "N R K"],
    values: Float[Array, "N R V"],
    first: Int[ArrayLike, ""],
    selection: Int32[Array, "B T S J"] | None,
    offset: Int32[Array, " B"],
    *,
    chunk_size: int,
    scale: float,
    key_heads: int | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H V"]:
    """Attention of a piece of text to the cached rows before it and to itself.

    Args:
      q: queries; the first of row b stands at position offset[b]. Keys and values of the piece are
        in the cache already.
      keys: R rows for each of N (block, batch row, key head) triples, position 0 first.
      values: as keys.
      first: index in N of the block's first batch row and key head; the others follow it.
      selection: past chunks of each query, -1 for none; None for full causal attention. S divides
        H.
      offset: positions of the first queries.
      chunk_size: tokens in a chunk; divides R.
      scale: factor on q . k.
      key_heads: key heads G of a batch row, which divides S; None: as many as q has.
      window: rows that each query reads of full causal attention, its own included; None: all.
      implementation: "in_place" (CPU: costs nothing that grows with S but what is attended to),
        "slice" (cuts the block's rows out and calls `sparse_attention` or `full_attention`; also
        the oracle), or None to choose by platform.

    Returns:
      [B, T, H, V] in q's dtype. No gradient.

    Raises:
      ValueError: numbers of heads that do not divide, or a named implementation that is unknown or
        cannot run here.
    """
    groups = q.shape[2] if key_heads is None else key_heads
    check_groups(q.shape[2], groups, None if selection is None else selection.shape[2])
    candidates = (Candidate("in_place", ("cpu",)), Candidate("slice"))
    if resolve("attend_piece", implementation, candidates) == "in_place":
        found = piece_softmax(
            q,
            keys,
            values,
            first,
            selection,
            offset,
            chunk_size=chunk_size,
            scale=scale,
            key_heads=groups,
            window=window,
        )
        return (found.values / found.total[..., None]).astype(q.dtype)
    batch = q.shape[0]
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, batch * groups)
    k, v = (cut(x).reshape(batch, groups, *x.shape[1:]).swapaxes(1, 2) for x in (keys, values))
    if selection is None:
        return full_attention(q, k, v, q_offset=offset, window=window, scale=scale)
    return sparse_attention(
        q,
        k,
        v,
        chunk_size=chunk_size,
        top_k=selection.shape[-1] + 1,
        selection=selection,
        q_offset=offset,
        scale=scale,
    )


def piece_softmax(
    q: Float[Array, "B T H K"],
    keys: Float[Array, "N R K"],
    values: Float[Array, "N R V"],
    first: Int[ArrayLike, ""],
    selection: Int32[Array, "B T S J"] | None,
    offset: Int32[Array, " B"],
    *,
    chunk_size: int,
    scale: float,
    key_heads: int,
    window: int | None = None,
) -> Softmax:
    """`attend_piece` in place and before the division: [B, T, H, V] and twice [B, T, H].

    Queries may stand before the first of these rows (offset < 0) or beyond the last, where they see
    what of their chunks is here.
    """
    batch, time, heads, _ = q.shape
    stored = keys.shape[1]
    cols = _block_rows(stored)

    def one_key_head(row):
        q, selection, group, offset = row

        def read(start, size):
            cut = lambda x: jax.lax.dynamic_slice(x, (group, start, 0), (1, size, x.shape[2]))[0]
            return cut(keys), cut(values)

        blocks = blocked.KeyBlocks(
            lambda j: read(j * cols, cols), cols, stored // cols, stored, values.shape[2]
        )
        own_chunk = None if selection is None else chunk_size
        running = blocked.causal_over_blocks(
            q, blocks, offset, scale=scale, chunk_size=own_chunk, window=window
        )
        if selection is not None and selection.size:
            running = add_past(
                running,
                q,
                lambda chunk: read(chunk * chunk_size, chunk_size),
                stored // chunk_size,
                selection,
                offset,
                chunk_size=chunk_size,
                scale=scale,
            )
        out, largest, total = running
        tiny = jnp.finfo(jnp.float32).tiny  # padding may stand where nothing is visible
        return Softmax(out, largest * scale, jnp.maximum(total, tiny))

    def flat(x):
        x = x.reshape(batch, time, key_heads, x.shape[2] // key_heads, x.shape[3])
        return x.swapaxes(1, 2).reshape(batch * key_heads, time, *x.shape[3:])

    numbers = first + jnp.arange(batch * key_heads, dtype=jnp.int32)
    chosen = None if selection is None else flat(selection)
    rows = flat(q), chosen, numbers, jnp.repeat(offset, key_heads)

    def whole(x):
        x = x.reshape(batch, key_heads, time, heads // key_heads, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(batch, time, heads, *x.shape[4:])

    return jax.tree.map(whole, jax.lax.map(one_key_head, rows))


def _block_rows(stored: int) -> int:
    """Rows of the blocks in which a query's own chunk is read: a divisor of all rows."""
    small = range(min(stored, blocked.MAX_BLOCK), blocked.MIN_BLOCK - 1, -1)
    large = range(min(stored, blocked.MIN_BLOCK), stored + 1)
    return next(d for d in itertools.chain(small, large) if stored % d == 0)
