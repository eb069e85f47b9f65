"""The compiled functions of an engine, which hold no arrays themselves.

The cache is donated and written in place. Chunks of a prompt have few lengths, each compiled once;
one text is read in its row of the cache while the others stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rwkvx_jax.cache import Cache, CachePolicy, spread
from rwkvx_jax.generate.sampling import Sampling, count_token, sample
from rwkvx_jax.generate.scoring import score_places
from rwkvx_jax.model import RWKVX, with_params
from rwkvx_jax.modules.trees import Params
from rwkvx_jax.sharding import constrain, whole
from rwkvx_jax.snapshots import (
    Snapshot,
    choose,
    copied_row,
    of_text,
    rewind,
    row_of,
    snapshot,
    wiped,
    with_row,
)

ENDED = -1
"""In place of a token: the row does not take part."""


class Progress(NamedTuple):
    """What a decode step carries beside the cache."""

    logits: jax.Array  # [B, W], of the next token
    keys: jax.Array  # [B] PRNG keys
    counts: jax.Array | None  # [B, W] float32, what was generated so far

    def spread(self) -> Progress:
        """Itself, asked to lie over the mesh in force."""
        tokens = lambda x: constrain(x, "batch", "vocab")
        counts = None if self.counts is None else tokens(self.counts)
        return Progress(tokens(self.logits), whole(self.keys), counts)


class Held(NamedTuple):
    """A point of a text from which others can begin: one row of everything."""

    state: Snapshot
    logits: jax.Array  # [1, W]


class Programs:
    """What is run on the device.

    Attributes:
      abstract: the model with shapes in place of arrays.
      begin, read, step, restart, copy, keep, place, finite: jitted; see the methods that they are
        made of.
    """

    def __init__(
        self, abstract: RWKVX, batch: int, rows: int, sampling: Sampling, policy: CachePolicy | None
    ):
        """
        Args:
          abstract: the model.
          batch: B.
          rows: of the cache for each text.
          sampling: how tokens are chosen.
          policy: compresses the cache.
        """
        self.abstract = abstract
        self._batch, self._rows, self._sampling, self._policy = batch, rows, sampling, policy
        self.begin = jax.jit(self._nothing_read)
        self.read = jax.jit(self._read_chunk, donate_argnums=(1, 2))
        self.step = jax.jit(self._next_token, donate_argnums=(1, 2))
        self.restart = jax.jit(
            self._begun_anew, donate_argnums=(0, 1), static_argnames="wipe", keep_unused=True
        )
        self.copy = jax.jit(copied_row, donate_argnums=0)
        self.keep = jax.jit(_kept)
        self.place = jax.jit(_placed, donate_argnums=0)
        self.finite = jax.jit(lambda logits: whole(jnp.isfinite(logits).all(axis=-1)))

    def empty(self, batch: int) -> Cache:
        """A cache that has read nothing."""
        return self.abstract.init_cache(batch, self._rows, policy=self._policy)

    def _nothing_read(self, seeds: jax.Array) -> Progress:
        logits = jnp.zeros((self._batch, self.abstract.config.vocab_size), jnp.float32)
        counts = jnp.zeros_like(logits) if self._sampling.penalizes else None
        return Progress(logits, jax.vmap(jax.random.key)(seeds), counts).spread()

    def _begun_anew(
        self, cache: Cache, progress: Progress, held: Held | None, rows, seeds, *, wipe: bool
    ):
        """Texts where rows [B] begin at what is held, or at nothing; see `Rows.restart`."""
        fresh = self._nothing_read(seeds)
        if held is None:
            held = Held(snapshot(self.empty(1)), fresh.logits[:1])
        cache = rewind(cache, choose(rows, held.state, snapshot(cache)))
        if wipe:
            cache = wiped(cache, rows)
        logits = jnp.broadcast_to(held.logits, fresh.logits.shape)
        return spread(cache), _pick(rows, fresh._replace(logits=logits), progress).spread()

    def _read_chunk(self, params, logits, cache: Cache, tokens, counts, row, targets):
        """Reads a chunk of all rows, or of one.

        Args:
          params: the parameters.
          logits: [B, W], of the next tokens.
          cache: of all rows.
          tokens: [B, T], or [1, T] of the row.
          counts: [B] or [1], how many of them count.
          row: which one; None: all.
          targets: as tokens, what each is to predict, to be scored: then no logits are computed.

        Returns:
          Logits, cache, and losses and hits as tokens (None without targets).
        """
        model = with_params(self.abstract, params)
        own = cache if row is None else row_of(cache, row)
        scores = None
        if targets is not None:
            features, own = model.read(tokens, own, counts)
            size, width = tokens.size, features.shape[2]
            every, wanted = jnp.arange(size), targets.reshape(-1, 1)
            logs, hits = score_places(model, features.reshape(-1, width), every, wanted, size)
            scores = whole((-logs.reshape(tokens.shape), hits.reshape(tokens.shape)))
        else:
            new, own = model.prefill(tokens, own, counts)
            if row is None:
                logits = jnp.where((counts > 0)[:, None], new, logits)
            else:
                logits = jax.lax.dynamic_update_slice_in_dim(logits, new, row, 0)
        cache = own if row is None else with_row(cache, own, row)
        return constrain(logits, "batch", "vocab"), spread(cache), scores

    def _next_token(self, params, progress: Progress, cache: Cache, active: jax.Array):
        """Chooses a token of each text that is active [B], and reads it."""
        split = jax.vmap(partial(jax.random.split, num=2))(progress.keys)
        token = sample(progress.logits, split[:, 1], self._sampling, progress.counts)
        counts = progress.counts
        if counts is not None:
            counts = count_token(counts, token, self._sampling)
        model = with_params(self.abstract, params)
        features, cache = model.read(token[:, None], cache, active.astype(jnp.int32))
        new = Progress(model.head(features[:, 0]), split[:, 0], counts)
        if self._batch > 1:  # a single text has no neighbour that goes on without it
            new = _pick(active, new, progress)
        return whole(jnp.where(active, token, ENDED)), new.spread(), cache

    def decode(self, params: Params, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`model.decode` under given parameters, to be jitted with the cache donated."""
        return with_params(self.abstract, params).decode(token, cache)


def _pick(rows: jax.Array, new: Progress, old: Progress) -> Progress:
    """`new` of the texts where rows [B], `old` elsewhere."""
    pick = lambda x, y: jnp.where(rows.reshape(-1, *[1] * (y.ndim - 1)), x, y)
    return jax.tree.map(pick, new, old)


def _kept(cache: Cache, logits: jax.Array, row: jax.Array) -> Held:
    """Where one text is now."""
    return Held(of_text(snapshot(cache), row), jax.lax.dynamic_slice_in_dim(logits, row, 1, 0))


def _placed(cache: Cache, keys: jax.Array, values: jax.Array) -> Cache:
    """The cache with the same keys and values in all rows."""
    pages = cache.pages
    put = lambda x, new: jnp.broadcast_to(new, x.shape)
    pages = pages._replace(keys=put(pages.keys, keys), values=put(pages.values, values))
    return spread(replace(cache, pages=pages))
