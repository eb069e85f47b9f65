"""Which pages of a cache new tokens read, chosen where the selector's rows lie.

As in `paged`, the buffer is large and never copied, transposed or sliced as a whole.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Int, Int32

from rwkvx_jax.ops.dispatch import Candidate, resolve
from rwkvx_jax.ops.paged import cut, dot
from rwkvx_jax.ops.selection import (
    MEAN,
    Selector,
    best_spans,
    choose_numbered,
    choose_past,
    select_from_rows,
)

# Bytes of a selector's rows that are scored at once on a CPU, which stay in that cache, too.
SCORED_BYTES = 1 << 18

# A product of rows and a vector computes that many rows alike, and may round a remainder otherwise:
# pages with equal rows would not tie.
ROWS_ALIKE = 8


def select_pages(
    q: Float[Array, "B T H Q"],
    rows: Float32[Array, "M B G NR K"],
    layer: Int[ArrayLike, ""],
    positions: Int32[Array, "B T"],
    *,
    chunk_size: int,
    count: int,
    selector: Selector = MEAN,
    span_rows: Float32[Array, "M B G NS K"] | None = None,
    implementation: str | None = None,
) -> Int32[Array, "B T S {count}"]:
    """The `count` past pages that each token and head reads in one attention block.

    Args:
      q: queries; Q is K times the selector's `query_vectors`.
      rows: what the selector keeps of the N pages of each of M blocks, R rows a page; those of
        pages that are not complete may hold anything. G, the number of key heads, divides H.
      layer: which of the M blocks.
      positions: absolute positions of the queries.
      chunk_size: tokens in a page.
      count: how many pages to choose.
      selector: how a page is scored, and which heads choose together.
      span_rows: what is kept of the spans of a selector that has some, of whose chunks N is then a
        multiple.
      implementation: "spans" (one token: reads what is kept of all spans, and of the pages of the
        best), "in_place" (CPU, one token: reads the rows where they lie, block by block, as far as
        the longest text goes), "slice" (cuts the attention block's rows out and calls
        `select_from_rows`; also the oracle), or None to choose by platform.

    Returns:
      int32 [B, T, S, count], with S = H / selector.together, by descending score, ties to the
      lower index, padded with -1. No gradient flows through it.

    Raises:
      ValueError: a named implementation that is unknown or cannot run here.
    """
    tokens = q.shape[1]
    if implementation is None and tokens > 1:  # a piece of text is no fall back
        implementation = "slice"
    one = lambda platform: f"it serves one token, not {tokens}" if tokens > 1 else None
    spans = lambda platform: (
        one(platform)
        or (None if selector.span and span_rows is not None else "the selector has no spans")
    )
    all_pages = lambda platform: one(platform) or ("it knows no spans" if selector.span else None)
    candidates = [Candidate("in_place", ("cpu",), all_pages), Candidate("slice")]
    if selector.span or implementation == "spans":
        candidates.insert(0, Candidate("spans", problem=spans))
    chosen = resolve("select_pages", implementation, candidates)
    options = {"chunk_size": chunk_size, "count": count, "selector": selector}
    if chosen == "spans" and count and rows.shape[3]:
        return _select_in_spans(q, rows, span_rows, layer, positions, **options)
    if chosen == "in_place" and count and rows.shape[3]:
        return _select_in_place(q[:, 0], rows, layer, positions, **options)
    block = jax.lax.dynamic_index_in_dim(rows, layer, 0, keepdims=False).swapaxes(1, 2)
    return select_from_rows(
        q, block, positions, chunk_size=chunk_size, count=count, selector=selector
    )


def _select_in_place(q, rows, layer, positions, *, chunk_size, count, selector):
    """`select_pages` for q [B, H, K], by a loop over blocks of rows."""
    _, batch, groups, stored, size = rows.shape
    own = positions // chunk_size  # [B, 1]
    pages = stored // selector.rows
    once = min(pages, SCORED_BYTES // (4 * selector.rows * size))
    once = min(pages, max(once // ROWS_ALIKE, 1) * ROWS_ALIKE)
    turns = -(-own.max() // once)
    flat = rows.reshape(-1, stored * size)
    q, flat = jax.lax.stop_gradient((q, flat))
    q = selector.queries(q.astype(jnp.float32), 1)
    q = q.reshape(batch * groups, -1, q.shape[-1])  # the queries that read one row of keys

    def score(i, products):
        group, turn = i // turns, i % turns
        first = jnp.minimum(turn * once, pages - once)  # the last turn may repeat some
        width = selector.rows * size
        some = cut(flat, layer * batch * groups + group, first * width, once * width)
        keys = selector.keys(some.reshape(-1, size), chunk_size)
        keys, count = jnp.pad(keys, ((0, -len(keys) % ROWS_ALIKE), (0, 0))), len(keys)
        found = jnp.stack([dot(keys, one)[:count] for one in q[group]])
        at = (group.astype(jnp.uint32), jnp.uint32(0), (first * per_page).astype(jnp.uint32))
        return jax.lax.dynamic_update_slice(products, found[None], at)

    per_page = selector.keys_per_chunk
    products = jnp.zeros((*q.shape[:2], pages * per_page), jnp.float32)
    products = jax.lax.fori_loop(0, batch * groups * turns, score, products)
    products = products.reshape(batch, -1, 1, pages * per_page)
    chosen = choose_past(products, own, count=count, selector=selector, key_size=size)
    return chosen.swapaxes(1, 2)


def _select_in_spans(q, rows, span_rows, layer, positions, *, chunk_size, count, selector):
    """`select_pages` for one token: the best spans, then the best pages of these."""
    _, batch, groups, stored, size = rows.shape
    own = positions // chunk_size  # [B, 1]
    q, rows, span_rows = jax.lax.stop_gradient((q, rows, span_rows))
    q = q.astype(jnp.float32).swapaxes(1, 2)  # [B, H, 1, K]
    choices = q.shape[1] // selector.together

    def scored(selector, keys):  # keys [B, R, n, F], R dividing the queries -> [B, S, 1, N]
        queries = selector.queries(q, 1)
        rows = queries.reshape(*keys.shape[:2], -1, queries.shape[3])
        found = jnp.einsum("brmf,brnf->brmn", rows, keys, precision=jax.lax.Precision.HIGHEST)
        return selector.combine(found.reshape(batch, queries.shape[1], 1, -1), size)

    spans = jax.lax.dynamic_index_in_dim(span_rows, layer, 0, keepdims=False)
    scores = scored(selector.coarse, selector.coarse.keys(spans, chunk_size))
    best = jnp.sort(best_spans(scores, own, None, selector), axis=-1)  # [B, S, 1, J], -1 first
    head = jnp.arange(batch * choices).reshape(batch, choices, 1, 1) // (choices // groups)
    row = jnp.broadcast_to(layer * batch * groups + head, best.shape)
    flat, each = rows.reshape(-1, stored, size), selector.span * selector.rows
    read = lambda row, span: jax.lax.dynamic_slice(flat, (row, span * each, 0), (1, each, size))
    some = jax.vmap(read)(row.reshape(-1), jnp.maximum(best, 0).reshape(-1))
    keys = selector.keys(some.reshape(batch, choices, -1, size), chunk_size)
    numbers = best[..., None] * selector.span + jnp.arange(selector.span)[None, None, None, None]
    numbers = jnp.where(best[..., None] >= 0, numbers, -1).reshape(*best.shape[:3], -1)
    scores = scored(selector, keys)
    chosen = choose_numbered(scores, numbers, own, count=count, selector=selector)
    return chosen.swapaxes(1, 2)
