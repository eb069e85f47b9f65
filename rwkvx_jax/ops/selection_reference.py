"""Oracle of the choice of chunks: the whole score matrix in float32, sorted stably."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from rwkvx_jax.ops.attention_inputs import Offset, query_positions
from rwkvx_jax.ops.selection import check_selection
from rwkvx_jax.ops.selectors import MEAN, Selector


def select_chunks_reference(
    q: Float[Array, "B Tq H Q"],
    k: Float[Array, "B Tk G K"],
    *,
    chunk_size: int,
    top_k: int,
    q_offset: Offset = 0,
    selector: Selector = MEAN,
) -> Int32[Array, "B Tq S {top_k}-1"]:
    """Oracle of `select_chunks`: the whole score matrix, sorted stably. Same arguments, result."""
    check_selection(q, k, chunk_size, top_k, q_offset, selector)
    batch, length, heads, _ = q.shape
    chunks = k.shape[1] // chunk_size
    q, k = q.astype(jnp.float32), jnp.repeat(k.astype(jnp.float32), heads // k.shape[2], axis=2)
    chunk = lambda c: k[:, c * chunk_size : (c + 1) * chunk_size]
    score = [_score_reference(q, chunk(c), selector) for c in range(chunks)]
    columns = chunks + top_k - 1
    absent = [jnp.full((batch, length, heads), -jnp.inf)] * (top_k - 1)
    scores = jnp.stack(score + absent, axis=-1) if columns else jnp.zeros((batch, length, heads, 0))
    together = selector.together
    scores = scores.reshape(batch, length, heads // together, together, columns)
    scores = scores.sum(3) if selector.joined == "sum" else scores.max(3)
    own = query_positions(q_offset, batch, length)[:, :, None, None] // chunk_size
    past = jnp.arange(columns)[None, None, None] < own
    if selector.span and chunks:
        past &= _candidates_reference(q, k, own, columns, chunk_size, selector)
    scores = selector.prefer_forced(scores, jnp.arange(columns)[None, None, None], own, 0 * own)
    scores = jnp.where(past, scores, -jnp.inf)
    order = jnp.argsort(-scores, axis=-1, stable=True)[..., : top_k - 1]
    chosen = jnp.take_along_axis(scores, order, axis=-1)
    return jnp.where(chosen > -jnp.inf, order, -1).astype(jnp.int32)


def _candidates_reference(q, k, own, columns, chunk_size, selector) -> jax.Array:
    """Which chunks lie in spans that are looked into, bool [B, Tq, S, columns]."""
    size = selector.span * chunk_size
    every = Selector("bounds", together=selector.together, joined=selector.joined)
    parts = [k[:, at : at + size] for at in range(0, k.shape[1], size)]
    scores = jnp.stack([_score_reference(q, part, every) for part in parts], axis=-1)
    scores = scores.reshape(*scores.shape[:2], -1, selector.together, len(parts))
    scores = scores.sum(3) if selector.joined == "sum" else scores.max(3)
    numbers = jnp.arange(len(parts))[None, None, None]
    scores = selector.prefer_forced(scores, numbers, own, 0 * own, selector.span)
    scores = jnp.where(numbers < own // selector.span, scores, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
    looked = (rank < selector.spans - 1) | (numbers == own // selector.span)
    inside = jnp.repeat(looked, selector.span, axis=-1)[..., :columns]
    missing = columns - inside.shape[-1]
    return jnp.pad(inside, ((0, 0), (0, 0), (0, 0), (0, missing)))


def _score_reference(q, chunk, selector: Selector) -> jax.Array:
    """Scores [B, Tq, H] of one chunk's keys [B, C, H, K]."""
    dot = lambda key: jnp.sum(q * key[:, None], axis=-1)
    if selector.kind == "mean":
        return dot(jnp.mean(chunk, axis=1))
    if selector.kind == "seer":
        return dot(jnp.concatenate([chunk.min(1), chunk.max(1), chunk.mean(1)], axis=-1))
    parts = jnp.split(chunk, selector.blocks, axis=1)
    if selector.kind == "bounds":
        bound = lambda low, high: jnp.sum(jnp.maximum(q * low, q * high), axis=-1)
        bounds = [bound(part.min(1)[:, None], part.max(1)[:, None]) for part in parts]
        return jnp.stack(bounds).max(0)
    scores = jnp.stack([dot(jnp.mean(part, axis=1)) for part in parts])
    if selector.kind == "max":
        return scores.max(0)
    return jnp.log(jnp.sum(jnp.exp(scores * q.shape[-1] ** -0.5), axis=0))
