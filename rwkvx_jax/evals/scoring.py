"""How well a model predicts given text: the loss of every token, whole or piece by piece.

Logits of a large vocabulary exist for one block of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rwkvx_jax.cache import choose, rewind, snapshot
from rwkvx_jax.evals.batching import Packed
from rwkvx_jax.evals.common import Subject
from rwkvx_jax.model import RWKVX, abstract_model, with_params

_BLOCK_LOGITS = 1 << 26  # at most so many at once, a quarter of a gigabyte
# On a CPU a block should stay in cache between its products and their sums.
_PLACE_LOGITS = {"cpu": 1 << 21}


class Scores(NamedTuple):
    """Of predicting each target, [B, T]."""

    loss: jax.Array  # float32, natural logarithms
    hit: jax.Array  # bool, whether the target is the most likely token


def score_targets(model: RWKVX, features: jax.Array, targets: jax.Array) -> Scores:
    """Scores of int32 targets [B, T] given the features [B, T, D] before each."""
    batch, time = targets.shape
    block = min(time, max(1, _BLOCK_LOGITS // (batch * model.config.vocab_size)))
    blocks = -(-time // block)

    def split(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [blocks, B, block, ...]
        padding = [(0, 0), (0, blocks * block - time)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding).reshape(batch, blocks, block, *x.shape[2:]).swapaxes(0, 1)

    def one_block(part: tuple[jax.Array, jax.Array]) -> Scores:
        logits, wanted = model.head(part[0]), part[1]
        own = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        return Scores(jax.nn.logsumexp(logits, axis=-1) - own, jnp.argmax(logits, -1) == wanted)

    scores = jax.lax.map(one_block, (split(features), split(targets)))
    return Scores(*(x.swapaxes(0, 1).reshape(batch, -1)[:, :time] for x in scores))


def read_lanes(model: RWKVX, packed: Packed, rows: int) -> jax.Array:
    """Features of all tokens of a call, flattened [steps * lanes * piece, D].

    Args:
      model: the model.
      packed: the call.
      rows: tokens of the longest text.
    """
    _, lanes, piece = packed.tokens.shape
    cache = model.init_cache(lanes, rows)
    nothing = snapshot(cache)

    def step(i, carry):
        cache, kept, features = carry
        now = choose(packed.back[i], kept, snapshot(cache))
        cache = rewind(cache, choose(packed.fresh[i], nothing, now))
        new, cache = model.read(packed.tokens[i], cache, packed.lengths[i])
        kept = choose(packed.keep[i], snapshot(cache), kept)
        return cache, kept, jax.lax.dynamic_update_index_in_dim(features, new, i, 0)

    features = jnp.zeros((*packed.tokens.shape, model.config.width), model.dtype)
    carry = (cache, nothing, features)
    _, _, features = jax.lax.fori_loop(0, packed.step_count, step, carry)
    return features.reshape(-1, model.config.width)


def score_places(
    model: RWKVX,
    features: jax.Array,  # [N, D]
    places: jax.Array,  # [U] int32, rows of the features
    targets: jax.Array,  # [U, A] int32
    count: jax.Array,  # int32 scalar
) -> tuple[jax.Array, jax.Array]:
    """Scores A tokens each at chosen places; nothing is computed beyond the first `count` places.

    Returns:
      Logarithms of the tokens' probabilities [U, A], and whether each is the most likely one.
    """
    number = len(places)
    limit = _PLACE_LOGITS.get(jax.default_backend(), _BLOCK_LOGITS)
    block = min(number, max(1, limit // model.config.vocab_size))
    padding = -number % block
    places, targets = jnp.pad(places, (0, padding)), jnp.pad(targets, ((0, padding), (0, 0)))

    def one_block(i: jax.Array, scores: tuple[jax.Array, jax.Array]):
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, i * block, block)
        logits, wanted = model.head(features[cut(places)]), cut(targets)
        own = jnp.take_along_axis(logits, wanted, axis=1)
        logs = own - jax.nn.logsumexp(logits, axis=1, keepdims=True)
        hits = jnp.argmax(logits, axis=1)[:, None] == wanted
        put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, i * block, 0)
        return put(scores[0], logs), put(scores[1], hits)

    start = jnp.zeros(targets.shape, jnp.float32), jnp.zeros(targets.shape, bool)
    logs, hits = jax.lax.fori_loop(0, -(-count // block), one_block, start)
    return logs[:number], hits[:number]


class TextScorer:
    """Losses of long texts, read in pieces through the cache: one compilation for any length."""

    def __init__(self, subject: Subject, *, piece: int, batch: int, longest: int):
        """
        Args:
          subject: the model; its parameters move to the device.
          piece: tokens read at once.
          batch: texts side by side; smaller batches are padded.
          longest: predictions of the longest text.
        """
        self._piece, self._batch = piece, batch
        self._rows = -(-longest // piece) * piece
        self._model = abstract_model(subject.config, subject.run)
        self._params = jax.device_put(subject.params)
        self._score = jax.jit(self._score_piece, donate_argnums=2)

    def __call__(
        self, texts: Sequence[np.ndarray], advance: Callable[[int], None] = lambda count: None
    ) -> list[np.ndarray]:
        """Losses of predicting texts[i][1:] one by one.

        Args:
          texts: at most `batch` int32 arrays of T + 1 tokens, each T from 1 to `longest`.
          advance: told how many tokens have been read, piece by piece.

        Returns:
          float32 [T] for each text.
        """
        counts = np.zeros(self._batch, np.int64)
        counts[: len(texts)] = [len(text) - 1 for text in texts]
        padded = np.zeros((self._batch, counts.max() + self._piece), np.int32)
        for row, text in zip(padded, texts, strict=False):
            row[: len(text)] = text
        cache = self._model.init_cache(self._batch, self._rows)
        losses = []
        for start in range(0, counts.max(), self._piece):
            part = padded[:, start : start + self._piece + 1]
            lengths = np.clip(counts - start, 0, self._piece).astype(np.int32)
            loss, cache = self._score(self._params, part, cache, lengths)
            losses.append(np.asarray(loss))
            advance(int(lengths.sum()))
        whole = np.concatenate(losses, axis=1)
        return [row[:count] for row, count in zip(whole[: len(texts)], counts, strict=False)]

    def _score_piece(self, params, tokens, cache, lengths):
        model = with_params(self._model, params)
        features, cache = model.read(tokens[:, :-1], cache, lengths)
        return score_targets(model, features, tokens[:, 1:]).loss, cache
