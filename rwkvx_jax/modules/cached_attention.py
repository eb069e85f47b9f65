"""Attention of a piece of text to itself and to the pages of a cache, on any mesh.

Each device has its texts, its heads and, where there is a `context` axis, a stretch of each text's
pages: it writes the new rows that fall into its stretch, and counts rows from the first there. What
it tells the others is in `ops.paged_mesh`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rwkvx_jax.cache import Gate, Pages, Shared, check_spans, page_axes
from rwkvx_jax.config import ModelConfig
from rwkvx_jax.modules.pages import write_rows
from rwkvx_jax.ops.compressed import ChunkMeans, compressed_attention
from rwkvx_jax.ops.nsa import gated
from rwkvx_jax.ops.paged import (
    Softmax,
    attend_pages,
    attend_piece,
    page_softmax,
    piece_softmax,
)
from rwkvx_jax.ops.paged_mesh import choose_together, join
from rwkvx_jax.ops.paged_selection import select_pages
from rwkvx_jax.ops.selection import MEAN, repeated_choices, select_from_rows, selector_of
from rwkvx_jax.sharding import cut_along, per_device

_TOKENS = ("batch", None, "heads", None)


def attend_cached(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    asked: Float[Array, "B T H2 Q"],
    scored: Float[Array, "B T G2 I"],
    pages: Pages,
    layer: Int[Array, ""],
    start: Int[Array, " B"],
    lengths: Int[Array, " B"],
    *,
    config: ModelConfig,
    gate: Gate,
    gates: Float[Array, "B T H 3"] | None = None,
    shared: Shared | None = None,
) -> tuple[Float[Array, "B T H K"], Pages, Int[Array, "B T S J"] | None]:
    """Appends a piece to the pages, and attends to them.

    Args:
      q: queries.
      k: keys.
      v: values.
      asked: what the selector asks with: q, or the queries of an indexer.
      scored: what it scores: k, or the keys of an indexer.
      pages: of all attention blocks.
      layer: index of this block in the pages.
      start: rows in the pages before this piece.
      lengths: valid tokens of the piece.
      config: the model.
      gate: how past pages are chosen.
      gates: of the branches of attention "nsa"; None without.
      shared: what the block before hands on, where blocks share choices.

    Returns:
      The output, the pages with the piece appended, and the choice to be handed on.
    """
    context = cut_along("pages", pages.keys.shape[3])
    if context is not None:
        check_spans(config)
    tensor = cut_along("heads", *(x.shape[2] for x in (q, k, asked, scored)))
    reader = _Reader(config, gate, context, tensor)
    stored = page_axes(gate)
    handed = (None,) * 3 if shared is None else shared[:3]
    inputs = (*[_TOKENS] * 6, *stored, (), ("batch",), ("batch",), (), (), _TOKENS)
    run = per_device(reader.__call__, inputs, (_TOKENS, *stored, _TOKENS))
    out, *written, choice = run(
        q, k, v, asked, scored, gates, *pages, layer, start, lengths, *handed
    )
    return out, Pages(*written), choice


class _Reader(NamedTuple):
    """`attend_cached` on one device.

    Attributes:
      config: the model.
      gate: how past pages are chosen.
      context: mesh axis along which pages lie; None: all are here.
      tensor: mesh axis along which heads lie; None: all are here.
    """

    config: ModelConfig
    gate: Gate
    context: str | None
    tensor: str | None

    def __call__(self, q, k, v, asked, scored, gates, *given):
        *stored, layer, start, lengths, chooses, rows, choice = given
        shared = None if chooses is None else Shared(chooses, rows, choice, None)
        pages = Pages(*stored)
        count, chunk = pages.keys.shape[3:5]
        if self.context is not None:
            start = start - jax.lax.axis_index(self.context) * (count * chunk)
        if self.gate == "shared":
            scored = self._all_heads(k)
        pages = write_rows(pages, layer, k, v, start, lengths, self._selector, scored, shared)
        read = self._read_one if q.shape[1] == 1 else self._read_piece
        if gates is not None:
            compressed, chosen = self._read_means(q, pages, layer, start)
            selected = read(q, pages, layer, start, chosen)
            window = self._read_window(q, pages, layer, start)
            return gated(gates, compressed, selected, window).astype(q.dtype), *pages, choice
        if choice is None:
            chosen = self._choose(q, asked, pages, layer, start)
        else:
            choose = lambda: self._choose(q, asked, pages, rows, start)
            choice = chosen = jax.lax.cond(chooses, choose, lambda: choice)
        if chosen is not None and self.gate == "per_head":
            chosen = repeated_choices(chosen, k.shape[2])
        return read(q, pages, layer, start, chosen).astype(q.dtype), *pages, choice

    @property
    def _selector(self):
        """The model's, or that of the original package, which is no other."""
        return selector_of(self.config) if self.gate == "per_head" else MEAN

    def _all_heads(self, x: Float[Array, "B T H K"]) -> Float[Array, "B T heads K"]:
        if self.tensor is None:
            return x
        return jax.lax.all_gather(x, self.tensor, axis=2, tiled=True)

    def _choose(self, q, asked, pages: Pages, layer, start) -> jax.Array | None:
        """Past pages of each token and choice, [B, T, S, J], by the rows of block `layer`; None:
        all of them (full attention)."""
        if self.config.attention == "full":
            return None
        heads, chunk = q.shape[2], pages.keys.shape[4]
        rows = pages.keys.shape[3] * chunk
        positions = start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        selector = self._selector
        if self.context is not None:
            positions = jnp.clip(positions, 0, rows)  # beyond a stretch all its pages are past
            selector = selector._replace(forced="none")  # of a text, not of a stretch
        options = {"chunk_size": self.config.chunk_size, "selector": selector}
        if self.gate == "per_head":
            count, sums, spans = self.config.top_k - 1, pages.key_sums, pages.span_rows
            chosen = select_pages(
                asked, sums, layer, positions, count=count, span_rows=spans, **options
            )
        else:  # one score over all channels, and top_k past chunks beside the own one
            flat = lambda x: x.reshape(*x.shape[:-2], 1, -1)
            asked = flat(self._all_heads(q))
            own = jax.lax.dynamic_index_in_dim(pages.key_sums, layer, 0, False)
            own = flat(own.swapaxes(1, 2))  # [B, N, 1, D]
            chosen = select_from_rows(asked, own, positions, count=self.config.top_k, **options)
            sums, layer = own.swapaxes(1, 2)[None], jnp.int32(0)
        if self.context is not None and chosen.shape[-1]:
            chosen = choose_together(
                asked, sums, layer, chosen, start, self.context, self._selector, chunk
            )
        if self.gate == "per_head":
            return chosen
        return jnp.broadcast_to(chosen, (*chosen.shape[:2], heads, chosen.shape[3]))

    def _read_means(self, q, pages: Pages, layer, start) -> tuple[jax.Array, jax.Array]:
        """The compressed branch of NSA [B, T, H, K], and the past pages it chooses [B, T, G, J]."""
        chunk = pages.keys.shape[4]
        take = lambda sums: jax.lax.dynamic_index_in_dim(sums, layer, 0, False).swapaxes(1, 2)
        return compressed_attention(
            q,
            ChunkMeans(take(pages.key_sums) / chunk, take(pages.value_sums) / chunk),
            start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None],
            chunk_size=chunk,
            count=self.config.top_k - 1,
            scale=q.shape[3] ** -0.5,
        )

    def _read_window(self, q, pages: Pages, layer, start) -> jax.Array:
        """The window branch of NSA, [B, T, H, K]."""
        window = self.config.window_size
        if q.shape[1] > 1:
            return self._read_piece(q, pages, layer, start, None, window)
        batch, groups, count, chunk = pages.keys.shape[1:5]
        most = min(count, -(-(window - 1) // chunk) + 1)  # pages that a window reaches into
        page = start[:, None] // chunk - jnp.arange(most)[None]
        within = lambda row: jnp.clip(row[:, None] - page * chunk, 0, chunk)
        visible = jnp.where(page >= 0, within(start + 1), 0)
        spread = lambda x: jnp.broadcast_to(x[:, None], (batch, groups, most))
        page, hidden = jnp.clip(page, 0, count - 1), within(start + 1 - window)
        return self._read_pages(q, pages, layer, *map(spread, (page, visible, hidden)))

    def _read_one(self, q, pages: Pages, layer, start, chosen) -> jax.Array:
        """One token: the chosen pages and the filled part of its own, [B, 1, H, K]."""
        batch, groups, count, chunk = pages.keys.shape[1:5]
        # Queries of one key head are read together where they see the same pages.
        readers = groups if chosen is None else chosen.shape[2]
        if chosen is None:
            chosen = jnp.broadcast_to(jnp.arange(count), (batch, readers, count))
            visible = jnp.clip(start[:, None, None] + 1 - chosen * chunk, 0, chunk)
        else:
            own = jnp.broadcast_to((start // chunk)[:, None, None], (batch, readers, 1))
            filled = jnp.broadcast_to((start % chunk + 1)[:, None, None], own.shape)
            filled = jnp.where((own >= 0) & (own < count), filled, 0)
            visible = jnp.where(chosen[:, 0] >= 0, chunk, 0)
            visible = jnp.concatenate([visible, filled], axis=-1)
            chosen = jnp.concatenate([chosen[:, 0], own], axis=-1)
            chosen = jnp.clip(chosen, 0, count - 1)
        return self._read_pages(q, pages, layer, chosen, visible)

    def _read_pages(self, q, pages: Pages, layer, chosen, visible, hidden=None) -> jax.Array:
        """One token: rows hidden .. visible - 1 of pages, each [B, readers, J], of all readers'
        queries; [B, 1, H, K]."""
        _, batch, groups, count, chunk, size = pages.keys.shape
        readers = chosen.shape[1]
        row = jnp.arange(batch * readers).reshape(batch, readers, 1) // (readers // groups)
        flat = (layer * batch * groups + row) * count + chosen
        arguments = (
            q.reshape(batch * readers, -1, size),
            pages.keys.reshape(-1, chunk, size),
            pages.values.reshape(-1, chunk, size),
            flat.reshape(batch * readers, -1),
            visible.reshape(batch * readers, -1),
            None if hidden is None else hidden.reshape(batch * readers, -1),
        )
        if self.context is None:
            out = attend_pages(*arguments, scale=size**-0.5)
        else:
            out = join(page_softmax(*arguments, scale=size**-0.5), self.context)
        return out.reshape(batch, 1, -1, size)

    def _read_piece(self, q, pages: Pages, layer, start, chosen, window=None) -> jax.Array:
        """Many tokens at once, [B, T, H, K]."""
        _, batch, groups, count, chunk, size = pages.keys.shape
        arguments = (
            q,
            pages.keys.reshape(-1, count * chunk, size),
            pages.values.reshape(-1, count * chunk, size),
            layer * batch * groups,
            chosen,
            start,
        )
        options = {"chunk_size": chunk, "scale": size**-0.5, "key_heads": groups}
        options["window"] = window
        if self.context is None:
            return attend_piece(*arguments, **options)
        found: Softmax = piece_softmax(*arguments, **options)
        return join(found, self.context)
