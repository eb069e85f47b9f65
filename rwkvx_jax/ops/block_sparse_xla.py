"""Sparse attention in plain XLA, chunk by chunk: no [T, T] array, no [T, N] mask.

Every query chooses its own past chunks, so queries that share a chunk lie anywhere. The pairs
(query, chosen chunk) are therefore sorted by chunk; then each chunk's keys meet just the queries
that chose it, in tiles gathered from the sorted list: the queries of one token that share both a
choice and a key head are gathered as one row. How many tiles a chunk needs depends on the
data, and the loop over them runs exactly that often: all queries may choose the same chunk, and no
pair is dropped. The query's own chunk is a causal pass over the diagonal (`blocked_attention`).
Both parts go into one running softmax a query, so no partial result is held per pair and memory is
linear in T whatever top_k is. The backward pass walks the same tiles once, with the softmax
recomputed from the log-sum-exp: dK and dV of a chunk add up while it is at hand, dQ is scattered.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from rwkvx_jax.ops import blocked_attention as blocked
from rwkvx_jax.ops.attention_inputs import Offset, rows_of
from rwkvx_jax.ops.documents import first_keys
from rwkvx_jax.ops.heads import map_heads
from rwkvx_jax.ops.loop_bounds import at_most

# Queries of a tile lie between these; float32 scores of a tile number at most MAX_SCORES.
MIN_ROWS = 16
MAX_ROWS = 256
MAX_SCORES = 1 << 17


def sparse_attention_xla(
    q: Float[Array, "B Tq H K"],
    k: Float[Array, "B Tk G K"],
    v: Float[Array, "B Tk G V"],
    selection: Int32[Array, "B Tq S J"],
    *,
    chunk_size: int,
    scale: float,
    q_offset: Offset = 0,
    starts: Int32[Array, "B Tk"] | None = None,
) -> Float[Array, "B Tq H V"]:
    """Own chunk causally and the selected past chunks; see `block_sparse.sparse_attention`.

    Args:
      q: queries.
      k: keys; G divides S.
      v: values.
      selection: J = top_k - 1 past chunks of each query; -1 for none. S divides H.
      chunk_size: tokens in a chunk.
      scale: positive float.
      q_offset: int, integer scalar or integer [B].
      starts: of packed documents (`documents.document_starts`); the selection has no chunks then
        that end before its query's document begins.

    Returns:
      [B, Tq, H, V] in q's dtype.
    """
    rows = rows_of(q_offset, starts, q.shape[0])
    forms = _forward_group, _backward_group
    return attend_heads(q, k, v, selection, rows, forms, chunk_size, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def attend_heads(q, k, v, selection, rows, forms, chunk_size, scale):
    """Attention that is computed key head by key head, with gradients that are written out.

    All arrays vary over the same manual mesh axes (`placement.vary_together`).

    Args:
      q, k, v, selection, chunk_size, scale: as in `sparse_attention_xla`.
      rows: offset int32 [B] and, where documents are packed, starts int32 [B, Tk].
      forms: (forward, backward) of one key head, with keyword arguments chunk_size and scale.
        forward: q [Tq, M, K], k [Tk, K], v [Tk, V], selection [Tq, P, J], *rows -> output
        [Tq, M, V], log-sum-exp [Tq, M]; M is H / G, P is S / G. backward: q, k, v, selection,
        output, log-sum-exp, gradient of the output, *rows -> float32 gradients of q, k, v.

    Returns:
      [B, Tq, H, V] in q's dtype.
    """
    return _attend_heads_fwd(q, k, v, selection, rows, forms, chunk_size, scale)[0]


def _attend_heads_fwd(q, k, v, selection, rows, forms, chunk_size, scale):
    def forward(q, k, v, *more):
        return forms[0](q, k[:, 0], v[:, 0], *more, chunk_size=chunk_size, scale=scale)

    out, lse = map_heads(forward, (q, k, v, selection), rows)
    out = out.astype(q.dtype)
    return out, (q, k, v, selection, rows, out, lse)


def _attend_heads_bwd(forms, chunk_size, scale, saved, grad):
    q, k, v, selection, rows, out, lse = saved

    def backward(q, k, v, *more):
        gradients = forms[1](q, k[:, 0], v[:, 0], *more, chunk_size=chunk_size, scale=scale)
        return gradients[0], *(x[:, None] for x in gradients[1:])

    dq, dk, dv = map_heads(backward, (q, k, v, selection, out, lse, grad), rows)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


attend_heads.defvjp(_attend_heads_fwd, _attend_heads_bwd)


def _own_chunk(q, offset, starts, chunk_size, scale):
    """Options of the causal pass over the diagonal."""
    first = None if starts is None else first_keys(starts, offset, q.shape[0])
    return {"scale": scale, "chunk_size": chunk_size, "first": first}


def _forward_group(q, k, v, selection, offset, starts=None, *, chunk_size, scale):
    """`forward` of `attend_heads`."""
    options = _own_chunk(q, offset, starts, chunk_size, scale)
    running = blocked.causal_forward(q, k, v, offset, **options)
    chunks = k.shape[0] // chunk_size
    if selection.size and chunks:
        running = _add_past(running, q, k, v, selection, offset, starts, chunk_size, scale)
    return blocked.softmax_finish(running, scale)


def _add_past(running, q, k, v, selection, offset, starts, chunk_size, scale):
    chunks = k.shape[0] // chunk_size
    tiles = _Tiles(q, selection, offset, chunk_size, chunks)
    rows = tiles.rows(q)

    def chunk_step(running, numbered):
        chunk, k_chunk, v_chunk, visible = numbered

        def add_tile(t, running):
            return _add_rows(running, rows, tiles(chunk, t), k_chunk, v_chunk, scale, visible)

        with at_most(tiles.most / chunks):
            return jax.lax.fori_loop(0, tiles.of(chunk), add_tile, running), None

    visible = _visible_in_chunks(starts, chunk_size, chunks)
    numbered = jnp.arange(chunks, dtype=jnp.int32), *_complete(chunk_size, k, v), visible
    past = jax.lax.scan(chunk_step, tuple(map(tiles.rows, running)), numbered)[0]
    return tuple(x.reshape(like.shape) for x, like in zip(past, running, strict=True))


def add_past(running, q, read_chunk, chunks, selection, offset, *, chunk_size, scale):
    """Takes the selected past chunks of one key head into a running softmax, reading only those.

    Costs nothing that grows with the number of chunks but a few integers for each.

    Args:
      running: of the queries, as `blocked_attention.causal_forward` returns it.
      q: [Tq, M, K].
      read_chunk: chunk number -> its keys [chunk_size, K] and values [chunk_size, V].
      chunks: number of chunks there are, a positive int.
      selection: int32 [Tq, P, J], J > 0.
      offset: int32 scalar, position of the first query.
      chunk_size: tokens in a chunk.
      scale: positive float.
    """
    tiles = _Tiles(q, selection, offset, chunk_size, chunks)
    rows = tiles.rows(q)
    ends = jnp.cumsum(tiles.of(jnp.arange(chunks)))

    def add_tile(t, running):
        chunk = jnp.searchsorted(ends, t, side="right").astype(jnp.int32)
        first = jnp.where(chunk > 0, ends[chunk - 1], 0)
        return _add_rows(running, rows, tiles(chunk, t - first), *read_chunk(chunk), scale)

    with at_most(tiles.most):
        past = jax.lax.fori_loop(0, ends[-1], add_tile, tuple(map(tiles.rows, running)))
    return tuple(x.reshape(like.shape) for x, like in zip(past, running, strict=True))


def _visible_in_chunks(starts, chunk_size, chunks):
    """Which keys of each chunk queries behind it may read, bool [N, 1, chunk_size]; None: all.

    Only queries of the document that a chunk ends with are behind it, and so all see the same.
    """
    if starts is None:
        return None
    keys = jnp.arange(chunks * chunk_size, dtype=jnp.int32).reshape(chunks, 1, chunk_size)
    return keys >= starts[chunk_size - 1 :: chunk_size][:chunks, None, None]


def _add_rows(running, q, rows, k_chunk, v_chunk, scale, visible=None):
    """Takes one chunk into the running softmax of some rows; indices beyond them are ignored."""
    own = [_take(x, rows) for x in running]
    own = blocked.softmax_add(own, _take(q, rows), k_chunk, v_chunk, scale, visible)
    return tuple(
        x.at[rows].set(new.reshape(-1, *x.shape[1:]), mode="drop", unique_indices=True)
        for x, new in zip(running, own, strict=True)
    )


def _backward_group(q, k, v, selection, out, lse, grad, offset, starts=None, *, chunk_size, scale):
    """`backward` of `attend_heads`."""
    delta = blocked.output_dot(grad, out)
    options = _own_chunk(q, offset, starts, chunk_size, scale)
    dq, dk, dv = blocked.causal_backward(q, k, v, grad, lse, delta, offset, **options)
    chunks = k.shape[0] // chunk_size
    if not (selection.size and chunks):
        return dq, dk, dv
    tiles, shape = _Tiles(q, selection, offset, chunk_size, chunks), q.shape
    dq, q, grad, lse, delta = map(tiles.rows, (dq, q, grad, lse, delta))

    def chunk_step(dq, numbered):
        chunk, k_chunk, v_chunk, visible = numbered

        def add_tile(t, carry):
            dq, dk_chunk, dv_chunk = carry
            rows = tiles(chunk, t)
            # A row past the chunk's last pair contributes nothing: its gradient is zero here.
            real = jnp.repeat(rows < q.shape[0], q.shape[1])[:, None]
            q_rows, lse_rows, delta_rows = (_take(x, rows) for x in (q, lse, delta))
            grad_rows = jnp.where(real, _take(grad, rows), 0)
            delta_rows = jnp.where(real[:, 0], delta_rows, 0)
            dq_rows, dk_tile, dv_tile = blocked.block_gradients(
                q_rows, k_chunk, v_chunk, grad_rows, lse_rows, delta_rows, scale, visible
            )
            dq_rows = dq_rows.reshape(-1, *dq.shape[1:]) * scale
            dq = dq.at[rows].add(dq_rows, mode="drop", unique_indices=True)
            return dq, dk_chunk + dk_tile, dv_chunk + dv_tile

        dk_chunk = blocked.filled(k, (k.shape[1], chunk_size))
        dv_chunk = blocked.filled(v, (v.shape[1], chunk_size))
        carry = dq, dk_chunk, dv_chunk
        with at_most(tiles.most / chunks):
            dq, dk_chunk, dv_chunk = jax.lax.fori_loop(0, tiles.of(chunk), add_tile, carry)
        return dq, (dk_chunk.T * scale, dv_chunk.T)

    numbers = jnp.arange(chunks, dtype=jnp.int32)
    visible = _visible_in_chunks(starts, chunk_size, chunks)
    dq, past = jax.lax.scan(chunk_step, dq, (numbers, *_complete(chunk_size, k, v), visible))
    rest = ((0, k.shape[0] - chunks * chunk_size), (0, 0))  # of a chunk that is not complete
    dk_past, dv_past = (jnp.pad(x.reshape(chunks * chunk_size, -1), rest) for x in past)
    return dq.reshape(shape), dk + dk_past, dv + dv_past


class _Tiles:
    """The pairs of one key head, chunk by chunk in tiles of as many rows as suit a product.

    A row holds the queries of the M / P heads that share a choice: row t * P + p is of token t.
    """

    def __init__(self, q, selection, offset, chunk_size, chunks):
        """Arguments as in `add_past`."""
        pairs = selection.size
        self.number = selection.shape[0] * selection.shape[1]
        heads = q.shape[1] // selection.shape[1]
        self.size = _tile_rows(pairs, heads, chunk_size, chunks)
        self.most = _most_tiles(pairs, self.size, chunks)
        self.queries, self.starts = sort_pairs(selection, offset, chunk_size, chunks)
        self.queries = jnp.pad(self.queries, (0, self.size))

    def rows(self, x):
        """[Tq, M, ...] -> [rows, queries of a row, ...]."""
        return x.reshape(self.number, -1, *x.shape[2:])

    def of(self, chunk):
        """Number of tiles of a chunk."""
        return (self.starts[chunk + 1] - self.starts[chunk] + self.size - 1) // self.size

    def __call__(self, chunk, t):
        """Rows of a chunk's tile number t, int32 [size]; beyond all rows where it has no more."""
        first = self.starts[chunk] + t * self.size
        rows = jax.lax.dynamic_slice(self.queries, (first,), (self.size,))
        left = self.starts[chunk + 1] - first
        # Distinct values outside, since the scatter is promised unique rows.
        steps = jnp.arange(self.size, dtype=jnp.int32)
        return jnp.where(steps < left, rows, self.number + steps)


def sort_pairs(selection, offset, chunk_size, chunks):
    """The pairs (query, selected chunk) of one key head, sorted by chunk.

    Entries that are not past chunks of their query are left out: -1, and whatever would break
    causality.

    Args:
      selection: int32 [Tq, P, J].
      offset: int32 scalar, position of the first query.
      chunk_size: tokens in a chunk.
      chunks: number of complete chunks N.

    Returns:
      queries: int32 [Tq * P * J], the query (t * P + p) of each pair, ordered by chunk; pairs left
        out come last.
      starts: int32 [N + 1], where each chunk's pairs start in `queries`.
    """
    length, choices, slots = selection.shape
    own = (offset + jnp.arange(length, dtype=jnp.int32)) // chunk_size
    past = (selection >= 0) & (selection < jnp.minimum(own, chunks)[:, None, None])
    chunk = jnp.where(past, selection, chunks).reshape(length * choices, slots)
    counts = jnp.zeros(chunks + 1, jnp.int32).at[chunk.reshape(-1)].add(1)
    return order_queries(chunk, chunks), jnp.cumsum(counts) - counts


def order_queries(chunk, chunks):
    """Query of each pair, int32 [Tq * J], ordered by chunk, then by query.

    Args:
      chunk: int32 [Tq, J], each in 0 .. chunks.
      chunks: number of chunks N.
    """
    length, slots = chunk.shape
    if (chunks + 1) * length > 2**32:
        return (jnp.argsort(chunk.reshape(-1)) // slots).astype(jnp.int32)
    # Chunk and query in one number: sorting single numbers is five times faster than pairs.
    query = jnp.arange(length, dtype=jnp.uint32)[:, None]
    key = chunk.astype(jnp.uint32) * length + query
    return (jnp.sort(key.reshape(-1)) % length).astype(jnp.int32)


def _tile_rows(pairs: int, heads: int, chunk_size: int, chunks: int) -> int:
    """Rows of a tile, of `heads` queries each: about half of an average chunk's pairs, so that
    little is padding."""
    queries = heads << max(0, (pairs // chunks) // 2 - 1).bit_length()
    limit = 1 << max(0, MAX_SCORES // chunk_size).bit_length() >> 1
    return max(1, max(MIN_ROWS, min(queries, MAX_ROWS, limit)) // heads)


def _most_tiles(pairs: int, tile_rows: int, chunks: int) -> float:
    """Tiles of all chunks together, however the pairs fall; each chunk's last may be partial."""
    return pairs / tile_rows + chunks


def _take(x, rows):
    """The queries of some rows of x [rows, n, ...], one after the other: [len(rows) * n, ...]."""
    taken = x.at[rows].get(mode="clip")
    return taken.reshape(-1, *x.shape[2:])


def _complete(chunk_size, *arrays):
    """[Tk, ...] -> [N, chunk_size, ...], complete chunks only."""
    chunks = arrays[0].shape[0] // chunk_size
    return [x[: chunks * chunk_size].reshape(chunks, chunk_size, *x.shape[1:]) for x in arrays]
