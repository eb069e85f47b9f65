"""Sparse attention in plain XLA, chunk by chunk: no [T, T] array, no [T, N] mask.

Every query chooses its own past chunks, so queries that share a chunk lie anywhere. The pairs
(query, chosen chunk) are therefore sorted by chunk; then each chunk's keys meet just the queries
that chose it, in tiles gathered from the sorted list. How many tiles a chunk needs depends on the
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
from rwkvx_jax.ops.attention_inputs import Offset, offset_of_rows
from rwkvx_jax.ops.heads import map_heads
from rwkvx_jax.ops.loop_bounds import at_most

# Rows of a tile lie between these; float32 scores of a tile number at most MAX_SCORES.
MIN_ROWS = 16
MAX_ROWS = 256
MAX_SCORES = 1 << 17


def sparse_attention_xla(
    q: Float[Array, "B Tq H K"],
    k: Float[Array, "B Tk H K"],
    v: Float[Array, "B Tk H V"],
    selection: Int32[Array, "B Tq H J"],
    *,
    chunk_size: int,
    scale: float,
    q_offset: Offset = 0,
) -> Float[Array, "B Tq H V"]:
    """Own chunk causally and the selected past chunks; see `block_sparse.sparse_attention`.

    Args:
      q: queries.
      k: keys.
      v: values.
      selection: J = top_k - 1 past chunks of each query; -1 for none.
      chunk_size: tokens in a chunk.
      scale: positive float.
      q_offset: int, integer scalar or integer [B].

    Returns:
      [B, Tq, H, V] in q's dtype.
    """
    offset = offset_of_rows(q_offset, q.shape[0])
    forms = _forward_head, _backward_head
    return attend_heads(q, k, v, selection, offset, forms, chunk_size, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def attend_heads(q, k, v, selection, offset, forms, chunk_size, scale):
    """Attention that is computed head by head, with gradients that are written out.

    All arrays vary over the same manual mesh axes (`placement.vary_together`).

    Args:
      q, k, v, selection, chunk_size, scale: as in `sparse_attention_xla`.
      offset: int32 [B].
      forms: (forward, backward) of one head, with keyword arguments chunk_size and scale.
        forward: q [Tq, K], k [Tk, K], v [Tk, V], selection [Tq, J], offset -> output [Tq, V],
        log-sum-exp [Tq]. backward: q, k, v, selection, output, log-sum-exp, gradient of the
        output, offset -> float32 gradients of q, k, v.

    Returns:
      [B, Tq, H, V] in q's dtype.
    """
    return _attend_heads_fwd(q, k, v, selection, offset, forms, chunk_size, scale)[0]


def _attend_heads_fwd(q, k, v, selection, offset, forms, chunk_size, scale):
    forward = functools.partial(forms[0], chunk_size=chunk_size, scale=scale)
    out, lse = map_heads(forward, (q, k, v, selection), offset)
    out = out.astype(q.dtype)
    return out, (q, k, v, selection, offset, out, lse)


def _attend_heads_bwd(forms, chunk_size, scale, saved, grad):
    q, k, v, selection, offset, out, lse = saved
    backward = functools.partial(forms[1], chunk_size=chunk_size, scale=scale)
    dq, dk, dv = map_heads(backward, (q, k, v, selection, out, lse, grad), offset)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


attend_heads.defvjp(_attend_heads_fwd, _attend_heads_bwd)


def _forward_head(q, k, v, selection, offset, *, chunk_size, scale):
    """One head: q [Tq, K], k [Tk, K], v [Tk, V], selection [Tq, J] -> out [Tq, V], lse [Tq]."""
    running = blocked.causal_forward(q, k, v, offset, scale=scale, chunk_size=chunk_size)
    chunks = k.shape[0] // chunk_size
    if selection.shape[1] and chunks:
        running = _add_past(running, q, k, v, selection, offset, chunk_size, scale)
    return blocked.softmax_finish(running, scale)


def _add_past(running, q, k, v, selection, offset, chunk_size, scale):
    chunks = k.shape[0] // chunk_size
    pairs = sort_pairs(selection, offset, chunk_size, chunks)
    tile_rows = _tile_rows(selection.size, chunk_size, chunks)
    tile = _tile_reader(*pairs, tile_rows, q.shape[0])

    def chunk_step(running, numbered):
        chunk, k_chunk, v_chunk = numbered

        def add_tile(t, running):
            return _add_rows(running, q, tile(chunk, t), k_chunk, v_chunk, scale)

        tiles = _tiles_of(pairs[1], chunk, tile_rows)
        with at_most(_most_tiles(selection.size, tile_rows, chunks) / chunks):
            return jax.lax.fori_loop(0, tiles, add_tile, running), None

    numbers = jnp.arange(chunks, dtype=jnp.int32)
    return jax.lax.scan(chunk_step, running, (numbers, *_complete(chunk_size, k, v)))[0]


def add_past(running, q, read_chunk, chunks, selection, offset, *, chunk_size, scale):
    """Takes the selected past chunks of one head into a running softmax, reading only those.

    Costs nothing that grows with the number of chunks but a few integers for each.

    Args:
      running: of the Tq queries, as `blocked_attention.softmax_start` describes it.
      q: [Tq, K].
      read_chunk: chunk number -> its keys [chunk_size, K] and values [chunk_size, V].
      chunks: number of chunks there are, a positive int.
      selection: int32 [Tq, J], J > 0.
      offset: int32 scalar, position of the first query.
      chunk_size: tokens in a chunk.
      scale: positive float.
    """
    pairs = sort_pairs(selection, offset, chunk_size, chunks)
    tile_rows = _tile_rows(selection.size, chunk_size, chunks)
    tile = _tile_reader(*pairs, tile_rows, q.shape[0])
    ends = jnp.cumsum(_tiles_of(pairs[1], jnp.arange(chunks), tile_rows))

    def add_tile(t, running):
        chunk = jnp.searchsorted(ends, t, side="right").astype(jnp.int32)
        first = jnp.where(chunk > 0, ends[chunk - 1], 0)
        return _add_rows(running, q, tile(chunk, t - first), *read_chunk(chunk), scale)

    with at_most(_most_tiles(selection.size, tile_rows, chunks)):
        return jax.lax.fori_loop(0, ends[-1], add_tile, running)


def _add_rows(running, q, rows, k_chunk, v_chunk, scale):
    """Takes one chunk into the running softmax of some queries; indices beyond them are ignored."""
    own = [_take(x, rows) for x in running]
    own = blocked.softmax_add(own, _take(q, rows), k_chunk, v_chunk, scale)
    return tuple(
        x.at[rows].set(new, mode="drop", unique_indices=True)
        for x, new in zip(running, own, strict=True)
    )


def _backward_head(q, k, v, selection, out, lse, grad, offset, *, chunk_size, scale):
    """Gradients of one head: dq [Tq, K], dk [Tk, K], dv [Tk, V], float32."""
    delta = blocked.output_dot(grad, out)
    dq, dk, dv = blocked.causal_backward(
        q, k, v, grad, lse, delta, offset, scale=scale, chunk_size=chunk_size
    )
    chunks = k.shape[0] // chunk_size
    if not (selection.shape[1] and chunks):
        return dq, dk, dv
    pairs = sort_pairs(selection, offset, chunk_size, chunks)
    tile_rows = _tile_rows(selection.size, chunk_size, chunks)
    tile = _tile_reader(*pairs, tile_rows, q.shape[0])

    def chunk_step(dq, numbered):
        chunk, k_chunk, v_chunk = numbered

        def add_tile(t, carry):
            dq, dk_chunk, dv_chunk = carry
            rows = tile(chunk, t)
            # A row past the chunk's last pair contributes nothing: its gradient is zero here.
            real = (rows < q.shape[0])[:, None]
            q_rows, lse_rows, delta_rows = (_take(x, rows) for x in (q, lse, delta))
            grad_rows = jnp.where(real, _take(grad, rows), 0)
            delta_rows = jnp.where(real[:, 0], delta_rows, 0)
            dq_rows, dk_tile, dv_tile = blocked.block_gradients(
                q_rows, k_chunk, v_chunk, grad_rows, lse_rows, delta_rows, scale
            )
            dq = dq.at[rows].add(dq_rows * scale, mode="drop", unique_indices=True)
            return dq, dk_chunk + dk_tile, dv_chunk + dv_tile

        dk_chunk = blocked.filled(k, (k.shape[1], chunk_size))
        dv_chunk = blocked.filled(v, (v.shape[1], chunk_size))
        tiles = _tiles_of(pairs[1], chunk, tile_rows)
        carry = dq, dk_chunk, dv_chunk
        with at_most(_most_tiles(selection.size, tile_rows, chunks) / chunks):
            dq, dk_chunk, dv_chunk = jax.lax.fori_loop(0, tiles, add_tile, carry)
        return dq, (dk_chunk.T * scale, dv_chunk.T)

    numbers = jnp.arange(chunks, dtype=jnp.int32)
    dq, past = jax.lax.scan(chunk_step, dq, (numbers, *_complete(chunk_size, k, v)))
    rest = ((0, k.shape[0] - chunks * chunk_size), (0, 0))  # of a chunk that is not complete
    dk_past, dv_past = (jnp.pad(x.reshape(chunks * chunk_size, -1), rest) for x in past)
    return dq, dk + dk_past, dv + dv_past


def sort_pairs(selection, offset, chunk_size, chunks):
    """The pairs (query, selected chunk) of one head, sorted by chunk.

    Entries that are not past chunks of their query are left out: -1, and whatever would break
    causality.

    Args:
      selection: int32 [Tq, J].
      offset: int32 scalar, position of the first query.
      chunk_size: tokens in a chunk.
      chunks: number of complete chunks N.

    Returns:
      queries: int32 [Tq * J], the query of each pair, ordered by chunk; pairs left out come last.
      starts: int32 [N + 1], where each chunk's pairs start in `queries`.
    """
    length = selection.shape[0]
    own = (offset + jnp.arange(length, dtype=jnp.int32)) // chunk_size
    past = (selection >= 0) & (selection < jnp.minimum(own, chunks)[:, None])
    chunk = jnp.where(past, selection, chunks)
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


def _tile_rows(pairs: int, chunk_size: int, chunks: int) -> int:
    """Rows of a tile: about half of an average chunk's pairs, so that little is padding."""
    rows = 1 << max(0, (pairs // chunks) // 2 - 1).bit_length()
    limit = 1 << max(0, MAX_SCORES // chunk_size).bit_length() >> 1
    return max(MIN_ROWS, min(rows, MAX_ROWS, limit))


def _most_tiles(pairs: int, tile_rows: int, chunks: int) -> float:
    """Tiles of all chunks together, however the pairs fall; each chunk's last may be partial."""
    return pairs / tile_rows + chunks


def _tiles_of(starts, chunk, tile_rows):
    return (starts[chunk + 1] - starts[chunk] + tile_rows - 1) // tile_rows


def _tile_reader(queries, starts, tile_rows, length):
    """tile(chunk, t) -> query indices int32 [tile_rows], `length` where the chunk has no more."""
    queries = jnp.pad(queries, (0, tile_rows))

    def tile(chunk, t):
        first = starts[chunk] + t * tile_rows
        rows = jax.lax.dynamic_slice(queries, (first,), (tile_rows,))
        left = starts[chunk + 1] - first
        # Distinct values outside, since the scatter is promised unique rows.
        steps = jnp.arange(tile_rows, dtype=jnp.int32)
        return jnp.where(steps < left, rows, length + steps)

    return tile


def _take(x, rows):
    return x.at[rows].get(mode="clip")


def _complete(chunk_size, *arrays):
    """[Tk, ...] -> [N, chunk_size, ...], complete chunks only."""
    chunks = arrays[0].shape[0] // chunk_size
    return [x[: chunks * chunk_size].reshape(chunks, chunk_size, *x.shape[1:]) for x in arrays]
