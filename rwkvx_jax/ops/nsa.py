"""Native Sparse Attention: the sum of three branches, each with a gate of its own.

The compressed branch attends to mean keys and values of chunks (`compressed`), and its weights
choose the chunks that the selected branch reads token by token (`block_sparse`, with all its
implementations); the window branch attends to the last tokens (`full_attention` with a window).
Source: arXiv 2502.11089. Here compressed blocks are the chunks of the selection (l = d = l'), their
compression is the mean, and all branches share keys and values.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rwkvx_jax.ops.attention_inputs import (
    Offset,
    check_attention_inputs,
    check_chunking,
    check_scale,
    check_window,
    query_positions,
    query_starts,
    run_attention,
)
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.compressed import chunk_means, compressed_attention
from rwkvx_jax.ops.documents import check_segment_ids
from rwkvx_jax.ops.full_attention import full_attention
from rwkvx_jax.ops.nsa_reference import nsa_reference

BRANCHES = 3
"""Of NSA, in the order of its gates: compressed, selected, window."""


def native_sparse_attention(
    q: Float[Array, "B Tq H K"],
    k: Float[Array, "B Tk G K"],
    v: Float[Array, "B Tk G V"],
    gates: Float[Array, "B Tq H 3"],
    *,
    chunk_size: int,
    top_k: int,
    window: int,
    q_offset: Offset = 0,
    segment_ids: Int[Array, "B Tk"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Tq H V"]:
    """Causal attention to the means of all past chunks, to some chunks, and to the last tokens.

    Args:
      q: [B, Tq, H, K] queries; the first of row b stands at absolute position q_offset[b].
      k: [B, Tk, G, K] keys from position 0, those of the queries included. G divides H, and the
        H / G query heads of a key head read the same chunks.
      v: [B, Tk, G, V] values.
      gates: [B, Tq, H, 3] factors of the outputs of the compressed, selected and window branch.
      chunk_size: tokens in a chunk, counted from position 0.
      top_k: chunks of the selected branch: the own one, the one before it, the first of the text,
        and those to which the compressed branch gives the most weight; at least 3.
      window: keys of the window branch, the query's own position included.
      q_offset: int, integer scalar or integer [B] (may be traced). Outputs at positions beyond the
        last key are meaningless but finite.
      segment_ids: numbers of packed documents (`documents`), of the keys and so of the queries at
        their positions; no branch reads another document. A chunk that holds several counts as what
        it holds of its last one. None: all tokens are of one.
      scale: factor on q . k, a positive float; default 1 / sqrt(K).
      implementation: "reference" (float32, quadratic memory), one of `sparse_attention` for the
        selected branch, or None to choose by platform and shapes. The other branches choose for
        themselves.

    Returns:
      [B, Tq, H, V] in q's dtype. Differentiable in q, k, v and gates in reverse mode; no gradient
      flows through the choice of chunks.

    Raises:
      ValueError: on shapes or dtypes that do not fit, chunk_size or window < 1, top_k < 3,
        segment_ids that number no documents, or a named implementation that cannot run here.
    """
    _check(q, k, v, gates, chunk_size, top_k, window, q_offset, segment_ids)
    scale = check_scale(scale, q.shape[-1])
    offset: dict[str, Any] = {"q_offset": q_offset, "segment_ids": segment_ids}
    chunks: dict[str, Any] = {"chunk_size": chunk_size, "top_k": top_k}
    if implementation == "reference":
        run = lambda q, k, v, **rows: nsa_reference(
            q, k, v, window=window, scale=scale, **chunks, **rows
        )[:BRANCHES]
        return gated(gates, *run_attention(run, (q, k, v), **offset, outputs=("B.H.",) * BRANCHES))

    def compressed_branch(q, k, v, q_offset, starts=None):
        positions = query_positions(q_offset, *q.shape[:2])
        first = None if starts is None else query_starts(starts, q_offset, q.shape[1])
        return compressed_attention(
            q,
            chunk_means(k, v, chunk_size, starts),
            positions,
            chunk_size=chunk_size,
            count=top_k - 1,
            scale=scale,
            first=first,
        )

    outputs = "B.H.", "B.H."
    compressed, chosen = run_attention(compressed_branch, (q, k, v), **offset, outputs=outputs)
    selected = sparse_attention(
        q, k, v, selection=chosen, scale=scale, implementation=implementation, **chunks, **offset
    )
    near = full_attention(q, k, v, window=window, scale=scale, **offset)
    return gated(gates, compressed, selected, near)


def gated(
    gates: Float[Array, "B T H 3"], *branches: Float[Array, "B T H V"]
) -> Float[Array, "B T H V"]:
    """The branches (compressed, selected, window) times their gates, summed in float32, in their
    dtype."""
    parts = (
        gates[..., i, None].astype(jnp.float32) * x.astype(jnp.float32)
        for i, x in enumerate(branches)
    )
    return sum(parts, jnp.float32(0)).astype(branches[0].dtype)


def _check(q, k, v, gates, chunk_size, top_k, window, q_offset, segment_ids) -> None:
    check_chunking(chunk_size, top_k)
    check_attention_inputs(q, k, v, q_offset)
    if window is None:
        raise ValueError("window is None: pass the keys that a query of the window branch reads")
    check_window(window)
    if top_k < 3:
        raise ValueError(
            f"top_k is {top_k}: NSA always reads the first chunk, the own and the one before it, "
            "so it is at least 3"
        )
    expected = (*q.shape[:3], BRANCHES)
    if jnp.shape(gates) != expected or not jnp.issubdtype(jnp.result_type(gates), jnp.floating):
        raise ValueError(
            f"gates are {jnp.result_type(gates)}{list(jnp.shape(gates))}, expected floating "
            f"{list(expected)}: one a query head for each branch"
        )
    if segment_ids is not None:
        check_segment_ids("native_sparse_attention", segment_ids, *k.shape[:2])
