"""Attention of the second block kind: sparse (own chunk and the best past chunks) or full.

That of the hybrid has no position encoding, no bias, no token shift (spec 1.3); as an option a
short convolution over time on the keys, which makes a chunk's mean key say more of what follows
what (arXiv 2511.11571). A Transformer's has rotary positions, biases and fewer heads of keys and
values, as its config says. Keys are convolved, then rotated, and so they lie in a cache.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from rwkvx_jax.cache import CachePolicy, Gate, Pages, Shared
from rwkvx_jax.config import ModelConfig, RunConfig
from rwkvx_jax.modules import context
from rwkvx_jax.modules.cached_attention import attend_cached
from rwkvx_jax.modules.convolution import short_convolution
from rwkvx_jax.modules.indexer import INDEXERS, Indexer, SeerGate
from rwkvx_jax.modules.pages import compress, rows_to_keep
from rwkvx_jax.modules.parameters import input_matrix, output_matrix, parameter, project
from rwkvx_jax.modules.remat import keep
from rwkvx_jax.modules.rotary import rotate
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.chunk_mass import selection_loss
from rwkvx_jax.ops.documents import document_starts
from rwkvx_jax.ops.full_attention import full_attention
from rwkvx_jax.ops.selection import repeated_choices, select_chunks, selector_of
from rwkvx_jax.sharding import (
    check_choices,
    check_shared_choices,
    constrain,
    per_device,
    sequence_parts,
    ways,
)


class Attention(nnx.Module):
    """Matrices, stored [in, out]: receptance (the query) and output [D, D], key and value [D, X],
    X = config.kv_width; with config.qkv_bias also receptance_bias [D], key_bias and value_bias [X].
    key_conv [config.key_conv, X], if that is not 0: what is added to each key, tap j of the key j
    tokens before. indexer: with a learned selector."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        width, kv_width = config.width, config.kv_width
        aligned = config.attention_init == "aligned"
        matrix = lambda columns, bound: parameter(
            input_matrix(config, rngs.params(), (width, columns), gain=1.0, bound=bound),
            "embed",
            "heads",
        )
        self.receptance = matrix(width, bound=0.5)
        self.key = matrix(kv_width, bound=0.05)
        self.value = matrix(kv_width, bound=0.5)
        self.output = parameter(output_matrix(config, rngs, (width, width)), "heads", "embed")
        if aligned:
            self.key = parameter(jnp.copy(self.receptance[...]), "embed", "heads")
        if config.qkv_bias:
            bias = lambda size: parameter(jnp.zeros(size), "vector")
            self.receptance_bias = bias(width)
            self.key_bias, self.value_bias = bias(kv_width), bias(kv_width)
        if config.key_conv:
            # Past the last tap (key_conv=1) nothing is set.
            taps = jnp.zeros((config.key_conv, kv_width)).at[1].set(float(aligned), mode="drop")
            self.key_conv = parameter(taps, "taps", "vector")
        if config.learned_selector:
            self.indexer: Indexer | SeerGate = INDEXERS[config.selector](config, rngs)

    def __call__(
        self,
        h: Float[Array, "B T D"],
        run: RunConfig,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention of a whole sequence to itself, or of each document packed in it."""
        q, k, v, _ = self.project(h, segment_ids=segment_ids)
        gates = self.gates(h)
        index: tuple[jax.Array, ...] = () if gates is None else (gates,)
        if self.config.attention == "full":
            op = full_attention
        else:
            op = partial(self._attend, implementation=run.sparse_attention)
            if self.config.learned_selector:
                asked, scored = self.scored(q, k)
                index = (asked,) if scored is k else (asked, scored)
        if (parts := sequence_parts(h.shape[1])) > 1:
            check_choices(self.config, ways("heads"), parts)
            out = context.attention(op, q, k, v, segment_ids, *index)
        else:
            tokens = ("batch", None, "heads", None)
            attend = lambda ids, *arrays: op(*arrays, segment_ids=ids)
            axes = ("batch", None), *[tokens] * (3 + len(index))
            out = per_device(attend, axes, tokens)(segment_ids, q, k, v, *index)
        return self.combine(out)

    def _attend(self, q, k, v, *index, implementation, q_offset=0, segment_ids=None) -> jax.Array:
        """Sparse attention, chunks chosen by q and k, by an index query a choice and k, or by an
        index query and key a choice."""
        chunk_size, top_k = self.config.chunk_size, self.config.top_k
        selector = selector_of(self.config)
        attend = partial(
            sparse_attention,
            chunk_size=chunk_size,
            top_k=top_k,
            q_offset=q_offset,
            segment_ids=segment_ids,
            implementation=implementation,
        )
        if not index:
            return attend(q, k, v, selector=selector)
        if k.shape[1] <= chunk_size * top_k:  # whatever is chosen, everything is read
            return attend(q, k, v)
        asked, scored = (*index, k)[:2]
        selection = select_chunks(
            asked,
            scored,
            chunk_size=chunk_size,
            top_k=top_k,
            q_offset=q_offset,
            segment_ids=segment_ids,
            selector=selector,
        )
        return attend(q, k, v, selection=repeated_choices(selection, k.shape[2]))

    def sharing(
        self,
        h: Float[Array, "B T D"],
        run: RunConfig,
        segment_ids: Int[Array, "B T"] | None,
        chooses: Bool[Array, ""],
        choice: Int32[Array, "B T S J"],
    ) -> tuple[Float[Array, "B T D"], Int32[Array, "B T S J"]]:
        """Sparse attention of a whole sequence by the choice of an earlier block, or where it
        `chooses` by its own; also the choice."""
        config, (q, k, v, _) = self.config, self.project(h, segment_ids=segment_ids)
        check_shared_choices(config, sequence_parts(h.shape[1]))
        chunking = {"chunk_size": config.chunk_size, "top_k": config.top_k}
        tokens, ids = ("batch", None, "heads", None), ("batch", None)

        def choose():
            op = partial(select_chunks, **chunking, selector=selector_of(config))
            select = lambda ids, *arrays: op(*arrays, segment_ids=ids)
            arrays = jax.lax.stop_gradient(self.scored(q, k))
            return per_device(select, (ids, tokens, tokens), tokens)(segment_ids, *arrays)

        def attend(ids, choice, q, k, v):
            selection = repeated_choices(choice, k.shape[2])
            options = {"segment_ids": ids, "implementation": run.sparse_attention}
            return sparse_attention(q, k, v, **chunking, selection=selection, **options)

        choice = jax.lax.cond(chooses, choose, lambda: choice)
        out = per_device(attend, (ids, *[tokens] * 4), tokens)(segment_ids, choice, q, k, v)
        return self.combine(out), choice

    def gates(self, h: Float[Array, "B T D"]) -> Float[Array, "B T H 3"] | None:
        """Gates of the branches, where the attention has several (`modules/nsa.py`)."""
        return None

    def selection_loss(
        self, h: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float32[Array, "B S"]:
        """`ops.chunk_mass.selection_loss` of whole sequences; only the indexer gets a gradient."""
        q, k = jax.lax.stop_gradient(self.project(h, segment_ids=segment_ids)[:2])
        op = partial(
            selection_loss, chunk_size=self.config.chunk_size, selector=selector_of(self.config)
        )
        tokens = ("batch", None, "heads", None)
        axes = *[tokens] * 4, ("batch", None)
        return per_device(op, axes, ("batch", "heads"))(q, k, *self.scored(q, k), segment_ids)

    def scored(
        self, q: Float[Array, "B Tq H K"], k: Float[Array, "B Tk G K"]
    ) -> tuple[Float[Array, "B Tq H2 Q"], Float[Array, "B Tk G2 I"]]:
        """What the selector asks with and what it scores: queries and keys, or the indexer's."""
        if not self.config.learned_selector:
            return q, k
        return self.indexer.queries(q), self.indexer.keys(k)

    def cached(
        self,
        h: Float[Array, "B T D"],
        pages: Pages,
        layer: Int[Array, ""],  # index of this block in the pages
        start: Int[Array, " B"],  # rows in the pages before this piece
        lengths: Int[Array, " B"],  # valid tokens of the piece
        position: Int[Array, " B"],  # of the piece's first token in its text
        gate: Gate,
        policy: CachePolicy | None,
        tail: Float[Array, "B X"],  # last keys before the convolution
        shared: Shared | None = None,  # what the block before hands on, where blocks share choices
    ) -> tuple[Float[Array, "B T D"], tuple[Pages, Float[Array, "B X"] | None, Shared | None]]:
        """Attention of a piece to itself and to everything in the pages.

        With a policy, rows that are due are compressed first, by the query of the first token.
        Blocks that share choices keep the same rows, so that their pages stay alike.

        Returns:
          The output [B, T, D]; pages with the piece appended, the new tail, and what to hand on.
        """
        q, k, v, new_tail = self.project(h, position, tail, lengths)
        asked, scored = self.scored(q, k)
        if policy is not None:
            selector = selector_of(self.config)
            due = policy.due(start) & (lengths > 0)
            of_keys = lambda k: self.scored(q, k)[1]

            def squeeze(pages, kept):
                rows = lambda: rows_to_keep(pages, layer, q[:, 0], start, policy)
                alone = shared is None or kept is None
                now = rows() if alone else jax.lax.cond(shared.chooses, rows, lambda: kept)
                pages = compress(pages, layer, now, due, policy, selector, of_keys, shared)
                return pages, None if alone else now

            kept = None if shared is None else shared.kept
            pages, kept = jax.lax.cond(jnp.any(due), squeeze, lambda *same: same, pages, kept)
            start = jnp.where(due, policy.keep, start)
            shared = None if shared is None else shared._replace(kept=kept)
        read = partial(
            attend_cached, config=self.config, gate=gate, gates=self.gates(h), shared=shared
        )
        out, pages, choice = read(q, k, v, asked, scored, pages, layer, start, lengths)
        shared = None if shared is None else shared._replace(choice=choice)
        return self.combine(out), (pages, new_tail, shared)

    def project(
        self,
        h: Float[Array, "B T D"],
        position: Int[Array, " B"] | None = None,
        tail: Float[Array, "B X"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[
        Float[Array, "B T H K"],
        Float[Array, "B T G K"],
        Float[Array, "B T G K"],
        Float[Array, "B X"] | None,
    ]:
        """Queries, keys and values in h's dtype, and the new tail: without a convolution the old.

        Args:
          h: input.
          position: of the first token in its text; None: h begins a text.
          tail: keys of the tokens before, oldest first, as `short_convolution` keeps them; None:
            h begins a text.
          lengths: valid tokens of each row, where there is a tail.
          segment_ids: numbers of packed documents, where there is none; each is a text.
        """
        config = self.config
        q, k, v = (self._projected(h, name) for name in ("receptance", "key", "value"))
        if config.key_conv:
            taps = self.key_conv[...]
            k, tail = short_convolution(k, taps, tail, lengths, segment_ids, added_to=k)
        split = lambda x, heads: constrain(
            x.reshape(*x.shape[:2], heads, -1), "batch", "time", "heads", None
        )
        q, k, v = split(q, config.num_heads), split(k, config.kv_heads), split(v, config.kv_heads)
        if config.rope_theta:
            positions = jnp.arange(h.shape[1], dtype=jnp.int32)[None]
            positions = positions if position is None else position[:, None] + positions
            if segment_ids is not None:
                positions = positions - document_starts(segment_ids)
            q, k = rotate(q, positions, config), rotate(k, positions, config)
        return q, k, v, tail

    def _projected(self, h: Float[Array, "B T D"], name: str) -> Float[Array, "B T X"]:
        """h times the matrix of this name, and its bias if there is one."""
        out = keep(project(h, getattr(self, name)[...]))
        if not self.config.qkv_bias:
            return out
        return out + getattr(self, f"{name}_bias")[...].astype(h.dtype)[None, None]

    def combine(self, out: Float[Array, "B T H K"]) -> Float[Array, "B T D"]:
        """Output projection."""
        out = out.reshape(*out.shape[:2], -1)
        return project(out, self.output[...])
