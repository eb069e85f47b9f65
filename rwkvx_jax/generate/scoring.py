"""Scores of tokens at chosen places, without ever holding the logits of all of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rwkvx_jax.model import RWKVX

_BLOCK_LOGITS = 1 << 26  # at most so many at once, a quarter of a gigabyte
# On a CPU a block should stay in cache between its products and their sums.
_PLACE_LOGITS = {"cpu": 1 << 21}


def score_places(
    model: RWKVX,
    features: jax.Array,  # [N, D]
    places: jax.Array,  # [U] int32, rows of the features
    targets: jax.Array,  # [U, A] int32
    count: jax.Array | int,
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
