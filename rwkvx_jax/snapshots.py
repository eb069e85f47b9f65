"""Rows of a cache by themselves: going back in a text, beginning another one in its place, and
reading one row while the others wait."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rwkvx_jax.cache import AttentionState, BlockState, Cache, Pages


class Snapshot(NamedTuple):
    """A cache without its keys and values, but where a policy moves these."""

    length: jax.Array
    position: jax.Array
    blocks: BlockState
    attention: AttentionState | None
    key_sums: jax.Array
    span_rows: jax.Array | None
    value_sums: jax.Array | None
    rows: tuple[jax.Array, jax.Array] | None  # keys and values, under a policy


def snapshot(cache: Cache) -> Snapshot:
    """What `rewind` needs to come back here after further reading."""
    return Snapshot(
        cache.length,
        cache.position,
        cache.blocks,
        cache.attention,
        cache.pages.key_sums,
        cache.pages.span_rows,
        cache.pages.value_sums,
        None if cache.policy is None else (cache.pages.keys, cache.pages.values),
    )


def rewind(cache: Cache, snapshot: Snapshot) -> Cache:
    """The state at an earlier point of the same texts, to be continued in another way.

    Without a policy keys and values stay where they are: rows beyond the length are never seen, and
    overwritten.
    """
    keys, values = snapshot.rows or (cache.pages.keys, cache.pages.values)
    return replace(
        cache,
        length=snapshot.length,
        position=snapshot.position,
        blocks=snapshot.blocks,
        attention=snapshot.attention,
        pages=Pages(keys, values, snapshot.key_sums, snapshot.span_rows, snapshot.value_sums),
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


def text_axis(x: jax.Array) -> int:
    """The axis of the texts: all but length and position are stacked by layer."""
    return min(1, x.ndim - 1)


def choose(chosen: jax.Array, ours: Snapshot, others: Snapshot) -> Snapshot:
    """`ours`, of one text or of all, for the texts where chosen [B], `others` elsewhere."""

    def pick(x: jax.Array, y: jax.Array) -> jax.Array:
        shape = [1] * x.ndim
        shape[text_axis(x)] = -1
        return jnp.where(chosen.reshape(shape), x, y)

    return jax.tree.map(pick, ours, others)


def of_text(tree: Any, row: Int[Array, ""]) -> Any:
    """One text of a tree such as a snapshot, as one of a batch of 1."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, text_axis(x)), tree)


def _with_text(tree: Any, own: Any, row: Int[Array, ""]) -> Any:
    """The tree with one text in place of what is in its row."""
    put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, text_axis(x))
    return jax.tree.map(put, tree, own)


def row_of(cache: Cache, row: Int[Array, ""]) -> Cache:
    """One row as a cache of its own, whose pages are those of all rows: nothing large is copied.

    Pages [M, B, ...] are seen as [M * B, 1, ...], where attention block i of row b is i * B + b.
    """
    blocks, batch = cache.pages.keys.shape[:2]
    seen = lambda x: x.reshape(x.shape[0] * batch, 1, *x.shape[2:])  # fewer blocks choose
    small = of_text(_small(cache), row)
    pages = jax.tree.map(seen, cache.pages)
    layers = jnp.arange(max(1, blocks), dtype=jnp.int32) * batch + row
    return _replaced(cache, small, pages, layers)


def with_row(cache: Cache, own: Cache, row: Int[Array, ""]) -> Cache:
    """The cache, of whose rows `row_of` gave one, after that one was read on."""
    small = _with_text(_small(cache), _small(own), row)
    pages = jax.tree.map(lambda new, x: new.reshape(x.shape), own.pages, cache.pages)
    return _replaced(cache, small, pages, None)


def copied_row(cache: Cache, source: Int[Array, ""], row: Int[Array, ""]) -> Cache:
    """The cache with the keys and values of one row in another."""
    copy = lambda x: _with_text(x, of_text(x, source), row)
    pages = cache.pages._replace(keys=copy(cache.pages.keys), values=copy(cache.pages.values))
    return replace(cache, pages=pages)


def _small(cache: Cache) -> tuple:
    """All but the pages."""
    return cache.length, cache.position, cache.blocks, cache.attention


def _replaced(cache: Cache, small: tuple, pages: Pages, layers: jax.Array | None) -> Cache:
    length, position, blocks, attention = small
    return replace(
        cache,
        length=length,
        position=position,
        blocks=blocks,
        attention=attention,
        pages=pages,
        layers=layers,
    )
