"""Checks, positions and placement shared by the attention operations.

Every attention op takes queries that begin at an absolute position `q_offset` of the key sequence:
0 in training, the number of tokens already processed when a prompt is prefilled in pieces, one
value a batch row when the rows' prompts differ in length. Here that argument is understood once,
and wrong shapes are refused before anything is traced.
"""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int32, Integer

from rwkvx_jax.ops.documents import document_starts, first_keys
from rwkvx_jax.ops.placement import local, vary_together

Offset = Integer[ArrayLike, ""] | Integer[ArrayLike, " B"]
"""Position of the first query: one for all batch rows, or one a row."""

NO_FORWARD_MODE = (
    "{}: only implementation='reference' can be differentiated in forward mode (jvp, jacfwd, "
    "linearize); all others have a reverse mode of their own (grad, vjp, and hessian over it)"
)


def check_attention_inputs(
    q: Float[Array, "B Tq H K"],
    k: Float[Array, "B Tk G K"],
    v: Float[Array, "B Tk G V"],
    q_offset: Offset,
) -> None:
    """Raises ValueError unless q, k, v and q_offset fit together.

    Args:
      q: [B, Tq, H, K].
      k: [B, Tk, G, K]; G divides H.
      v: [B, Tk, G, V].
      q_offset: int, integer scalar or integer [B]; a Python int is also checked for its range.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k, v must be [B, T, H, K], got shapes {q.shape}, {k.shape}, {v.shape}"
        )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k {k.shape} and v {v.shape} must agree in batch, time and heads: "
            "pass one value row per key row"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {q.shape} and k {k.shape} must agree in batch and key size: pass keys of the "
            "queries' batch rows, as wide as these"
        )
    check_groups(q.shape[2], k.shape[2])
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"q, k, v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}: "
            "cast them first"
        )
    if q.shape[1] < 1:
        raise ValueError(f"q has no tokens (shape {q.shape}): pass at least one")
    check_offset(q_offset, q.shape[0])
    if isinstance(q_offset, numbers.Integral) and q_offset + q.shape[1] > k.shape[1]:
        raise ValueError(
            f"queries at positions {q_offset}..{q_offset + q.shape[1] - 1} need keys up to "
            f"there, got {k.shape[1]} keys: pass the keys of the queries themselves too"
        )


def check_groups(heads: int, key_heads: int, choices: int | None = None) -> None:
    """Raises ValueError unless heads can be grouped: each number divides the one before.

    Args:
      heads: query heads H.
      choices: selections S, each of H / S neighbouring query heads; None where there are none.
      key_heads: key and value heads G, each read by H / G neighbouring query heads.
    """
    if key_heads < 1 or heads % key_heads:
        raise ValueError(
            f"{heads} query heads can't share {key_heads} key and value heads evenly: the number "
            "of key heads must divide that of query heads"
        )
    if choices is not None and (choices < 1 or heads % choices or choices % key_heads):
        raise ValueError(
            f"{heads} query heads and {key_heads} key heads with {choices} choices of chunks: the "
            "number of choices must divide that of query heads, that of key heads must divide it"
        )


def check_offset(q_offset: Offset, batch: int) -> None:
    """Raises ValueError unless q_offset is a non-negative int, or an integer scalar or [batch]."""
    if isinstance(q_offset, numbers.Integral):
        if q_offset < 0:
            raise ValueError(f"q_offset is {q_offset}: positions count from 0")
        return
    shape, dtype = jnp.shape(q_offset), jnp.result_type(q_offset)
    if shape not in ((), (batch,)) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"q_offset is {dtype}{list(shape)}: pass an int, an integer scalar or an integer "
            f"array [{batch}], one value a batch row"
        )


def check_chunking(chunk_size: int, top_k: int) -> None:
    """Raises ValueError unless chunk_size and top_k are positive ints."""
    for name, value in (("chunk_size", chunk_size), ("top_k", top_k)):
        if not isinstance(value, numbers.Integral):
            raise ValueError(f"{name} is {value!r}: pass a Python int")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: a chunk holds at least 1 token")
    if top_k < 1:
        raise ValueError(
            f"top_k is {top_k}: it counts the query's own chunk, so it is at least 1 "
            "(1 means attention within the own chunk only)"
        )


def check_window(window: int | None) -> None:
    """Raises ValueError unless window is a positive int, or None for everything."""
    if window is not None and not (isinstance(window, numbers.Integral) and window > 0):
        raise ValueError(
            f"window is {window!r}: pass a positive Python int, the keys a query reads, or None "
            "for all"
        )


def check_scale(scale: float | None, key_size: int) -> float:
    """The factor on q . k as a positive float; the default is 1 / sqrt(K)."""
    if scale is None:
        return key_size**-0.5
    if isinstance(scale, jax.Array) or not scale > 0:
        raise ValueError(f"scale is {scale!r}: pass a positive Python float")
    return float(scale)


def offset_of_rows(q_offset: Offset, batch: int) -> Int32[Array, " {batch}"]:
    """q_offset as int32 [B]."""
    return jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (batch,))


def rows_of(
    q_offset: Offset, starts: Int32[Array, "B Tk"] | None, batch: int
) -> tuple[jax.Array, ...]:
    """What belongs to a batch row, for `heads.map_heads`: q_offset, and `starts` if given."""
    offset = offset_of_rows(q_offset, batch)
    return (offset,) if starts is None else (offset, starts)


def known_or_rows(q_offset: Offset, batch: int) -> int | Int32[Array, " {batch}"]:
    """q_offset as an int where it is one, which kernels make use of, else as int32 [B]."""
    if isinstance(q_offset, numbers.Integral):
        return int(q_offset)
    return offset_of_rows(q_offset, batch)


def query_positions(q_offset: Offset, batch: int, length: int) -> Int32[Array, "{batch} {length}"]:
    """Absolute positions of the queries, int32 [B, Tq]."""
    steps = jnp.arange(length, dtype=jnp.int32)
    return offset_of_rows(q_offset, batch)[:, None] + steps[None, :]


def query_starts(
    starts: Int32[Array, "B Tk"], q_offset: Offset, length: int
) -> Int32[Array, "B {length}"]:
    """Where the documents of the queries begin, of keys' `documents.document_starts`."""
    offset = offset_of_rows(q_offset, starts.shape[0])
    return jax.vmap(lambda starts, offset: first_keys(starts, offset, length))(starts, offset)


def run_attention(
    run: Callable[..., Any],
    arrays: Sequence[jax.Array],
    q_offset,
    *,
    segment_ids: jax.Array | None = None,
    outputs: str | tuple[str, ...] = "B.H.",
    check_vma: bool = True,
) -> Any:
    """`run(*arrays, q_offset=...)`, by each device for its own rows and heads (`placement.local`).

    Args:
      run: function of arrays [B, T, H, ...], with a keyword argument q_offset, that returns one.
      arrays: its arguments.
      q_offset: int, integer scalar or integer [B]; stays an int where it is one.
      segment_ids: of the keys; with them `run` gets `starts` (`documents.document_starts`).
      outputs: as in `placement.local`, where `run` returns several.
      check_vma: as in `jax.shard_map`.
    """
    given: dict[str, Any] = {"q_offset": known_or_rows(q_offset, arrays[0].shape[0])}
    if segment_ids is not None:
        given["starts"] = document_starts(segment_ids)
    rows = {name: x for name, x in given.items() if not isinstance(x, int)}

    def shard(*arrays_and_rows):
        values = vary_together(*arrays_and_rows)
        named = dict(zip(rows, values[len(arrays) :], strict=True))
        return run(*values[: len(arrays)], **(given | named))

    axes = ("B.H.",) * len(arrays) + tuple("B" + "." * (x.ndim - 1) for x in rows.values())
    return local(shard, (*arrays, *rows.values()), axes, outputs, check_vma=check_vma)
