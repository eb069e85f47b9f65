"""Probabilities of chosen tokens in packed requests.

Logits of a large vocabulary exist for one block of tokens at a time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rwkvx_jax.cache import choose, rewind, snapshot
from rwkvx_jax.evals.short.batching import Packed
from rwkvx_jax.model import RWKVX

_BLOCK_LOGITS = 1 << 26  # at most so many at once, a quarter of a gigabyte
# On a CPU a block should stay in cache between its products and their sums.
_PLACE_LOGITS = {"cpu": 1 << 21}


def read_lanes(model: RWKVX, packed: Packed, rows: int) -> jax.Array:
    """Features of all tokens of a call, flattened [steps * lanes * width, D].

    Args:
      model: the model.
      packed: the call.
      rows: tokens of the longest text.
    """
    lanes = packed.tokens.shape[1]
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
