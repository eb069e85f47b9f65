"""Float32 oracle of Native Sparse Attention: whole matrices and plain formulas, for tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from rwkvx_jax.ops.attention_inputs import Offset, query_positions, query_starts
from rwkvx_jax.ops.attention_reference import full_attention_reference, sparse_attention_reference


class NsaBranches(NamedTuple):
    """Outputs of the branches before their gates, and the past chunks of each key head."""

    compressed: Float[Array, "B Tq H V"]
    selected: Float[Array, "B Tq H V"]
    window: Float[Array, "B Tq H V"]
    selection: Int32[Array, "B Tq G J"]


def nsa_reference(
    q: Float[Array, "B Tq H K"],
    k: Float[Array, "B Tk G K"],
    v: Float[Array, "B Tk G V"],
    *,
    chunk_size: int,
    top_k: int,
    window: int,
    scale: float,
    q_offset: Offset = 0,
    starts: Int32[Array, "B Tk"] | None = None,
) -> NsaBranches:
    """Oracle of `nsa.native_sparse_attention`, with its arguments, before the gates."""
    positions = query_positions(q_offset, q.shape[0], q.shape[1])
    first = jnp.zeros_like(positions)
    if starts is not None:
        first = query_starts(starts, q_offset, q.shape[1])
    share = _shares(k.shape[1], chunk_size, starts)
    weights, out = _compressed(q, k, v, share, positions, first, chunk_size, scale)
    groups = weights.reshape(q.shape[0], k.shape[2], -1, *weights.shape[2:]).sum(2)
    selection = _best(groups, positions // chunk_size, first // chunk_size, top_k - 1)
    rows: dict[str, Any] = {"scale": scale, "q_offset": q_offset, "starts": starts}
    selected = sparse_attention_reference(q, k, v, selection, chunk_size=chunk_size, **rows)
    return NsaBranches(
        out, selected, full_attention_reference(q, k, v, window=window, **rows), selection
    )


def _shares(keys: int, chunk_size: int, starts) -> Float32[Array, "B N Tk"]:
    """What each token has of each chunk's mean."""
    at, numbers = jnp.arange(keys), jnp.arange(-(-keys // chunk_size))
    inside = (at[None] // chunk_size == numbers[:, None])[None]
    if starts is not None:
        ends = starts[:, jnp.minimum((numbers + 1) * chunk_size, keys) - 1]
        inside &= at[None, None] >= ends[:, :, None]
    return inside / jnp.maximum(inside.sum(-1, keepdims=True), 1)


def _compressed(q, k, v, share, positions, first, chunk_size, scale):
    """Weights [B, H, Tq, N] and outputs."""
    product = lambda form, *arrays: jnp.einsum(form, *arrays, precision=jax.lax.Precision.HIGHEST)
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    k32, v32 = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k32, v32))
    k32, v32 = product("bns,bshk->bnhk", share, k32), product("bns,bshv->bnhv", share, v32)
    numbers = jnp.arange(share.shape[1])[None, None]
    ended = (numbers + 1) * chunk_size - 1 <= positions[:, :, None]
    ended &= numbers >= (first // chunk_size)[:, :, None]
    ended = ended[:, None]
    scores = product("bthk,bnhk->bhtn", q32, k32) * scale
    weights = jax.nn.softmax(jnp.where(ended, scores, -1e30), axis=-1) * ended
    return weights, product("bhtn,bnhv->bthv", weights, v32).astype(q.dtype)


def _best(scores: Float32[Array, "B G T N"], own, first, count: int) -> Int32[Array, "B T G J"]:
    """The best past chunks; forced are the one before the own one and the first."""
    numbers = jnp.arange(scores.shape[-1])[None, None, None]
    own, first = own[:, None, :, None], first[:, None, :, None]
    forced = (numbers == own - 1) | (numbers == first)
    past = (numbers >= first) & (numbers < own)
    scores = jnp.where(past, jnp.where(forced, jnp.inf, scores), -jnp.inf)
    order = jnp.argsort(-scores, axis=-1, stable=True)[..., :count]
    kept = jnp.take_along_axis(scores, order, axis=-1) > -jnp.inf
    chosen = jnp.where(kept, order, -1).astype(jnp.int32)
    missing = ((0, 0), (0, 0), (0, 0), (0, count - chosen.shape[-1]))
    return jnp.pad(chosen, missing, constant_values=-1).swapaxes(1, 2)
