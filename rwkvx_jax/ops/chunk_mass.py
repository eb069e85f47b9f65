"""Where the mass of full attention lies, chunk by chunk, and a loss that teaches it to a selector.

The mass is that of the softmax of all earlier keys, summed over each chunk. It is made for one
block of queries at a time from blocks of keys, so that neither [T, T] scores nor the [T, N] masses
of a sequence ever exist. The loss is the divergence of a selector's choice from it, as index heads
are trained in MiniMax-M3 (arXiv 2606.13392) and DeepSeek-V3.2, over past chunks alone: the own
chunk is read in any case.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from rwkvx_jax.ops.blocked_attention import MASKED, filled
from rwkvx_jax.ops.documents import check_segment_ids, document_starts
from rwkvx_jax.ops.loop_bounds import at_most
from rwkvx_jax.ops.selection import readable_keys
from rwkvx_jax.ops.selectors import Selector, check_selector

# Queries and keys of the blocks in which scores exist.
QUERIES_AT_ONCE = 128
KEYS_AT_ONCE = 512

_product = partial(
    jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


def log_mass(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B T G K"],
    positions: Int[Array, " Q"],
    first: Int[Array, "B Q"] | None = None,
    *,
    chunk_size: int,
) -> Float32[Array, "B H Q N"]:
    """Logs of the summed weights exp(q . k / sqrt(K)) of each chunk's keys up to the query.

    A softmax over chunks makes the mass of full attention of them. No gradient.

    Args:
      q: [B, Q, H, K] queries.
      k: [B, T, G, K] keys from position 0; G divides H.
      positions: int [Q], below T, of the queries.
      first: int [B, Q], the first key that each sees; None: 0.
      chunk_size: tokens in a chunk.

    Returns:
      float32 [B, H, Q, ceil(T / chunk_size)]; -inf for chunks without a key that the query sees.
    """
    batch, length, groups, size = k.shape
    chunks = -(-length // chunk_size)
    each = min(chunks, max(1, KEYS_AT_ONCE // chunk_size))
    blocks, cols = -(-chunks // each), each * chunk_size
    k = jnp.pad(k, ((0, 0), (0, blocks * cols - length), (0, 0), (0, 0)))
    q = q.reshape(batch, q.shape[1], groups, -1, size)

    def add(j, found):
        some = jax.lax.dynamic_slice_in_dim(k, j * cols, cols, 1)
        scores = _product("bqgmk,bsgk->bgmqs", q, some) * size**-0.5
        keys = j * cols + jnp.arange(cols)[None, None]
        visible = keys <= positions[None, :, None]
        if first is not None:
            visible &= keys >= first[:, :, None]
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        sums = jax.nn.logsumexp(scores.reshape(*scores.shape[:-1], each, chunk_size), axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(found, sums, j * each, sums.ndim - 1)

    shape = (batch, groups, q.shape[3], q.shape[1], blocks * each)
    with at_most((blocks + 1) / 2):  # on average over the queries of a sequence
        found = jax.lax.fori_loop(0, positions.max() // cols + 1, add, filled(q, shape, -jnp.inf))
    return found.reshape(batch, -1, *found.shape[3:])[..., :chunks]


def selection_loss(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    index_q: Float[Array, "B T S Q"],
    index_k: Float[Array, "B T G2 I"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    chunk_size: int,
    selector: Selector,
) -> Float32[Array, "B S"]:
    """How far the scores of a selector are from the mass of full attention, summed over queries.

    For each query and choice, the Kullback-Leibler divergence sum_c m_c (log m_c - log p_c) over
    its past chunks c: m is the mass that full attention of q to k has in them, as a share of that
    in all of them, mean over the H / S heads of the choice; p is the softmax of the selector's
    scores / sqrt(I). A query with fewer than two past chunks adds 0.

    Args:
      q: [B, T, H, K] queries of whole sequences; no gradient.
      k: [B, T, G, K] keys; no gradient.
      index_q: [B, T, S, Q] what the selector is asked with; Q is I times its `query_vectors`.
      index_k: [B, T, G2, I] what it scores; G2 divides S.
      segment_ids: numbers of packed documents; their queries see and choose within them, as in
        `select_chunks`, and padding adds 0. None: a row is one text.
      chunk_size: tokens in a chunk.
      selector: of one query a choice (`together` is 1).

    Returns:
      float32 [B, S], differentiable in index_q and index_k.

    Raises:
      ValueError: a selector that does not fit the chunk, heads together, or segment_ids that number
        no documents.
    """
    choices = index_q.shape[2]
    if selector.together > 1 or q.shape[2] % choices:
        raise ValueError(
            f"{q.shape[2]} heads with {choices} choices and a selector of {selector.together} "
            "heads together: give one index query a choice, and a divisor of the heads"
        )
    check_selector(selector, chunk_size, choices, index_k.shape[2])
    if segment_ids is not None:
        check_segment_ids("selection_loss", segment_ids, *k.shape[:2])
    complete = k.shape[1] // chunk_size * chunk_size
    if complete == 0:
        return jnp.zeros((q.shape[0], choices), jnp.float32)
    first = counted = counts = None
    if segment_ids is not None:
        first = document_starts(segment_ids)
        counted = readable_keys(first, chunk_size)
        counts = selector.counts(counted, chunk_size)
        first = jnp.where(segment_ids > 0, first, k.shape[1])  # padding sees nothing
    rows = selector.rows_of(index_k[:, :complete], chunk_size, counted)
    rows = jnp.repeat(rows, choices // index_k.shape[2], axis=2)
    return _divergence(index_q, rows, q, k, (first, counts), chunk_size, selector)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _divergence(index_q, rows, q, k, packed, chunk_size, selector):
    return _over_blocks(index_q, rows, q, k, packed, chunk_size, selector, gradients=False)[0]


def _forward(index_q, rows, *arguments):
    total, *gradients = _over_blocks(index_q, rows, *arguments, gradients=True)
    return total, gradients


def _backward(chunk_size, selector, gradients, grad):
    """The gradients of each row's and choice's sum are there: the masses are not made twice."""
    index_q, rows = (x * grad[:, None, :, None].astype(x.dtype) for x in gradients)
    return index_q, rows, None, None, None


_divergence.defvjp(_forward, _backward)


def _over_blocks(index_q, rows, q, k, packed, chunk_size, selector, *, gradients):
    """Sums [B, S], and with `gradients` theirs by index_q and rows (else None)."""
    batch, length, choices, _ = index_q.shape
    once = min(QUERIES_AT_ONCE, length)
    blocks = -(-length // once)
    chunks = rows.shape[1] // selector.rows
    first, counts = packed

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, blocks * once - length)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, blocks, once, *x.shape[2:]).swapaxes(0, 1)

    def one(carry, block):
        total, by_rows = carry
        number, q, index_q, first = block
        positions = number * once + jnp.arange(once, dtype=jnp.int32)
        own = jnp.where(positions < length, positions // chunk_size, 0)
        numbers = jnp.arange(chunks)[None, None, None]
        past = numbers < own[None, None, :, None]  # [1 or B, 1, Q, N]
        if first is not None:
            past &= numbers >= first[:, None, :, None] // chunk_size
        mass = log_mass(q, k, jnp.minimum(positions, length - 1), first, chunk_size=chunk_size)
        mass = _shares(mass[..., :chunks], past).reshape(batch, choices, -1, once, chunks).mean(2)
        divergence = partial(_divergence_from, mass, past, counts, chunk_size, selector)
        if not gradients:
            return (total + divergence(index_q, rows), by_rows), None
        found, pull = jax.vjp(divergence, index_q, rows)
        by_index_q, more = pull(jnp.ones_like(found))
        return (total + found, by_rows + more), by_index_q

    start = filled(index_q, (batch, choices)), filled(rows, rows.shape)
    first = None if first is None else split(first)
    blocks_of = jnp.arange(blocks, dtype=jnp.int32), split(q), split(index_q), first
    (total, by_rows), by_index_q = jax.lax.scan(one, start, blocks_of)
    if not gradients:
        return total, None, None
    by_index_q = by_index_q.swapaxes(0, 1).reshape(batch, -1, *index_q.shape[2:])[:, :length]
    return total, by_index_q, by_rows


def _shares(log_weights, past):
    """Each past chunk's share of all of them; zeros where there is none."""
    return jax.nn.softmax(jnp.where(past, log_weights, MASKED), axis=-1) * past


def _divergence_from(mass, past, counts, chunk_size, selector, index_q, rows):
    """Sums [B, S] over the queries of a block, for mass [B, S, Q, N]."""
    counts = None if counts is None else counts[:, None]
    keys = selector.keys(rows.swapaxes(1, 2), chunk_size, counts)  # [B, S, N * keys_per_chunk, F]
    queries = selector.queries(index_q.astype(jnp.float32).swapaxes(1, 2), 1)
    size, part = rows.shape[3], chunk_size // selector.keys_per_chunk
    weights = None if counts is None else counts[:, :, None] / part
    products = _product("bsqf,bsnf->bsqn", queries, keys)
    scores = selector.combine(products, size, weights) * size**-0.5
    log_p = jax.nn.log_softmax(jnp.where(past, scores, MASKED), axis=-1)
    return (jax.scipy.special.xlogy(mass, mass) - mass * log_p).sum((2, 3))
