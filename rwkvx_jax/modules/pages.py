"""What changes the pages of a cache: new rows, and their compression under a policy.

Source: the K/V compression of RWKV-X (arXiv 2504.21463); see `cache.CachePolicy`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from rwkvx_jax.cache import CachePolicy, Pages, Shared
from rwkvx_jax.ops.precision import precision_of
from rwkvx_jax.ops.selection import MEAN, Selector


def write_rows(
    pages: Pages,
    layer: Int[Array, ""],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    start: Int[Array, " B"],  # row of the first token
    lengths: Int[Array, " B"],  # valid tokens
    selector: Selector = MEAN,
    scored: Float[Array, "B T G2 K2"] | None = None,  # what the selector scores; None: k
    shared: Shared | None = None,
) -> Pages:
    """Appends the valid rows of k and v to the pages of one attention block; those outside the
    pages (which may be a stretch of a text's) are dropped."""
    chunk = pages.keys.shape[4]
    row = start[:, None] + jnp.arange(k.shape[1])[None]  # [B, T]
    valid = (jnp.arange(k.shape[1])[None] < lengths[:, None]) & (row >= 0)
    page = jnp.where(valid, row // chunk, pages.keys.shape[3])[:, :, None]  # beyond: dropped
    slot = (row % chunk)[:, :, None]
    rows_of = lambda x, layer=layer: (
        layer,
        jnp.arange(x.shape[0])[:, None, None],
        jnp.arange(x.shape[2])[None, None],
    )
    put = partial(_put, index=(*rows_of(k), page, slot))
    scored = (k if scored is None else scored).astype(jnp.float32)
    if shared is None:
        where = rows_of(scored)
    else:
        where = rows_of(scored, shared.rows)
        page = jnp.where(shared.chooses, page, pages.keys.shape[3])
    part = slot // (chunk // selector.keys_per_chunk)
    sums, spans = pages.key_sums, pages.span_rows
    for i, name in enumerate(selector.kept):
        at = sums.at[(*where, page * selector.rows + part * len(selector.kept) + i)]
        if name == "sum":
            sums = at.add(scored, mode="drop")
        else:
            sums = at.max(-scored if name == "least" else scored, mode="drop")
    if spans is not None:
        first = 2 * (page // selector.span)
        spans = spans.at[(*where, first)].max(-scored, mode="drop")
        spans = spans.at[(*where, first + 1)].max(scored, mode="drop")
    value_sums = pages.value_sums
    if value_sums is not None:
        added = v.astype(jnp.float32)
        value_sums = value_sums.at[(*rows_of(v), page)].add(added, mode="drop")
    return Pages(put(pages.keys, k), put(pages.values, v), sums, spans, value_sums)


def _put(target: jax.Array, rows: jax.Array, index: tuple) -> jax.Array:
    return target.at[index].set(rows.astype(target.dtype), mode="drop")


def rows_to_keep(
    pages: Pages,
    layer: Int[Array, ""],
    q: Float[Array, "B H K"],  # the query of the token about to be read
    length: Int[Array, " B"],
    policy: CachePolicy,
) -> Int32[Array, "B G {policy.keep}"]:
    """The rows of one block that stay when a policy compresses them."""
    keys = jax.lax.dynamic_index_in_dim(pages.keys, layer, 0, keepdims=False)
    batch, heads, *_, size = keys.shape
    keys = keys.reshape(batch, heads, -1, size)
    row = jnp.arange(keys.shape[2])
    past = row[None] < (length - policy.window)[:, None]  # [B, S]
    q = q.reshape(batch, heads, -1, size).sum(2)  # so that the scores are summed
    options = {"precision": precision_of(q.dtype), "preferred_element_type": jnp.float32}
    scores = jnp.einsum("bhk,bhsk->bhs", q, keys, **options)
    scores = jnp.where(past[:, None], scores * size**-0.5, -jnp.inf)
    _, chosen = jax.lax.top_k(scores, policy.keep - policy.window)
    recent = (length - policy.window)[:, None] + jnp.arange(policy.window)[None]  # [B, window]
    recent = jnp.broadcast_to(recent[:, None], (batch, heads, policy.window))
    return jnp.concatenate([chosen, recent], axis=-1)


def compress(
    pages: Pages,
    layer: Int[Array, ""],
    kept: Int[Array, "B G keep"],  # rows that stay
    due: Bool[Array, " B"],
    policy: CachePolicy,
    selector: Selector,
    scored: Callable[[jax.Array], jax.Array],  # keys [B, T, G, K] -> what the selector scores
    shared: Shared | None = None,
) -> Pages:
    """Pages of one block with only `policy.keep` rows, in the batch rows that are due."""
    kept, rows_layer = kept[..., None], layer if shared is None else shared.rows
    take = lambda x, layer=layer: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
    old_keys, old_values, old_sums = (*map(take, pages[:2]), take(pages.key_sums, rows_layer))
    batch, heads, count, chunk, size = old_keys.shape
    keys, values = (x.reshape(batch, heads, -1, size) for x in (old_keys, old_values))

    def repack(x: jax.Array, old: jax.Array) -> jax.Array:
        rows = jnp.take_along_axis(x, kept, axis=2)
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, x.shape[2] - policy.keep), (0, 0)))
        return jnp.where(due[:, None, None, None, None], rows.reshape(old.shape), old)

    new_keys, new_values = repack(keys, old_keys), repack(values, old_values)
    kept_keys = new_keys.reshape(batch, heads, -1, size)[:, :, : policy.keep].swapaxes(1, 2)
    # Of the first pages; others are empty.
    sums = selector.rows_of(scored(kept_keys), chunk).swapaxes(1, 2)
    shape = list(old_sums.shape)
    shape[2] -= sums.shape[2]
    empty = selector.start(tuple(shape))
    sums = jnp.concatenate([sums, empty], axis=2)
    renewed = due if shared is None else due & shared.chooses
    new_sums = jnp.where(renewed[:, None, None, None], sums, old_sums)
    put = lambda x, new, layer=layer: jax.lax.dynamic_update_index_in_dim(x, new, layer, 0)
    new = put(pages.keys, new_keys), put(pages.values, new_values)
    spans = pages.span_rows
    if spans is not None:
        spans = put(spans, selector.span_rows(new_sums), rows_layer)
    return Pages(*new, put(pages.key_sums, new_sums, rows_layer), spans)
