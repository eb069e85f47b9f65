"""Checks of attention's arguments, and queries moved so that they begin on a block of keys.

Kernels walk queries and keys in blocks that must not straddle chunks. Queries at position q_offset
are moved down by q_offset modulo the block, and what is put before them is cut off the result.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import common


def unsupported_reason(
    head_size: int, value_size: int, chunk_size: int, dtype: jax.typing.DTypeLike
) -> str | None:
    """Why these kernels cannot take such inputs; None if they can."""
    if chunk_size != 32 and (not 64 <= chunk_size <= 2048 or chunk_size % 64):
        return f"chunk size {chunk_size} is not 32 or a multiple of 64 up to 2048"
    return common.unsupported_reason(head_size, value_size, dtype)


def check(q, k, v, selection, starts=None) -> None:
    """Raises ValueError unless shapes and dtypes of attention's arguments fit together."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"q, k, v must be [B, T, H, K], got {q.shape}, {k.shape}, {v.shape}")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {q.shape} and k {k.shape} differ in batch or key size, or their heads do not divide"
        )
    if q.shape[1] < 1 or k.shape[1] < 1:
        raise ValueError(f"q {q.shape} and k {k.shape} need at least one token each")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if selection.ndim != 4 or selection.shape[:3] != (*q.shape[:2], k.shape[2]):
        raise ValueError(
            f"selection {selection.shape} must be [B, Tq, G, J] for q {q.shape} and k {k.shape}: "
            "one choice a key head"
        )
    if starts is not None and starts.shape != k.shape[:2]:
        raise ValueError(f"starts {starts.shape} must be [B, Tk] for k {k.shape}")


def align(x: jax.Array, q_offset, block: int, fill=0) -> tuple[jax.Array, int | jax.Array]:
    """Moves each row's queries down to its offset within a block.

    Args:
      x: [B, T, ...].
      q_offset: int, or int32 [B] (may be traced).
      block: rows of a block.
      fill: what stands before (and, if the offset is an array, after) them.

    Returns:
      [B, T', ...] and where the queries begin in it, int or [B].
    """
    if isinstance(q_offset, int):
        shift = q_offset % block
        before = [(0, 0), (shift, 0)] + [(0, 0)] * (x.ndim - 2)
        return (jnp.pad(x, before, constant_values=fill) if shift else x), shift
    shift = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), x.shape[:1]) % block
    target = jnp.full((x.shape[1] + block, *x.shape[2:]), fill, x.dtype)
    move = lambda x, start: lax.dynamic_update_slice_in_dim(target, x, start, 0)
    return jax.vmap(move)(x, shift), shift


def first_block(q_offset, batch: int, block: int, keys: int) -> jax.Array:
    """Block of keys that the aligned queries begin at, int32 [B]; at most the one after the last,
    for queries beyond all keys."""
    offset = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (batch,))
    return (
        offset // block
        if isinstance(q_offset, int)
        else jnp.minimum(offset // block, -(-keys // block))
    )


def cut(x: jax.Array, shift: int | jax.Array, length: int) -> jax.Array:
    """The rows of x [B, T', ...] that `align` moved down by `shift`, [B, length, ...]."""
    if isinstance(shift, int):
        return x[:, shift : shift + length]
    return jax.vmap(lambda x, start: lax.dynamic_slice_in_dim(x, start, length))(x, shift)


def document_ends(starts: jax.Array, keys: int) -> jax.Array:
    """The last key of each key's document, int32 [B, keys]: the last query that may read it.

    Args:
      starts: int32 [B, Tk], of packed documents: the position at which each key's begins.
      keys: Tk or more; what is behind Tk belongs to the last document.
    """
    position = jnp.arange(starts.shape[1], dtype=jnp.int32)[None]
    begins = jnp.where(starts == position, position, keys)
    more = (0, 0), (0, keys + 1 - starts.shape[1])
    begins = jnp.pad(begins, more, constant_values=keys)
    return lax.cummin(begins, axis=1, reverse=True)[:, 1:] - 1
