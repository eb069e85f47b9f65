"""What devices that hold stretches of one text's pages tell each other.

Each scores its own pages and names its best; the best of these are what one device with all pages
would choose. Each attends to the chosen pages that it holds, and the outputs are joined by their
log-sum-exps. What is sent for a token depends on the number of devices, never on that of pages. All
of it runs inside a `shard_map` over the mesh axis `axis`, along which pages lie in order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from rwkvx_jax.ops.paged import Softmax
from rwkvx_jax.ops.selection import Selector


def choose_together(
    q: Float[Array, "B T H Q"],
    sums: Float32[Array, "M B G NR K"],
    layer: Int[Array, ""],
    chosen: Int32[Array, "B T S J"],
    start: Int[Array, " B"],
    axis: str,
    selector: Selector,
    chunk_size: int,
) -> Int32[Array, "B T S J"]:
    """The best J of all devices' candidates, as far as they lie here.

    Args:
      q: what the selector asks with.
      sums: what the selector keeps of this device's pages (see `paged_selection.select_pages`).
      layer: which of the M blocks.
      chosen: this device's best pages, none of them forced, numbered from its first; -1 for none.
      start: row of the first query, counted from this device's first.
      axis: mesh axis along which the pages lie.
      selector: how a page is scored, and which are chosen before all others.
      chunk_size: tokens in a page.

    Returns:
      Pages of this device among the best J of all, -1 for those of others. Ties go to the lower
      page, as on one device.
    """
    count, slots = sums.shape[3] // selector.rows, chosen.shape[-1]
    first = jax.lax.axis_index(axis) * count
    scores = _scores(q, sums, layer, chosen, chunk_size, selector)
    gather = lambda x: jax.lax.all_gather(x, axis, axis=3, tiled=True)  # in the order of pages
    scores, pages = gather(scores), gather(jnp.where(chosen >= 0, chosen + first, -1))
    forced = _forced(selector, start + first * chunk_size, chosen, chunk_size)
    twice = jnp.any(pages[..., None] == forced[..., None, :], axis=-1)
    scores = jnp.where(twice, -jnp.inf, scores)
    scores = jnp.concatenate([jnp.where(forced >= 0, jnp.inf, -jnp.inf), scores], axis=3)
    pages = jnp.concatenate([forced, jnp.where(twice, -1, pages)], axis=3)
    _, best = jax.lax.top_k(scores, slots)  # of ties the first
    pages = jnp.take_along_axis(pages, best, axis=3) - first
    return jnp.where((pages >= 0) & (pages < count), pages, -1)


def _forced(selector: Selector, start, chosen, chunk_size: int) -> jax.Array:
    """Pages of the text that are chosen before all others, ascending, [B, T, S, 0 to 2]; -1 where
    there is no such past page."""
    batch, time, choices, _ = chosen.shape
    own = (start[:, None] + jnp.arange(time, dtype=jnp.int32)[None]) // chunk_size
    none = jnp.full_like(own, -1)
    begin, before = jnp.where(own > 0, 0, none), jnp.maximum(own - 1, none)
    places = {"none": [], "previous": [before], "first": [begin]}
    places["both"] = [begin, jnp.where(before > 0, before, none)]
    shape = (batch, time, choices, len(places[selector.forced]))
    if not shape[3]:
        return jnp.zeros(shape, jnp.int32)
    return jnp.broadcast_to(jnp.stack(places[selector.forced], axis=-1)[:, :, None], shape)


def _scores(q, sums, layer, chosen, chunk_size: int, selector: Selector) -> jax.Array:
    """Scores of the chosen pages, float32 [B, T, S, J], -inf for none.

    Computed anew, by one formula for each page: those with equal rows tie, whoever holds them.
    """
    (batch, time, *_), size = q.shape, sums.shape[4]
    choices, slots = chosen.shape[2:]
    along = lambda x, dimension: x.reshape([-1 if i == dimension else 1 for i in range(5)])
    group = along(jnp.arange(choices) // (choices // sums.shape[2]), 2)
    row = jnp.maximum(chosen, 0)[..., None] * selector.rows + along(jnp.arange(selector.rows), 4)
    rows = sums[layer, along(jnp.arange(batch), 0), group, row]  # [B, T, S, J, R, K]
    keys = selector.keys(rows.reshape(batch, time, choices, -1, size), chunk_size)
    queries = selector.queries(q.astype(jnp.float32), 2)  # [B, T, H or S, F]
    queries = queries.reshape(batch, time, choices, -1, 1, queries.shape[-1])
    products = jnp.sum(queries * keys[:, :, :, None], axis=-1)  # [B, T, S, queries, keys]
    products = products.reshape(batch, time, -1, products.shape[-1]).swapaxes(1, 2)
    scores = selector.combine(products, size).swapaxes(1, 2)
    return jnp.where(chosen >= 0, scores, -jnp.inf)


def join(own: Softmax, axis: str) -> Float32[Array, "*any V"]:
    """The output of attention to what all devices along `axis` hold."""
    largest = jax.lax.pmax(own.largest, axis)
    share = jnp.exp(own.largest - largest)
    values, total = jax.lax.psum((own.values * share[..., None], own.total * share), axis)
    return values / total[..., None]
