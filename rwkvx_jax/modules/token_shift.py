"""Token shift: each token beside the one before it, across borders of pieces and of devices, but
not of documents."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rwkvx_jax.modules import context
from rwkvx_jax.ops.documents import beginnings
from rwkvx_jax.sharding import sequence_parts


def previous_token(
    h: Float[Array, "B T D"],
    shift: Float[Array, "B D"] | None,  # the input before h, or None: zeros
    segment_ids: Int[Array, "B T"] | None = None,  # numbers of packed documents
) -> Float[Array, "B T D"]:
    """h moved one step later in time: [B, T, D], beginning with `shift`; zeros where a document
    begins."""
    if shift is None and sequence_parts(h.shape[1]) > 1:
        moved = context.previous_token(h)
    else:
        first = jnp.zeros_like(h[:, :1]) if shift is None else shift[:, None].astype(h.dtype)
        moved = jnp.concatenate([first, h[:, :-1]], axis=1)
    if segment_ids is None:
        return moved
    return jnp.where(beginnings(segment_ids)[..., 0] > 0, 0, moved)


def last_valid(
    h: Float[Array, "B T D"],
    shift: Float[Array, "B D"] | None,
    lengths: Int[Array, " B"] | None,  # valid tokens of each row, or None: all
) -> Float[Array, "B D"]:
    """The last valid row of h, [B, D]; `shift` where a row has none."""
    if lengths is None:
        return h[:, -1]
    last = jnp.take_along_axis(h, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    before = jnp.zeros_like(last) if shift is None else shift.astype(h.dtype)
    return jnp.where((lengths > 0)[:, None], last, before)
