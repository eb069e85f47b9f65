"""Which past chunks a query reads: top-k by a score of each chunk's keys, the mean key by default.

Selection stands apart from attention so that all implementations of attention agree on it, ties
included, and other selectors can be tried: the paper names its mean-key rule as its first
limitation. A `Selector` says how a query scores a chunk, and which heads choose together. All of it
is float32, and the scores exist for one block of queries at a time: [B, H, Tq, N] is never held.
Source: RWKV-X (arXiv 2504.21463), per-head gate.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from pallas_kernels import selection_tpu
from rwkvx_jax.config import ModelConfig
from rwkvx_jax.ops.attention_inputs import (
    Offset,
    check_chunking,
    check_offset,
    query_positions,
    query_starts,
    run_attention,
)
from rwkvx_jax.ops.dispatch import Candidate, resolve
from rwkvx_jax.ops.documents import check_segment_ids
from rwkvx_jax.ops.selectors import MEAN, Selector, check_selector

# Scores held at once, over batch and heads. About a million of them stay in cache; a block of fewer
# queries than the least would read all keys for too little work.
SCORES_PER_BLOCK = 1 << 20
MIN_QUERIES_PER_BLOCK = 64

# Fewer queries than that are scored against all chunks: they save less than a branch may cost.
# (For single ones on a CPU see `paged_selection.select_pages`.)
MIN_QUERIES_TO_BRANCH = 32

# Up to this many chunks are chosen by as many passes for the maximum, which on CPU take half the
# time of `top_k`'s sorting; more by `top_k`. Both give ties to the lower index.
MAX_PASSES = 4

# A block of queries is scored against as many chunks as are past for its last one, rounded up to
# one of so many numbers, which differ by no less than that: each is compiled by itself.
PREFIXES = 8
MIN_CHUNKS_PER_PREFIX = 128


class PackedChunks(NamedTuple):
    """What the documents of a packed sequence leave of its chunks."""

    counts: Float32[Array, "B keys"] | None  # as `Selector.counts` returns them
    first_chunk: Int32[Array, "B Tq"]  # that in which each query's document begins


def selector_of(config: ModelConfig) -> Selector:
    """The selector that a configuration names: of queries and keys, or with "index" of the vectors
    that `modules/indexer.py` makes of them, with "seer" of its queries and keys."""
    parts = config.selector_blocks if config.selector in ("max", "pooled", "index") else 1
    if config.selector == "index":  # its queries and keys are those of the choices
        selector = Selector("bounds", parts)
    elif config.selector == "seer":  # its queries are
        selector = Selector("seer")
    else:
        together = config.num_heads // config.choices
        selector = Selector(config.selector, parts, together, config.selection_join)
    return selector._replace(
        forced=config.forced_chunks, span=config.selection_span, spans=config.selection_spans
    )


def repeated_choices(selection: Int[Array, "B T S J"], key_heads: int) -> Int[Array, "B T R J"]:
    """Choices repeated until `key_heads` divides their number, as attention takes them."""
    choices = selection.shape[2]
    return jnp.repeat(selection, math.lcm(choices, key_heads) // choices, axis=2)


def select_from_rows(
    q: Float[Array, "B Tq H Q"],
    rows: Float[Array, "B NR G K"],
    positions: Int[Array, "B Tq"],
    *,
    chunk_size: int,
    count: int,
    selector: Selector = MEAN,
    packed: PackedChunks | None = None,
) -> Int32[Array, "B Tq S {count}"]:
    """The `count` past chunks with the highest scores, for queries at given positions.

    A chunk is past for a query when it ends at or before the start of the query's own chunk.

    Args:
      q: [B, Tq, H, Q] queries; Q is K times the selector's `query_vectors`.
      rows: [B, N * selector.rows, G, K] float32, what the selector keeps of chunks 0..N-1; those
        of chunks that are not past for a query (not complete, in a cache) may hold anything. G
        divides H.
      positions: int32 [B, Tq] absolute positions of the queries.
      chunk_size: tokens in a chunk.
      count: how many chunks to choose.
      selector: how a chunk is scored.
      packed: where documents are packed, what of each chunk may be read by whom.

    Returns:
      int32 [B, Tq, S, count], by descending score, ties to the lower index, padded with -1; S is
      H / selector.together.
      No gradient flows through it.
    """
    (batch, length, heads, _), size = q.shape, rows.shape[3]
    chunks = rows.shape[1] // selector.rows
    taken = min(count, chunks)
    if taken == 0:
        return jnp.full((batch, length, heads // selector.together, count), -1, jnp.int32)
    q, rows = jax.lax.stop_gradient((q, rows.astype(jnp.float32)))
    counts = first_chunk = None
    if packed is not None:
        counts, first_chunk = packed.counts, packed.first_chunk
        counts = None if counts is None else counts[:, None]  # for all heads
    # Heads before time, once: the keys of a head lie together, as products want them.
    q, keys = q.swapaxes(1, 2), selector.keys(rows.swapaxes(1, 2), chunk_size, counts)
    own = positions // chunk_size
    part = chunk_size // selector.keys_per_chunk
    weights = None if counts is None else counts[:, :, None] / part

    few = length < MIN_QUERIES_TO_BRANCH
    step = chunks if few else max(MIN_CHUNKS_PER_PREFIX, -(-chunks // PREFIXES))
    among = partial(_select_among, count=taken, selector=selector, key_size=size)
    prefixes = [partial(among, min(n, chunks)) for n in range(step, chunks + step, step)]

    def select_block(block):
        q, own, first_chunk = block  # [B, H, block, K], [B, block] twice
        needed = jnp.clip((own.max() - 1) // step, 0, len(prefixes) - 1)
        return jax.lax.switch(needed, prefixes, q, keys, own, first_chunk, weights)

    block = max(MIN_QUERIES_PER_BLOCK, SCORES_PER_BLOCK // (batch * heads * keys.shape[2]))
    chosen = _map_blocks(select_block, q, (own, first_chunk), min(length, block))
    return _pad_choices(chosen.swapaxes(1, 2), count)


def _map_blocks(select_block, q, rows, block):
    """(q [B, H, block, K], *rows [B, block]) -> [B, S, block, J], for every block: [B, S, T, J]."""
    batch, heads, length, size = q.shape
    blocks = -(-length // block)
    if blocks == 1:
        return select_block((q, *rows))
    pad = blocks * block - length
    q = jnp.pad(q, ((0, 0), (0, 0), (0, pad), (0, 0)))
    q = jnp.moveaxis(q.reshape(batch, heads, blocks, block, size), 2, 0)

    def split(row):
        return jnp.moveaxis(jnp.pad(row, ((0, 0), (0, pad))).reshape(batch, blocks, block), 1, 0)

    chosen = jax.lax.map(select_block, (q, *jax.tree.map(split, rows)))
    chosen = jnp.moveaxis(chosen, 0, 2)
    return chosen.reshape(*chosen.shape[:2], blocks * block, -1)[:, :, :length]


def _select_among(first, q, keys, own, first_chunk, weights, *, count, selector, key_size):
    """Choices [B, S, T, count] from the `first` chunks alone.

    q: [B, H, T, K]; keys: [B, G, N * keys_per_chunk, F]; own: int32 [B, T], own chunks; first_chunk
    and weights as in `choose_past`.
    """
    some = keys[:, :, : first * selector.keys_per_chunk]
    if weights is not None:
        weights = weights[..., : some.shape[2]]

    def products(selector, keys):
        queries = selector.queries(q.astype(jnp.float32), 1)
        rows = queries.reshape(*keys.shape[:2], -1, queries.shape[3])  # of a key head
        found = jnp.einsum("bgmf,bgnf->bgmn", rows, keys, precision=jax.lax.Precision.HIGHEST)
        return found.reshape(*queries.shape[:3], -1)

    candidates = None
    if selector.span:
        spans = selector.span_rows(some.reshape(*some.shape[:2], -1, key_size))
        spans = products(selector.coarse, spans.reshape(*some.shape[:2], -1, some.shape[3]))
        best = best_spans(selector.coarse.combine(spans, key_size), own, first_chunk, selector)
        numbers = jnp.arange(first) // selector.span
        candidates = (best[..., None] == numbers[None, None, None, None]).any(3)
    return choose_past(
        products(selector, some),
        own,
        first_chunk,
        weights,
        count=count,
        selector=selector,
        key_size=key_size,
        candidates=candidates,
    )


def best_spans(
    scores: Float32[Array, "B S T N"],
    own: Int32[Array, "B T"],
    first_chunk: Int32[Array, "B T"] | None,
    selector: Selector,
) -> Int32[Array, "B S T J"]:
    """Spans whose chunks are candidates, the own one last: int32 [B, S, T, at most spans], -1 for
    none. Scores of spans that are not whole before the own one, or hold chunks before the first,
    may be anything: the one in which a packed document begins is taken before all others."""
    own, first = _columns(own, first_chunk)
    numbers, span = jnp.arange(scores.shape[3])[None, None, None], selector.span
    scores = selector.prefer_forced(scores, numbers, own, first, span)
    scores = jnp.where(numbers * span < first, jnp.inf, scores)
    own_span = jnp.broadcast_to(own // span, (*scores.shape[:3], 1)).astype(jnp.int32)
    whole = (numbers < own_span) & (numbers >= first // span)
    best = _best(jnp.where(whole, scores, -jnp.inf), min(selector.spans - 1, scores.shape[3]))
    return jnp.concatenate([best, own_span], axis=-1)


def _columns(own, first_chunk):
    """Own chunks [B, T], and those in which documents begin (None: 0), as [B, 1, T, 1]."""
    own = own[:, None, :, None]
    return own, 0 * own if first_chunk is None else first_chunk[:, None, :, None]


def choose_past(
    products: Float32[Array, "B H T keys"],
    own: Int32[Array, "B T"],  # own chunks of the queries
    first_chunk: Int32[Array, "B T"] | None = None,  # those in which their documents begin
    weights: Float32[Array, "B 1 1 keys"] | None = None,  # as in `Selector.combine`
    *,
    count: int,
    selector: Selector,
    key_size: int,
    candidates: Bool[Array, "B S T N"] | None = None,
) -> Int32[Array, "B S T J"]:
    """The best `count` of the chunks before the own one (of the candidates among them), by the
    products of queries and keys that `Selector.queries` and `Selector.keys` make: int32 [B, S, T,
    count], -1 for none."""
    scores = selector.combine(products, key_size, weights)
    numbers = jnp.arange(scores.shape[-1])[None, None, None]
    scores = _past_scores(scores, numbers, own, first_chunk, selector)
    if candidates is not None:
        scores = jnp.where(candidates, scores, -jnp.inf)
    return _pad_choices(_best(scores, min(count, scores.shape[-1])), count)


def choose_numbered(
    scores: Float32[Array, "B S T N"],
    numbers: Int32[Array, "B S T N"],  # ascending; -1 for no chunk
    own: Int32[Array, "B T"],
    *,
    count: int,
    selector: Selector,
) -> Int32[Array, "B S T J"]:
    """`choose_past` by the scores of the chunks with these numbers."""
    scores = _past_scores(scores, numbers, own, None, selector)
    best = _best(scores, min(count, scores.shape[-1]))
    chosen = jnp.take_along_axis(numbers, jnp.maximum(best, 0), axis=-1)
    return _pad_choices(jnp.where(best >= 0, chosen, -1), count)


def _past_scores(scores, numbers, own, first_chunk, selector):
    """Scores [B, S, T, N] of the chunks with these numbers: infinite where they are forced, and
    minus infinity where they are not between the first and the own chunk."""
    own, first = _columns(own, first_chunk)
    past = (numbers >= first) & (numbers < own)
    return jnp.where(past, selector.prefer_forced(scores, numbers, own, first), -jnp.inf)


def _pad_choices(chosen, count):
    """Choices [.., .., .., J] with -1 up to `count`."""
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
    q: Float[Array, "B Tq H Q"],
    k: Float[Array, "B Tk G K"],
    *,
    chunk_size: int,
    top_k: int,
    q_offset: Offset = 0,
    segment_ids: Int[Array, "B Tk"] | None = None,
    implementation: str | None = None,
    selector: Selector = MEAN,
) -> Int32[Array, "B Tq S {top_k}-1"]:
    """Chooses the past chunks that each query and head attends to beside its own chunk.

    Args:
      q: [B, Tq, H, Q] queries; the first of row b stands at absolute position q_offset[b]. Q is K
        times the selector's `query_vectors`.
      k: [B, Tk, G, K] keys from position 0. G divides H, and query head h scores the keys of head
        h // (H / G).
      chunk_size: tokens in a chunk, counted from position 0.
      top_k: chunks a query attends to, its own included.
      q_offset: int, integer scalar or integer [B] (may be traced).
      segment_ids: numbers of packed documents (`documents`), of the keys and so of the queries at
        their positions. A query chooses among the chunks from that on in which its document begins,
        and a chunk is scored by the keys of the document it ends with alone: queries behind it are
        of no other. Of a selector's spans that one counts as forced which holds the document's
        first chunk behind others. None: all tokens are of one document.
      implementation: "pallas" (TPU, selector "mean" or "bounds"), "xla", or None to choose by
        platform.
      selector: how a query scores a chunk, and which heads choose together.

    Returns:
      int32 [B, Tq, S, top_k - 1], by descending score, ties to the lower index, padded with -1; S
      is H / selector.together, and query head h uses choice h // selector.together.
      The own chunk, later chunks and a trailing partial chunk are never chosen. No gradient.

    Raises:
      ValueError: on shapes that do not fit, chunk_size < 1, top_k < 1, a negative q_offset,
        segment_ids that number no documents, a chunk that can't be cut into the selector's blocks,
        heads that can't be grouped, or a named implementation that cannot run here.
    """
    check_selection(q, k, chunk_size, top_k, q_offset, selector)
    if segment_ids is not None:
        check_segment_ids("select_chunks", segment_ids, *k.shape[:2])
    complete = k.shape[1] // chunk_size

    def problem(platform: str) -> str | None:
        if not selector.is_product:
            return f"the selector is {selector.kind!r} and the kernel scores one key a chunk"
        if selector.span or selector.forced != "none":
            return "the kernel scores all chunks alike, and has no spans and no forced chunks"
        if not selector.sums_queries:
            return "heads that choose together take the largest score and the kernel sums queries"
        reason = selection_tpu.unsupported_reason(k.shape[3] * selector.rows, q.dtype)
        if reason and selector.rows > 1:
            reason += f" ({selector.rows} times that of a key, by the selector {selector.kind!r})"
        return reason

    candidates = Candidate("pallas", ("tpu",), problem), Candidate("xla")
    chosen = resolve("select_chunks", implementation, candidates)
    by_kernel = chosen == "pallas" and complete > 0 and top_k > 1
    options = {"chunk_size": chunk_size, "count": top_k - 1, "selector": selector}
    run = partial(_select_by_kernel if by_kernel else _select_in_xla, **options)
    arrays = jax.lax.stop_gradient((q, k))
    return run_attention(run, arrays, q_offset, segment_ids=segment_ids, check_vma=not by_kernel)


def _select_by_kernel(q, k, *, chunk_size, count, selector, q_offset, starts=None, interpret=False):
    lowest = counted = None
    if starts is not None:
        lowest = query_starts(starts, q_offset, q.shape[1]) // chunk_size
        counted = readable_keys(starts, chunk_size)
    factors = kernel_factors(q, k, chunk_size, selector, counted)
    options = {"chunk_size": chunk_size, "count": count, "interpret": interpret}
    return selection_tpu.select_by_keys(*factors, q_offset, lowest=lowest, **options)


def _select_in_xla(q, k, *, chunk_size, count, selector, q_offset, starts=None):
    positions = query_positions(q_offset, q.shape[0], q.shape[1])
    k, counted, packed = k[:, : k.shape[1] // chunk_size * chunk_size], None, None
    if starts is not None:
        first = query_starts(starts, q_offset, q.shape[1])
        counted = readable_keys(starts[:, : k.shape[1]], chunk_size)
        packed = PackedChunks(selector.counts(counted, chunk_size), first // chunk_size)
    rows = selector.rows_of(k, chunk_size, counted)
    options = {"chunk_size": chunk_size, "count": count, "selector": selector}
    return select_from_rows(q, rows, positions, packed=packed, **options)


def readable_keys(starts: Int32[Array, "B T"], chunk_size: int) -> Bool[Array, "B complete"]:
    """Which keys of complete chunks are of the document that their chunk ends with.

    Args:
      starts: where the document of each token begins; a run of padding has a beginning of its own.
      chunk_size: tokens in a chunk.
    """
    complete = starts.shape[1] // chunk_size * chunk_size
    begin = jnp.repeat(starts[:, chunk_size - 1 :: chunk_size], chunk_size, axis=1)
    return jnp.arange(complete)[None] >= begin


def kernel_factors(q, k, chunk_size, selector, counted=None):
    """Queries [B, Tq, S, F] and keys [B, N, S, F] of the complete chunks, for the TPU kernel;
    `counted` as `readable_keys` returns them, where documents are packed."""
    complete = k.shape[1] // chunk_size * chunk_size
    rows = selector.rows_of(k[:, :complete], chunk_size, counted).swapaxes(1, 2)
    counts = None if counted is None else selector.counts(counted, chunk_size)
    counts = None if counts is None else counts[:, None]  # for all heads
    queries, keys = selector.queries(q, 2), selector.keys(rows, chunk_size, counts).swapaxes(1, 2)
    return queries, jnp.repeat(keys, queries.shape[2] // keys.shape[2], axis=2)


def check_selection(q, k, chunk_size, top_k, q_offset, selector) -> None:
    check_chunking(chunk_size, top_k)
    vectors = selector.query_vectors
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != vectors * k.shape[3]:
        times = "" if vectors == 1 else f" (in q {vectors} times it, by {selector.kind!r})"
        raise ValueError(
            f"q {q.shape} and k {k.shape} must be [B, T, H, K] with the same batch and key "
            f"size{times}"
        )
    check_selector(selector, chunk_size, q.shape[2], k.shape[2])
    check_offset(q_offset, q.shape[0])
