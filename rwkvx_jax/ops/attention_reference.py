"""Float32 oracles of the attention ops: a whole [Tq, Tk] mask and a plain softmax, for tests."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from rwkvx_jax.ops.attention_inputs import Offset, query_positions, query_starts


def sparse_attention_reference(
    q: Float[Array, "B Tq H K"],
    k: Float[Array, "B Tk G K"],
    v: Float[Array, "B Tk G V"],
    selection: Int32[Array, "B Tq S J"],
    *,
    chunk_size: int,
    scale: float,
    q_offset: Offset = 0,
    starts: Int32[Array, "B Tk"] | None = None,
) -> Float[Array, "B Tq H V"]:
    """Oracle of `block_sparse.sparse_attention`, with the arguments of its XLA form."""
    batch, length = q.shape[:2]
    keys = jnp.arange(k.shape[1])
    positions = query_positions(q_offset, batch, length)  # [B, Tq]
    own = positions // chunk_size
    selection = jnp.repeat(selection, q.shape[2] // selection.shape[2], axis=2)
    past = jnp.where(selection < own[:, :, None, None], selection, -1)
    chosen = past[..., None] == (keys // chunk_size)[None, None, None, None, :]
    visible = chosen.any(axis=3).transpose(0, 2, 1, 3)  # [B, H, Tq, Tk]
    causal = keys[None, None, :] <= positions[:, :, None]
    same = (keys // chunk_size)[None, None, :] == own[:, :, None]
    visible |= (causal & same)[:, None]
    if starts is not None:
        visible &= _same_document(starts, q_offset, length)[:, None]
    return _masked_softmax_attention(q, k, v, visible, scale)


def full_attention_reference(
    q: Float[Array, "B Tq H K"],
    k: Float[Array, "B Tk G K"],
    v: Float[Array, "B Tk G V"],
    *,
    scale: float,
    q_offset: Offset = 0,
    window: int | None = None,
    starts: Int32[Array, "B Tk"] | None = None,
) -> Float[Array, "B Tq H V"]:
    """Oracle of `full_attention.full_attention`."""
    positions = query_positions(q_offset, q.shape[0], q.shape[1])
    behind = positions[:, :, None] - jnp.arange(k.shape[1])[None, None, :]
    visible = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    if starts is not None:
        visible &= _same_document(starts, q_offset, q.shape[1])
    return _masked_softmax_attention(q, k, v, visible[:, None], scale)


def _same_document(starts, q_offset, length):
    """Whether a query and a key are of one document, [B, Tq, Tk]."""
    return query_starts(starts, q_offset, length)[:, :, None] == starts[:, None, :]


def _masked_softmax_attention(q, k, v, visible, scale):
    high = jax.lax.Precision.HIGHEST
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    k32, v32 = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k32, v32))
    scores = jnp.einsum("bthk,bshk->bhts", q32, k32, precision=high) * scale
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bhts,bshv->bthv", weights, v32, precision=high)
    return out.astype(q.dtype)
