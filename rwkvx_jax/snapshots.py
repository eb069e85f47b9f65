"""Going back in a text that a cache has read, and beginning another one in its place."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from rwkvx_jax.cache import AttentionState, BlockState, Cache


class Snapshot(NamedTuple):
    """A cache without its keys and values."""

    length: jax.Array
    position: jax.Array
    blocks: BlockState
    attention: AttentionState | None
    key_sums: jax.Array
    span_rows: jax.Array | None


def snapshot(cache: Cache) -> Snapshot:
    """What `rewind` needs to come back here after further reading."""
    return Snapshot(
        cache.length,
        cache.position,
        cache.blocks,
        cache.attention,
        cache.pages.key_sums,
        cache.pages.span_rows,
    )


def rewind(cache: Cache, snapshot: Snapshot) -> Cache:
    """The state at an earlier point of the same texts, to be continued in another way.

    Keys and values stay where they are: rows beyond the length are never seen, and overwritten. So
    without a policy only, which moves rows.
    """
    return replace(
        cache,
        length=snapshot.length,
        position=snapshot.position,
        blocks=snapshot.blocks,
        attention=snapshot.attention,
        pages=cache.pages._replace(key_sums=snapshot.key_sums, span_rows=snapshot.span_rows),
    )


def wiped(cache: Cache, texts: Bool[Array, " B"]) -> Cache:
    """The cache, with zeros for keys and values beyond the length of some texts."""
    count, chunk = cache.pages.keys.shape[3:5]
    row = jnp.arange(count * chunk).reshape(1, 1, 1, count, chunk, 1)
    own = lambda x: x.reshape(1, -1, 1, 1, 1, 1)
    gone = own(texts) & (row >= own(cache.length))
    zero = lambda x: jnp.where(gone, jnp.zeros((), x.dtype), x)
    pages = cache.pages._replace(keys=zero(cache.pages.keys), values=zero(cache.pages.values))
    return replace(cache, pages=pages)


def choose(chosen: jax.Array, ours: Snapshot, others: Snapshot) -> Snapshot:
    """`ours` of the texts where chosen [B], `others` elsewhere."""

    def pick(x: jax.Array, y: jax.Array) -> jax.Array:
        axis = min(1, x.ndim - 1)  # of the texts: all but length and position are stacked by layer
        shape = [1] * x.ndim
        shape[axis] = -1
        return jnp.where(chosen.reshape(shape), x, y)

    return jax.tree.map(pick, ours, others)
