"""Top-k chunk sparse attention: the public op.

Each query attends causally to its own chunk and to the past chunks selected for it, under one
softmax over their union, so that the result is full causal attention while the sequence is no
longer than chunk_size * top_k. The selection is an input of every implementation (see
`selection`): implementations can then differ in rounding only, never in what they read.
Source: RWKV-X (arXiv 2504.21463), training form, per-head selection.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import block_sparse_gpu, block_sparse_mosaic_gpu, block_sparse_tpu
from rwkvx_jax.ops.attention_inputs import (
    NO_FORWARD_MODE,
    Offset,
    check_attention_inputs,
    check_chunking,
    check_groups,
    check_scale,
    known_or_rows,
    query_starts,
    run_attention,
)
from rwkvx_jax.ops.attention_reference import sparse_attention_reference
from rwkvx_jax.ops.block_sparse_masked import (
    masking_obstacle,
    masking_pays,
    sparse_attention_masked,
)
from rwkvx_jax.ops.block_sparse_xla import sparse_attention_xla
from rwkvx_jax.ops.derivatives import reverse_only
from rwkvx_jax.ops.dispatch import Candidate, current_platform, resolve
from rwkvx_jax.ops.documents import NO_DOCUMENTS, check_segment_ids, document_starts
from rwkvx_jax.ops.full_attention import full_attention
from rwkvx_jax.ops.selection import MEAN, Selector, check_selector, select_chunks


def sparse_attention(
    q: Float[Array, "B Tq H K"],
    k: Float[Array, "B Tk G K"],
    v: Float[Array, "B Tk G V"],
    *,
    chunk_size: int,
    top_k: int,
    selection: Int[Array, "B Tq S J"] | None = None,
    q_offset: Offset = 0,
    segment_ids: Int[Array, "B Tk"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    selector: Selector = MEAN,
) -> Float[Array, "B Tq H V"]:
    """Causal attention to the query's own chunk and its selected past chunks.

    Args:
      q: [B, Tq, H, K] queries; the first of row b stands at absolute position q_offset[b].
      k: [B, Tk, G, K] keys from position 0, those of the queries included. G divides H, and query
        head h reads key head h // (H / G).
      v: [B, Tk, G, V] values.
      chunk_size: tokens in a chunk, counted from position 0; need not divide Tk.
      top_k: chunks a query attends to, its own included; may exceed the number of chunks.
      selection: int32 [B, Tq, S, top_k - 1], distinct past chunks of each query, -1 for none;
        entries that are not past chunks of their query are ignored. S divides H and G divides S;
        query head h uses choice h // (H / S). None calls `select_chunks`.
      q_offset: int, integer scalar or integer [B] (may be traced). Outputs at positions beyond the
        last key are meaningless but finite.
      segment_ids: numbers of packed documents (`documents`), of the keys and so of the queries at
        their positions: no key of another document is read. Chunks are counted from position 0
        whatever the documents; a chunk that ends before its query's document begins is ignored.
        None: all tokens are of one.
      scale: factor on q . k, a positive float; default 1 / sqrt(K).
      implementation: "reference" (float32, quadratic memory), "xla" (gathers chunk by chunk),
        "masked" (scores everything, for texts that are not long and chunks up to 512), "full" (full
        attention, where no selection is given and every chunk is read), "pallas", "mosaic_gpu"
        (Hopper GPUs, jax 0.12 or newer; by name only), or None to choose by platform and shapes.
      selector: how `select_chunks` scores a chunk, and which heads choose together, where no
        selection is given.

    Returns:
      [B, Tq, H, V] in q's dtype. Scores and sums are float32. Differentiable in q, k, v in reverse
      mode ("reference" in both); no gradient flows through the selection.

    Raises:
      ValueError: on shapes or dtypes that do not fit, chunk_size < 1, top_k < 1, segment_ids that
        number no documents, a selector that does not fit the chunk, a named implementation that
        cannot run here, or forward-mode differentiation of another than "reference".
    """
    check_chunking(chunk_size, top_k)
    check_attention_inputs(q, k, v, q_offset)
    check_selector(selector, chunk_size, q.shape[2], k.shape[2])
    if selection is not None:
        _check_selection(selection, q, k, top_k)
    if segment_ids is not None:
        check_segment_ids("sparse_attention", segment_ids, *k.shape[:2])
    scale = check_scale(scale, q.shape[-1])
    everything = selection is None and k.shape[1] <= chunk_size * top_k
    choices = q.shape[2] // selector.together if selection is None else selection.shape[2]
    candidates = _candidates(
        q, k, v, choices, top_k - 1, chunk_size, q_offset, segment_ids, everything
    )
    chosen = resolve("sparse_attention", implementation, candidates)
    if chosen == "full":
        return full_attention(
            q, k, v,
            q_offset=q_offset, segment_ids=segment_ids, scale=scale, implementation="blocked",
        )  # fmt: skip
    if selection is None:
        selection = select_chunks(
            q, k,
            chunk_size=chunk_size, top_k=top_k, q_offset=q_offset, segment_ids=segment_ids,
            selector=selector,
        )  # fmt: skip
    elif segment_ids is not None:
        selection = _of_documents(selection, segment_ids, q_offset, chunk_size)
    selection = selection.astype(jnp.int32)  # numbers of chunks may not fit where entries do
    if chosen != "reference":
        q, k, v = reverse_only(NO_FORWARD_MODE.format("sparse_attention"), q, k, v)
    run = functools.partial(_IMPLEMENTATIONS[chosen], chunk_size=chunk_size, scale=scale)
    return run_attention(
        run,
        (q, k, v, selection),
        q_offset,
        segment_ids=segment_ids,
        check_vma=chosen not in _KERNELS,
    )


def _of_documents(selection, segment_ids, q_offset, chunk_size):
    """The selection without chunks that end before their query's document begins."""
    first = query_starts(document_starts(segment_ids), q_offset, selection.shape[1])
    return jnp.where(selection >= (first // chunk_size)[:, :, None, None], selection, -1)


def _check_selection(selection, q, k, top_k) -> None:
    expected = (*q.shape[:3], top_k - 1)
    same = lambda shape: (len(shape), *shape[:2], *shape[3:])
    integers = jnp.issubdtype(selection.dtype, jnp.signedinteger)
    if same(selection.shape) != same(expected) or not integers:
        raise ValueError(
            f"selection is {selection.dtype}{list(selection.shape)}, expected int32 "
            f"{list(expected)}: [B, Tq, S, top_k - 1] as `select_chunks` returns it"
        )
    check_groups(q.shape[2], k.shape[2], selection.shape[2])


def _candidates(
    q, k, v, choices, slots, chunk_size, q_offset, segment_ids, everything
) -> list[Candidate]:
    def problem(kernels) -> str | None:
        if segment_ids is not None and kernels is block_sparse_mosaic_gpu:
            return NO_DOCUMENTS
        if choices != k.shape[2]:
            return f"{k.shape[2]} key heads have {choices} choices of chunks, not one each"
        offset = known_or_rows(q_offset, q.shape[0])
        return kernels.unsupported_reason(q, k, v, slots, chunk_size, offset)

    def mosaic_problem(_) -> str | None:
        return block_sparse_mosaic_gpu.unsupported_chip() or problem(block_sparse_mosaic_gpu)

    masked = Candidate("masked", problem=lambda _: masking_obstacle(chunk_size))
    forms = [Candidate("xla"), masked]
    if masking_pays(q.shape[1], k.shape[1], slots, chunk_size):
        forms.reverse()
    if everything:
        forms.insert(0, Candidate("full"))
    return [
        Candidate("pallas", ("tpu", "gpu"), lambda platform: problem(_kernels(platform))),
        *forms,
        Candidate("mosaic_gpu", ("gpu",), mosaic_problem),  # after what runs anywhere: by name only
        Candidate("reference"),
    ]


def _kernels(platform: str):
    return block_sparse_gpu if platform == "gpu" else block_sparse_tpu


def _by_kernels(kernels, q, k, v, selection, *, chunk_size, scale, q_offset=0, starts=None):
    packed = {} if starts is None else {"starts": starts}
    return kernels().block_sparse_attention(
        q,
        k,
        v,
        selection,
        chunk_size=chunk_size,
        scale=scale,
        q_offset=known_or_rows(q_offset, q.shape[0]),
        **packed,
    )


_KERNELS: dict[str, Callable[..., jax.Array]] = {
    "pallas": functools.partial(_by_kernels, lambda: _kernels(current_platform())),
    "mosaic_gpu": functools.partial(_by_kernels, lambda: block_sparse_mosaic_gpu),
}
_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    **_KERNELS,
    "xla": sparse_attention_xla,
    "masked": sparse_attention_masked,
    "reference": sparse_attention_reference,
}
