"""Flash-style causal attention to one key head in plain XLA: to everything, within chunks, masked.

The dense baseline attends to all earlier keys, the sparse op needs the same thing restricted to
each query's own chunk or, in texts that are not long, to the chunks it chose. All are loops over
square blocks that visit only blocks with something visible in them, mask only where they must, and
keep a running softmax. Nothing larger than one block of scores exists. The loops have
data-dependent lengths, so gradients are written out here and tied together by `custom_vjp` in the
ops that use them. Keys are [T, K]: the callers loop over batch and key heads, because on a CPU one
large matrix product uses the cores better than a batch of small ones. The M query heads that share
a key head are rows of the same products, [T * M, K].

Layout notes, measured on CPU: products of the form A B^T and A B run near peak, A^T B at a third of
it, hence the transposed accumulators of the key and value gradients; row-wise reductions are fast.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rwkvx_jax.ops.loop_bounds import at_most

# A score that no real score can lie below; finite, so that differences stay finite.
MASKED = -1e30

# Side of a block of scores: 512 x 512 float32 fill one core's second-level cache.
MAX_BLOCK = 512
MIN_BLOCK = 64


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b, accumulated in float32; float32 operands are multiplied as such on every platform."""
    return _matmul(a, b, 0)


def matmul_nt(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T, accumulated as in `matmul`."""
    return _matmul(a, b, 1)


def _matmul(a, b, axis):
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def softmax_start(q: jax.Array, value_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Running softmax of queries q [rows, K] that have seen no key.

    Returns:
      (weighted values [rows, V], largest score [rows], sum of weights [rows]), float32. Scores are
      kept unscaled; weights are relative to the largest.
    """
    rows = q.shape[0]
    return filled(q, (rows, value_size)), filled(q, (rows,), MASKED), filled(q, (rows,))


def filled(like: jax.Array, shape: tuple[int, ...], value: float = 0.0) -> jax.Array:
    """A float32 constant for a loop to carry; varies over the manual mesh axes that `like` does."""
    return jax.lax.full_like(like, value, jnp.float32, shape=shape)


def softmax_add(running, q, k, v, scale, visible=None):
    """Takes keys into a running softmax.

    Args:
      running: as returned by `softmax_start`.
      q: [rows, K].
      k: [cols, K].
      v: [cols, V].
      scale: positive float.
      visible: bool [rows, cols], or None for all.

    Returns:
      The running softmax after these keys. A row that has seen nothing visible holds finite
      nonsense, which the first visible key wipes out.
    """
    values, largest, total = running
    scores = matmul_nt(q, k)
    if visible is not None:
        scores = jnp.where(visible, scores, MASKED)
    peak = jnp.maximum(largest, jnp.max(scores, axis=1))
    weights = jnp.exp((scores - peak[:, None]) * scale)
    shrink = jnp.exp((largest - peak) * scale)
    total = total * shrink + jnp.sum(weights, axis=1)
    values = values * shrink[:, None] + matmul(weights.astype(v.dtype), v)
    return values, peak, total


def softmax_finish(running, scale):
    """(output [..., V], log of the summed exponentials of the scaled scores [...]), float32."""
    values, largest, total = running
    return values / total[..., None], largest * scale + jnp.log(total)


def output_dot(grad, out):
    """Sum over V of grad * output, float32 [...]: the softmax part of the backward pass."""
    # As rows [n, V]: sums over [T, 1, V] are rounded in another order.
    rows = grad.reshape(-1, grad.shape[-1]), out.reshape(-1, out.shape[-1])
    grad_rows, out_rows = (x.astype(jnp.float32) for x in rows)
    return jnp.sum(grad_rows * out_rows, axis=1).reshape(grad.shape[:-1])


def block_gradients(q, k, v, grad, lse, delta, scale, visible=None):
    """Gradients of one block of scores, each to be added up by the caller.

    Args:
      q: [rows, K] queries.
      k: [cols, K] keys.
      v: [cols, V] values.
      grad: [rows, V] gradient of the output.
      lse: [rows] log-sum-exp of all the scaled scores of each query.
      delta: [rows] sum over V of grad * output.
      scale: positive float.
      visible: bool [rows, cols], or None for all.

    Returns:
      (dq [rows, K], dk^T [K, cols], dv^T [V, cols]), float32; dq and dk^T still lack the factor
      `scale`.
    """
    weights = jnp.exp(matmul_nt(q, k) * scale - lse[:, None])
    if visible is not None:
        weights = jnp.where(visible, weights, 0.0)
    errors = (weights * (matmul_nt(grad, v) - delta[:, None])).astype(q.dtype)
    dv = matmul(grad.T, weights.astype(grad.dtype))
    return matmul(errors, k), matmul(q.T, errors), dv


def block_size(chunk_size: int | None, masked_chunks: bool = False) -> int:
    """Side of the square blocks: aligned with the chunks where there are any.

    Within chunks small blocks save work; where chunks (up to MAX_BLOCK) are masked, large ones do,
    and each holds whole chunks.
    """
    if chunk_size is None:
        return MAX_BLOCK
    if masked_chunks:
        return chunk_size * (MAX_BLOCK // chunk_size)
    if chunk_size < MIN_BLOCK:
        return chunk_size * (MIN_BLOCK // chunk_size)
    return -(-chunk_size // -(-chunk_size // MAX_BLOCK))


def tokens_at_once(side: int, length: int, heads: int) -> int:
    """Tokens whose queries of `heads` heads make a block of rows: `side` of them, if that is not
    more than MAX_BLOCK rows."""
    return min(side, max(1, MAX_BLOCK // heads), length)


def split_rows(x: jax.Array, rows: int) -> jax.Array:
    """[T, ...] -> [ceil(T / rows), rows, ...], padded with zeros at the end."""
    blocks = -(-x.shape[0] // rows)
    x = jnp.pad(x, [(0, blocks * rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(blocks, rows, *x.shape[1:])


def causal_forward(q, k, v, offset, *, scale, chunk_size=None, seen=None, first=None, window=None):
    """Causal attention to one key head: to all earlier keys, to those of the query's own chunk, or
    to those of given chunks.

    Args:
      q: [Tq, M, K], queries of M heads at positions offset .. offset + Tq - 1.
      k: [Tk, K] from position 0.
      v: [Tk, V].
      offset: int32 scalar.
      scale: positive float.
      chunk_size: restricts each query to its own chunk; None for everything.
      seen: bool [Tq, P, ceil(Tk / chunk_size)], restricts each query to these chunks instead, which
        hold at most MAX_BLOCK keys; P divides M, and M / P neighbouring heads see the same.
      first: int32 [Tq], restricts each query to the keys from this position on, where its document
        begins; does not decrease, and is not behind the query. None: to all of these.
      window: restricts each query to so many of the last keys, its own included; None: to none.

    Returns:
      The running softmax of the queries, with [Tq, M] for the rows of `softmax_start`.
    """
    cols = min(block_size(chunk_size, seen is not None), k.shape[0])
    k_blocks, v_blocks = split_rows(k, cols), split_rows(v, cols)
    read = lambda j: (k_blocks[j], v_blocks[j])
    blocks = KeyBlocks(read, cols, k_blocks.shape[0], k.shape[0], v.shape[1])
    options = {"scale": scale, "chunk_size": chunk_size, "seen": seen, "first": first}
    return causal_over_blocks(q, blocks, offset, window=window, **options)


class KeyBlocks(NamedTuple):
    """Where keys and values come from, block by block."""

    read: Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # block -> [cols, K], [cols, V]
    cols: int
    blocks: int  # the last one may be padded
    keys: int  # rows that are not padding
    value_size: int


def causal_over_blocks(
    q, blocks: KeyBlocks, offset, *, scale, chunk_size=None, seen=None, first=None, window=None
):
    """`causal_forward` with keys and values that are read where they lie."""
    length, heads = q.shape[:2]
    cols = blocks.cols
    rows = tokens_at_once(block_size(chunk_size, seen is not None), length, heads)
    q = split_rows(q, rows)
    first = _first_seen(first, offset, length, chunk_size, seen, window)
    mask = _Mask(rows, cols, heads, chunk_size, seen, first, window)

    def query_block(numbered):
        index, block = numbered
        block = block.reshape(rows * heads, -1)
        position = offset + index * rows

        def add_keys(masked):
            def body(j, running):
                visible = mask(position, index, j) if masked else None
                return softmax_add(running, block, *blocks.read(j), scale, visible)

            return body

        running = softmax_start(block, blocks.value_size)
        for start, stop, masked in mask.key_blocks(position, index, blocks):
            with at_most(mask.most_blocks(masked, rows, cols, blocks.blocks)):
                running = jax.lax.fori_loop(start, stop, add_keys(masked), running)
        return running

    running = jax.lax.map(query_block, (jnp.arange(q.shape[0], dtype=jnp.int32), q))
    return jax.tree.map(lambda x: x.reshape(-1, heads, *x.shape[2:])[:length], running)


def causal_backward(
    q, k, v, grad, lse, delta, offset, *,
    scale, chunk_size=None, seen=None, first=None, window=None,
):  # fmt: skip
    """Gradients of `causal_forward`, given the log-sum-exp over everything a query attends to.

    Args:
      q, k, v, offset, scale, chunk_size, seen, first, window: as in `causal_forward`.
      grad: [Tq, M, V] gradient of the output.
      lse: [Tq, M] log-sum-exp; over more keys than visible here, if the caller adds others.
      delta: [Tq, M] sum over V of grad * output.

    Returns:
      (dq [Tq, M, K], dk [Tk, K], dv [Tk, V]), float32.
    """
    shape, keys = q.shape, k.shape[0]
    length, heads = shape[:2]
    side = block_size(chunk_size, seen is not None)
    rows, cols = tokens_at_once(side, length, heads), min(side, keys)
    first = _first_seen(first, offset, length, chunk_size, seen, window)
    mask = _Mask(rows, cols, heads, chunk_size, seen, first, window)
    blocks = (split_rows(x, rows) for x in (q, grad, lse, delta))
    q, grad, lse, delta = (x.reshape(-1, rows * heads, *x.shape[3:]) for x in blocks)

    def key_block(dq, numbered):
        index, k_block, v_block = numbered

        def add_queries(masked):
            def body(i, carry):
                dq, dk, dv = carry
                visible = mask(offset + i * rows, i, index) if masked else None
                dq_block, dk_block, dv_block = block_gradients(
                    q[i], k_block, v_block, grad[i], lse[i], delta[i], scale, visible
                )
                return dq.at[i].add(dq_block), dk + dk_block, dv + dv_block

            return body

        dk, dv = filled(k, (k.shape[1], cols)), filled(v, (v.shape[1], cols))
        carry = dq, dk, dv
        for start, stop, masked in mask.query_blocks(index * cols, q.shape[0], offset):
            with at_most(mask.most_blocks(masked, cols, rows, q.shape[0])):
                carry = jax.lax.fori_loop(start, stop, add_queries(masked), carry)
        dq, dk, dv = carry
        return dq, (dk.T * scale, dv.T)

    blocks = split_rows(k, cols), split_rows(v, cols)
    numbers = jnp.arange(blocks[0].shape[0], dtype=jnp.int32)
    dq, (dk, dv) = jax.lax.scan(key_block, filled(q, q.shape), (numbers, *blocks))
    dq = dq.reshape(-1, *shape[1:])[:length] * scale
    return dq, dk.reshape(-1, k.shape[1])[:keys], dv.reshape(-1, v.shape[1])[:keys]


def _first_seen(first, offset, length, chunk_size, seen, window):
    """`first` of `causal_forward`, with what restricts queries to their own chunk, if there is one,
    and to a window taken into it."""
    queries = offset + jnp.arange(length, dtype=jnp.int32)
    if window is not None:
        near = queries - (window - 1)
        first = near if first is None else jnp.maximum(first, near)
    if first is None or chunk_size is None or seen is not None:
        return first
    return jnp.maximum(first, queries // chunk_size * chunk_size)


class _Mask:
    """What the queries of `rows` tokens and `heads` heads see in blocks of `cols` keys; the other
    fields as in `causal_forward`, `first` as `_first_seen` returns it."""

    def __init__(
        self, rows: int, cols: int, heads: int, chunk_size: int | None, seen, first,
        window: int | None,
    ):  # fmt: skip
        self.rows, self.cols, self.heads = rows, cols, heads
        self.window = window
        self.chunk_size = chunk_size
        self.within = (
            chunk_size if seen is None else None
        )  # the chunk size where only own chunks are
        self.own = self.within if first is None else None  # the same, where chunks alone say so
        self.first, self.seen = first, None
        if first is not None:
            padded = jnp.pad(first, (0, -first.shape[0] % rows), mode="edge")
            self.first_blocks = padded.reshape(-1, rows)
        if seen is not None:
            assert chunk_size is not None  # `seen` is of chunks
            per_block = -(-cols // chunk_size)
            padded = jnp.pad(seen, ((0, 0), (0, 0), (0, -seen.shape[2] % per_block)))
            self.seen = split_rows(padded, rows)  # [blocks, rows, P, N]

    def __call__(self, position, row_block, col_block):
        """Which keys of a block the queries at position.. see, bool [rows * heads, cols]."""
        queries = position + jnp.arange(self.rows, dtype=jnp.int32)[:, None]
        keys = col_block * self.cols + jnp.arange(self.cols, dtype=jnp.int32)[None, :]
        visible = keys <= queries
        if self.own is not None:
            visible &= keys >= queries // self.own * self.own
        if self.first is not None:
            first = jax.lax.dynamic_index_in_dim(self.first_blocks, row_block, 0, False)
            visible &= keys >= first[:, None]
        visible = visible[:, None]
        if self.seen is not None:
            chunks = -(-self.cols // self.chunk_size)
            seen = jax.lax.dynamic_index_in_dim(self.seen, row_block, 0, False)
            seen = jax.lax.dynamic_slice_in_dim(seen, col_block * chunks, chunks, 2)
            visible &= jnp.repeat(seen, self.chunk_size, axis=2)[..., : self.cols]
        return jnp.repeat(visible, self.heads // visible.shape[1], axis=1).reshape(-1, self.cols)

    @property
    def masks_all(self) -> bool:
        """Whether every block has something to be masked."""
        return self.seen is not None or (self.within is not None and self.within <= self.cols)

    def key_blocks(self, position, row_block, blocks: KeyBlocks):
        """Ranges of key blocks that queries position .. position + rows - 1 see: (start, stop,
        masked). They follow one another; in an unmasked one every query sees every key."""
        rows, cols, own = self.rows, self.cols, self.own
        last = position + rows - 1
        stop = jnp.clip(last // cols + 1, 0, blocks.blocks)
        if self.first is not None:
            first = lambda row: self.first_blocks[row_block, row]
        elif own is not None:
            first = lambda row: (last if row else position) // own * own
        elif self.seen is not None:
            return ((0, stop, True),)
        else:
            inner_stop = jnp.clip((position + 1) // cols, 0, blocks.keys // cols)
            return (0, inner_stop, False), (inner_stop, stop, True)
        start = jnp.clip(first(0) // cols, 0, stop)
        if self.masks_all:
            return ((start, stop, True),)
        inner_start = jnp.clip(-(-first(-1) // cols), start, stop)
        inner_stop = jnp.minimum((position + 1) // cols, blocks.keys // cols)
        inner_stop = jnp.clip(inner_stop, inner_start, stop)
        return (
            (start, inner_start, True),
            (inner_start, inner_stop, False),
            (inner_stop, stop, True),
        )

    def query_blocks(self, key, blocks, offset):
        """Ranges of query blocks that see keys key .. key + cols - 1: (start, stop, masked)."""
        rows, own = self.rows, self.own
        last = key + self.cols - 1
        start = jnp.clip((key - offset) // rows, 0, blocks)
        if self.first is not None:
            until = lambda key: jnp.sum(self.first <= key, dtype=jnp.int32)  # queries: none behind
        elif own is not None:
            until = lambda key: (key // own + 1) * own - offset
        elif self.seen is not None:
            return ((start, blocks, True),)
        else:
            inner_start = jnp.clip(-(-(last - offset) // rows), start, blocks)
            return (start, inner_start, True), (inner_start, blocks, False)
        stop = jnp.clip(-(-until(last) // rows), start, blocks)
        if self.masks_all:
            return ((start, stop, True),)
        inner_start = jnp.clip(-(-(last - offset) // rows), start, stop)
        inner_stop = jnp.clip(until(key) // rows, inner_start, stop)
        return (
            (start, inner_start, True),
            (inner_start, inner_stop, False),
            (inner_stop, stop, True),
        )

    def most_blocks(self, masked: bool, side: int, other: int, blocks: int) -> int:
        """Most iterations of one of those ranges, for a block of `side` rows that meets `blocks` of
        `other` rows: masked ones lie at the edges of what is visible, unless documents or chosen
        chunks begin and end anywhere."""
        if self.seen is not None:
            return blocks
        edge = side // other + 2
        sizes = [size for size in (self.within, self.window) if size is not None]
        reach = min((size // other + edge for size in sizes), default=blocks)
        return min(blocks, edge if masked and self.first is None else reach)
