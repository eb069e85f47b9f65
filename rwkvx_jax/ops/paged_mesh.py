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
    q: Float[Array, "B T H K"],
    sums: Float32[Array, "M B G NR K"],
    layer: Int[Array, ""],
    chosen: Int32[Array, "B T S J"],
    axis: str,
    *,
    chunk_size: int,
    selector: Selector,
) -> Int32[Array, "B T S J"]:
    """The best J of all devices' candidates, as far as they lie here.

    Args:
      q: queries.
      sums: what the selector keeps of this device's pages (see `select_pages`).
      layer: which of the M blocks.
      chosen: this device's best pages, numbered from its first, padded with -1.
      axis: mesh axis along which the pages lie.
      chunk_size: tokens in a page.
      selector: how a page is scored.

    Returns:
      Pages of this device among the best J of all, -1 for those of others. Ties go to the lower
      page, as on one device.
    """
    count, slots = sums.shape[3] // selector.rows, chosen.shape[-1]
    first = jax.lax.axis_index(axis) * count
    scores = _scores(q, sums, layer, chosen, chunk_size, selector)
    gather = lambda x: jax.lax.all_gather(x, axis, axis=3, tiled=True)  # in the order of pages
    scores, pages = gather(scores), gather(jnp.where(chosen >= 0, chosen + first, -1))
    _, best = jax.lax.top_k(scores, slots)  # of ties the first
    pages = jnp.take_along_axis(pages, best, axis=3) - first
    return jnp.where((pages >= 0) & (pages < count), pages, -1)


def _scores(q, sums, layer, chosen, chunk_size: int, selector: Selector) -> jax.Array:
    """Scores of the chosen pages, float32 [B, T, S, J], -inf for none.

    Computed anew, by one formula for each page: those with equal rows tie, whoever holds them.
    """
    batch, time, heads, size = q.shape
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
